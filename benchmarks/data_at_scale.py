"""Rows a second of one core that reads and that cleans, for docs/scale.md: processor time, so that others do not count.

`read`: documents of some 60 words, read, checked and digested, as `encode` does once more than it encodes. `clean`:
pairs of 10 and 60 words, with exact and near repeats looked for.

    python benchmarks/data_at_scale.py --rows 200000
"""

from __future__ import annotations

from common import bind_threads, record

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

from embedwright.data.clean.clean import clean_file  # noqa: E402
from embedwright.vectors.corpus import read_source  # noqa: E402
from embedwright.vectors.store import survey  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as temp:
        documents, pairs = Path(temp) / "documents.jsonl", Path(temp) / "pairs.jsonl"
        with documents.open("w") as file:
            for i in range(rows):
                file.write(json.dumps({"_id": f"d{i}", "text": words(i, 60)}) + "\n")
        with pairs.open("w") as file:
            for i in range(rows // 4):
                file.write(json.dumps({"id": f"e{i}", "query": words(-i, 10), "positives": [words(i, 60)]}) + "\n")
        found = {
            "read": rows / seconds(lambda: survey(((row.id, row.text) for row in read_source(documents)), 10_000)),
            "clean": rows // 4 / seconds(lambda: clean_file(pairs, Path(temp) / "clean.jsonl")),
        }
    print(found)
    record("data-at-scale", {"size": {"rows": rows}, "rows_per_second": found}, None)


def words(seed: int, count: int) -> str:
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(20_000), k=count))


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
