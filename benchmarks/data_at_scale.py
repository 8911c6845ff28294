"""Rows a second of one core that reads and that cleans, for docs/scale.md: processor time, so that others do not count.

`read`: documents of some 60 words, read, checked and digested, as `encode` does once more than it encodes. `clean`:
pairs of 10 and 60 words, with exact and near repeats looked for. `mine_rows`, `mine_documents`: what each part of
`mine` reads before it encodes its first text.

    python benchmarks/data_at_scale.py --rows 200000
"""

from __future__ import annotations

from common import bind_threads, record

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import suppress  # noqa: E402
from pathlib import Path  # noqa: E402

from embedwright.data.clean.clean import clean_file  # noqa: E402
from embedwright.data.files.parts import Shard  # noqa: E402
from embedwright.data.tables.documents import DocumentTable, open_corpus  # noqa: E402
from embedwright.data.tables.table import ExampleTable, PartOfTable, open_examples  # noqa: E402
from embedwright.mining.mine import mine  # noqa: E402
from embedwright.vectors.corpus import read_source  # noqa: E402
from embedwright.vectors.store import survey  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as temp:
        os.environ["EMBEDWRIGHT_CACHE"] = f"{temp}/cache"
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
        for name, file in (("one_row", pairs), ("one_document", documents)):
            (Path(temp) / f"{name}.jsonl").write_text(file.read_text().partition("\n")[0])
        table, one_row = open_examples(pairs), open_examples(Path(temp) / "one_row.jsonl")
        corpus, one_document = open_corpus(documents), open_corpus(Path(temp) / "one_document.jsonl")
        found["mine_rows"] = len(table) / seconds(lambda: until_encoded(table, one_document, Path(temp)))
        found["mine_documents"] = len(corpus) / seconds(lambda: until_encoded(one_row, corpus, Path(temp)))
    print(found)
    record("data-at-scale", {"size": {"rows": rows}, "rows_per_second": found}, None)


class BegunError(Exception):
    """Work is over at the first text that is to be encoded."""


class Teacher:
    def encode(self, texts: list[str], task: str | None = None) -> list[list[float]]:
        raise BegunError


def until_encoded(table: ExampleTable, corpus: DocumentTable, folder: Path) -> None:
    """Mines part 0 of 64 of a table, up to the first text."""
    rows = PartOfTable(table, Shard(0, 64).rows(len(table)) or range(1))
    with suppress(BegunError):
        mine(rows, corpus, Teacher(), rule="naive", task="", out=folder / "mined.jsonl")


def words(seed: int, count: int) -> str:
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(20_000), k=count))


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
