"""What of a folder is data: through the reader of training data, as a user gives it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from embedwright.data.files.beir import read_corpus
from embedwright.data.files.folders import data_files, stem_of
from embedwright.data.schema import DataError
from embedwright.data.tables.table import ExampleTable, open_examples


def rows(start: int, count: int = 2) -> list[dict[str, str]]:
    return [{"query": f"q{i}", "positive": f"p{i}"} for i in range(start, start + count)]


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def queries(table: ExampleTable) -> list[str]:
    return [example.query for example in table]


def test_shards_open_in_order_and_their_rows_have_ids_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for shard in range(2):
        write(folder / f"train-0000{shard}-of-00002.jsonl", *rows(2 * shard))
    table = open_examples(folder)
    assert queries(table) == ["q0", "q1", "q2", "q3"] and {example.task for example in table} == {"own"}
    assert len({example.id for example in table}) == 4


def test_a_folder_that_datasets_saved_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = Dataset.from_list(rows(0)), Dataset.from_list(rows(9))
    train.save_to_disk(tmp_path / "one")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    write(tmp_path / "one" / "cache-1234.arrow", "of a map that was run")
    for name in ("one", "two"):
        assert queries(open_examples(tmp_path / name)) == ["q0", "q1"]
    assert "train is read; not read: test" in caplog.text


def test_a_copy_of_a_hub_repository_gives_its_training_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# A set")
    for split, start in (("train", 0), ("test", 9)):
        Dataset.from_list(rows(start)).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert queries(open_examples(tmp_path)) == ["q0", "q1"]


def test_left_overs_and_what_stands_beside_are_no_data(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *rows(0))
    write(tmp_path / "b.jsonl", *rows(2))
    write(tmp_path / "a.jsonl.tasks.jsonl", {"name": "t"})
    beside = [
        "a.jsonl.quarantine.jsonl",
        "a.jsonl.leaks.jsonl",
        ".a.1f2e3d.jsonl",
        "c.jsonl.tmp",
    ]
    beside += ["a.jsonl.0123456789ab", "_SUCCESS.jsonl", "report.json", "a.report.json", "state.jsonl~"]
    for name in beside:
        write(tmp_path / name, {"query": "left over", "positive": "never read"})
    (tmp_path / ".hidden").mkdir()
    assert queries(open_examples(tmp_path)) == ["q0", "q1", "q2", "q3"]


def test_a_bad_line_of_a_shard_is_named_with_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = rows(0, 1), {"query": ""}
    for name in ("a", "b"):
        write(tmp_path / "set" / f"{name}.jsonl", *good, bad | {"positive": name})
    for _ in range(2):  # converted, and from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            table = open_examples(tmp_path / "set")
        assert table.quarantined == 2 and len(table.quarantine.read_text().splitlines()) == 2
        assert "a.jsonl:2: query is empty" in caplog.text and "b.jsonl:2: query is empty" in caplog.text


def test_labels_of_all_shards_are_one_set(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / "set" / f"{name}.jsonl", *({"text": f"{name} {i}", "label": name} for i in range(2)))
    table = open_examples(tmp_path / "set", negatives=2)
    assert len(table) == 6 and all(len(example.negatives) == 2 for example in table)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "without data: it is empty"),
        (["README.md"], r"without data: it holds README\.md.*\.jsonl.*datasets.*BEIR"),
        (["en/train.jsonl"], "it holds en/"),
        (["dev.jsonl", "test.jsonl"], r"several splits \(dev, test\), and none is 'train'"),
        (["a.jsonl", "a.csv"], r"holds a\.csv and a\.jsonl, which may be the same rows"),
    ],
)
def test_a_folder_that_cannot_be_read_says_what_it_holds(names: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in names:
        write(tmp_path / "set" / name, *rows(0))
    with pytest.raises(DataError, match=message):
        open_examples(tmp_path / "set")


def test_a_corpus_may_be_a_folder(tmp_path: Path) -> None:
    for shard in range(2):
        write(tmp_path / "corpus" / f"part-0000{shard}-of-00002.jsonl", {"_id": f"d{shard}", "text": f"text {shard}"})
    assert read_corpus(tmp_path / "corpus") == {"d0": "text 0", "d1": "text 1"}
    write(tmp_path / "beir" / "corpus.jsonl", {"_id": "d", "text": "text"})
    write(tmp_path / "beir" / "queries.jsonl", {"_id": "q", "text": "query"})
    assert read_corpus(tmp_path / "beir") == {"d": "text"}


def test_names_without_format() -> None:
    names = ["a.jsonl.gz", "a.b.parquet", "x.txt", "folder", "a.labeled.jsonl", "a.csv.zst"]
    assert [stem_of(Path(name)) for name in names] == ["a", "a.b", "x", "folder", "a.labeled", "a"]


def test_the_split_that_is_asked_for(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", *rows(0)), write(tmp_path / "test.jsonl", *rows(1))
    assert data_files(tmp_path) == [train] and data_files(tmp_path, "test") == [test]
