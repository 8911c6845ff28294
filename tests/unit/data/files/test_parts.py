"""Parts: together they are the whole, one that is done is not made again, and those of other settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedwright.data.files import parts
from embedwright.data.files.parts import Shard, write_part
from embedwright.data.schema import DataError, Example, Passage, Task
from embedwright.data.tables.table import BATCH_ROWS, PartOfTable, open_examples, write_examples
from embedwright.errors import InputError, OutputExistsError


def rows(count: int, task: str = "t") -> list[Example]:
    return [Example(f"{i}", task, f"query {i}", (Passage(f"positive {i}"),)) for i in range(count)]


def writer(examples: list[Example], calls: list[Path]) -> Any:
    def write(file: Path) -> dict[str, int]:
        calls.append(file)
        return {"examples": write_examples(file, examples, {"t": Task(name="t", instruction="Find it")})}

    return write


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_the_rows_of_all_parts_are_all_rows_in_order(total: int, count: int) -> None:
    own = [list(Shard(index, count).rows(total)) for index in range(count)]
    assert [row for part in own for row in part] == list(range(total))
    assert max(map(len, own)) - min(map(len, own)) <= 1


def test_a_shard_is_read_from_text_and_counts_from_0() -> None:
    assert Shard.parse("0/10") == Shard(0, 10) and Shard.parse("9/10") == Shard(9, 10)
    for bad in ("10/10", "1", "", "1/", "/2", "-1/2", "1/2/3", "a/b", "0/0", "0/100000", "0.5/2"):
        with pytest.raises(InputError, match="from 0/N to N-1/N"):
            Shard.parse(bad)


@pytest.mark.parametrize("name", ["out", "out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_parts_of_a_table_make_a_folder_that_opens_as_the_table(name: str, tmp_path: Path) -> None:
    examples = rows(2 * BATCH_ROWS + 40)
    write_examples(tmp_path / "in.jsonl", examples)
    table = open_examples(tmp_path / "in.jsonl")
    for index in (2, 0, 1):  # in any order
        shard = Shard(index, 3)
        part = PartOfTable(table, shard.rows(len(table)))
        assert len(part) == len(list(part)) == len(list(part))
        write_part(tmp_path / name, shard, {}, writer(list(part), []))
    together = open_examples(tmp_path / name)
    assert list(together) == examples == list(table)
    assert together.tasks == {"t": Task(name="t", instruction="Find it")}
    assert list(PartOfTable(table, [0, 255, 256, 500, 551])) == [examples[i] for i in (0, 255, 256, 500, 551)]


def test_a_part_without_rows_is_a_part(tmp_path: Path) -> None:
    for index, own in enumerate(([], rows(2), [])):
        write_part(tmp_path / "out.parquet", Shard(index, 3), {}, writer(own, []))
    assert list(open_examples(tmp_path / "out.parquet")) == rows(2)


def test_a_part_that_is_done_is_not_made_again_and_gives_its_counts(tmp_path: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        counts = write_part(tmp_path / "out", Shard(1, 2), {"seed": 1}, writer(rows(3), calls))
        assert counts == {"examples": 3} and [file.name for file in calls] == ["part-00001-of-00002.jsonl"]


def test_a_part_that_fails_or_is_killed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path, Shard(0, 1), {}, fails)
    with pytest.raises(DataError, match="without data"):
        open_examples(tmp_path)
    calls: list[Path] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # between the part and its report
        patch.setattr(parts, "write_json", fails)
        write_part(tmp_path, Shard(0, 1), {}, writer(rows(1), calls))
    assert write_part(tmp_path, Shard(0, 1), {}, writer(rows(2), calls)) == {"examples": 2}
    assert len(calls) == 2 and list(open_examples(tmp_path)) == rows(2)


def test_parts_of_other_settings_or_of_another_number_are_refused(tmp_path: Path) -> None:
    write_part(tmp_path, Shard(0, 2), {"seed": 1, "of": {"a": [1]}}, writer(rows(1), []))
    calls: list[Path] = []
    for shard, settings, said in (
        (Shard(1, 2), {"seed": 2, "of": {"a": [1]}}, "seed 1, and this is 2"),
        (Shard(1, 2), {"seed": 1}, "of {'a': \\[1\\]}, and this is None"),
        (Shard(1, 3), {"seed": 1, "of": {"a": [1]}}, "parts 2, and this is 3"),
    ):
        with pytest.raises(InputError, match=said):
            write_part(tmp_path, shard, settings, writer(rows(1), calls))
    assert not calls
    write_part(tmp_path, Shard(1, 2), {"of": {"a": (1,)}, "seed": 1}, writer(rows(1), calls))
    assert calls


def test_settings_that_another_process_brought_meanwhile_refuse_the_part(tmp_path: Path) -> None:
    """Two commands that begin at one moment both see an empty folder; the file of the later one stands."""

    def meanwhile(file: Path) -> dict[str, int]:
        (tmp_path / "parts.json").write_text('{"seed": 2, "parts": 1}')
        return {"examples": write_examples(file, rows(1))}

    with pytest.raises(InputError, match="seed 2, and this is 1"):
        write_part(tmp_path, Shard(0, 1), {"seed": 1}, meanwhile)
    assert sorted(file.name for file in tmp_path.iterdir() if "tasks" not in file.name) == ["parts.json"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds notes\.txt"):
        write_part(tmp_path, Shard(0, 1), {}, writer(rows(1), []))
    with pytest.raises(OutputExistsError, match="is a file"):
        write_part(tmp_path / "notes.txt", Shard(0, 1), {}, writer(rows(1), []))


def test_an_unfinished_folder_is_no_data_set(tmp_path: Path) -> None:
    for index in (0, 2, 3):
        write_part(tmp_path / "out", Shard(index, 4), {}, writer(rows(1), []))
    with pytest.raises(DataError, match=r"of 4 parts, 1 are missing .*part-00001-of-00004.*--shard 1/4"):
        open_examples(tmp_path / "out")


def test_a_part_with_unanswered_questions_is_not_read_as_if_it_were_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for index, unanswered in ((0, 0), (1, 3)):
        write_part(out, Shard(index, 2), {}, lambda file, n=unanswered: {**writer(rows(1), [])(file), "unanswered": n})
    with pytest.raises(DataError, match=r"of 2 parts, 1 are missing or .*without an answer .*--shard 1/2"):
        open_examples(out)
    write_part(out, Shard(1, 2), {}, writer(rows(2), []))
    assert len(open_examples(out)) == 3
    (out / "parts.json").unlink()  # of parts that others have written, none has a report
    for report in out.glob("*.report.json"):
        report.unlink()
    assert len(open_examples(out)) == 3
