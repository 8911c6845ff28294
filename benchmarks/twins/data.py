"""Prepares the rows of the twins from what recipes/ablations/data.sh has made: the same files for both systems.

    EMBEDWRIGHT_DATA=FOLDER python benchmarks/twins/data.py runs/ablation-data runs/twins-data

NAME-1.jsonl and NAME-2.jsonl have the same rows, each with one positive and its first one or two negatives, so that
both systems take the same texts. Labelled texts are by example, `sentiment` too. sts.jsonl has all scored pairs,
sts-pairs.jsonl those of 4 points and more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from embedwright.data.schema import Example, Passage, to_row
from embedwright.data.tables.table import open_examples
from embedwright.files import write_text

NAMES = ("debian", "foldoc", "wordnet", "perlfaq", "clinc150", "newsgroups", "sentiment")
NEGATIVES, POSITIVE_FROM = 2, 4.0  # negatives of a row; the score from which a pair is a positive (NV-Embed, 3.3)


def main(source: Path, out: Path) -> None:
    dev = Path(os.environ["EMBEDWRIGHT_DATA"]) / "dev"
    clean = ["clean", "--against", dev, "--language", "en", "--out"]
    out.mkdir(parents=True, exist_ok=True)
    by_example, texts, pairs = out / "sentiment.parquet", out / "sentiment-clean.parquet", out / "sts.parquet"
    labels = ["labels", source / "raw/sentiment.jsonl", "--form", "example", "--negatives", NEGATIVES]
    data(*labels, "--task", "sentiment", "--out", by_example)  # data.sh has made them of the labels' words
    data(*clean, texts, by_example)
    data(*clean, pairs, source / "raw/sts.jsonl")  # data.sh keeps those of 4 points alone
    for name in NAMES:
        path = texts if name == "sentiment" else source / "data" / f"{name}.parquet"
        rows = [row for row in open_examples(path, task=name) if len(row.negatives) >= NEGATIVES]
        for few in (1, NEGATIVES):
            write(out / f"{name}-{few}.jsonl", name, rows, few)
    scored = [row for row in open_examples(pairs, task="sts") if row.id.endswith(":ab")]  # each is there both ways
    write(out / "sts.jsonl", "sts", scored, 0)
    write(out / "sts-pairs.jsonl", "sts", [row for row in scored if (row.score or 0) >= POSITIVE_FROM], 0)


def data(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "embedwright", "data", *map(str, words)], check=True)


def write(file: Path, task: str, rows: Iterable[Example], negatives: int) -> None:
    """Writes rows with one positive and their first negatives. The other text of a scored pair may be a negative."""
    lines = []
    for number, row in enumerate(rows):
        first = tuple(Passage(passage.text) for passage in row.positives[:1])
        some = tuple(Passage(passage.text) for passage in row.negatives[: negatives or 1 - len(first)])
        bare = Example(f"{task}:{number}", task, row.query, first, some, score=row.score)
        lines.append(json.dumps(to_row(bare)) + "\n")
    write_text(file, "".join(lines))
    print(file, len(lines))


if __name__ == "__main__":
    if len(sys.argv) != 3 or "EMBEDWRIGHT_DATA" not in os.environ:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
