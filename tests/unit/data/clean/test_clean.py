"""`clean` against a plain reading of its rules, and what it counts, names and writes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedwright.data.clean.clean import By, Report, clean, clean_file
from embedwright.data.clean.filters import Filters
from embedwright.data.clean.leaks import EvalTexts
from embedwright.data.clean.repeats import repeats
from embedwright.data.schema import DataError, Example, Passage, Task
from embedwright.data.tables.table import open_examples, write_examples


def example(name: str, query: str, *positives: str, negatives: tuple[str, ...] = (), task: str = "t") -> Example:
    return Example(name, task, query, tuple(map(Passage, positives)), tuple(map(Passage, negatives)))


def cleaned(examples: list[Example], **options: Any) -> tuple[list[str], Report]:
    report = Report()
    return [row.id for row in clean(examples, report, **options)], report


LONG = [f"w{i}" for i in range(50)]
TEXT, NEAR_TEXT = " ".join(LONG), " ".join([*LONG[:-1], "other"])

# ---- repeats between rows


@pytest.mark.parametrize(
    ("by", "kept"),
    [
        ("both", ["a", "b", "c", "d", "f", "g"]),
        ("query", ["a", "c", "g"]),
        ("positive", ["a", "b", "d", "f", "g"]),
        ("none", ["a", "b", "c", "d", "e", "f", "g"]),
    ],
)
def test_a_row_repeats_another_by_the_sides_that_are_asked_for(by: By, kept: list[str]) -> None:
    rows = [
        example("a", "tides", TEXT, "the moon"),
        example("b", "Tides\u200b", "something else"),
        example("c", "waves", TEXT),
        example("d", "TIDES", "another one", "The  Moon"),
        example("e", " tides", NEAR_TEXT),
        example("f", "waves", "the wind"),
        example("g", "tides", TEXT, task="another task"),
    ]
    ids, report = cleaned(rows, by=by)
    assert ids == kept
    assert sum(report.removed.values()) == len(rows) - len(kept) and report.kept == len(kept)
    if by == "both":
        assert report.removed == {"repeated_near": 1} and report.cut == {"repeated": 1}


def test_texts_that_differ_in_a_sign_are_kept() -> None:
    pairs = [("C", "C#"), ("C++", "C"), ("-5 < 3", "5 > 3"), (":)", ":("), ("is it", "is it?")]
    rows = [example(f"{i}", f"{one} and {i}", one, other, negatives=("?", "!")) for i, (one, other) in enumerate(pairs)]
    rows += [example(f"{one}", one, "answer") for pair in pairs for one in pair if one != "C"]
    assert list(clean(rows, report := Report())) == rows and not report.cut and not report.removed


@pytest.mark.parametrize("by", ["both", "positive"])
def test_no_answer_of_a_question_is_lost(by: By) -> None:
    rows = [
        example("a", "q", "x", "y"),
        example("b", "Q", "X", "z", "y ", negatives=("n",)),
        example("c", "q", "z", "x"),
    ]
    report = Report()
    assert list(clean(rows, report, by=by)) == [rows[0], example("b", "Q", "z", negatives=("n",))]
    assert report.removed == {"repeated_exact": 1} and report.cut == {"repeated": 2}


@pytest.mark.parametrize("by", ["both", "query", "positive"])
def test_repeated_rows_agree_with_a_plain_reading(by: By) -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(60)]
    base = [" ".join(rng.sample(words, 30)) for _ in range(12)]

    def text() -> str:
        chosen = rng.choice(base).split()
        if rng.random() < 0.3:
            chosen[-1] = rng.choice(words)
        return " ".join(chosen)

    rows = [example(str(i), text(), *(text() for _ in range(rng.randrange(1, 4)))) for i in range(300)]
    sides = {"both": lambda e: [e.query, *(p.text for p in e.positives)], "query": lambda e: [e.query]}
    pool = [sides.get(by, lambda e: [p.text for p in e.positives])(row) for row in rows]
    found = repeats(t for texts in pool for t in texts)
    kept: list[str] = []
    seen = set[Any]()
    number = 0
    for row, texts in zip(rows, pool, strict=True):
        copies = [found[i].first if i in found else i for i in range(number, number + len(texts))]
        number += len(texts)
        keys = {(copies[0], copy) for copy in copies[1:]} if by == "both" else {*copies}
        if not keys <= seen:
            kept.append(row.id)
        seen |= keys
    assert cleaned(rows, by=by)[0] == kept and 5 < len(kept) < 300


# ---- within a row, by text, by row


def test_repeats_within_a_row_are_cut_with_their_scores() -> None:
    row = replace(
        example("a", "q", "p", "P ", TEXT, negatives=("n", "p", NEAR_TEXT, "N", "m", "Q")),
        positive_scores=(0.9, 0.8, 0.7),
        negative_scores=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    )
    report = Report()
    (left,) = clean([row], report)
    assert left == replace(
        row,
        positives=(Passage("p"), Passage(TEXT)),
        positive_scores=(0.9, 0.7),
        negatives=(Passage("n"), Passage("m")),
        negative_scores=(0.1, 0.5),
    )
    assert report.cut == {"repeated": 5} and not report.removed


def test_pair_tasks_and_low_scored_pairs_keep_negatives_that_nearly_repeat_query_or_positive(tmp_path: Path) -> None:
    others = [" ".join([*LONG[:i], f"x{i}", *LONG[i + 1 :]]) for i in range(5)]  # near TEXT and each other
    row = replace(
        example(
            "a", others[0], TEXT, others[1], negatives=(others[2], TEXT.upper(), others[0], others[3], "n"), task="p"
        ),
        negative_scores=(0.1, 0.2, 0.3, 0.4, 0.5),
    )
    low = replace(example("low", TEXT, negatives=(others[4],), task="s"), score=2.5)
    high = replace(example("high", TEXT, "p", negatives=(others[4],), task="s"), score=4.5)
    tasks = [Task(name="p", family="pair"), Task(name="s", family="sts")]
    for name, task in (("pair.parquet", "p"), ("plain.jsonl", "plain")):
        rows = [replace(row, task=task), low, replace(low, id="equal", negatives=(Passage(TEXT),)), high]
        write_examples(tmp_path / name, rows, {task.name: task for task in tasks})
        report = clean_file(tmp_path / name, tmp_path / "out.jsonl", by="none")
        first, *others_left = open_examples(tmp_path / "out.jsonl")
        assert first.positives == (Passage(TEXT),)  # of positives, one that nearly repeats another still goes
        kept = [(others[2], 0.1), ("n", 0.5)] if task == "p" else [("n", 0.5)]
        assert [*zip((one.text for one in first.negatives), first.negative_scores or (), strict=True)] == kept
        assert others_left == [low, replace(high, negatives=())]
        assert report["rows_removed"] == {"repeated": 1}


def test_a_row_without_fault_comes_back_as_it_was() -> None:
    row = replace(example("a", "q", "p", "r", negatives=("n",)), positive_scores=(1.0, 0.5), score=4.5, language="en")
    assert list(clean([row], Report(), filters=Filters(languages=("en",), min_chars=1, max_words=3))) == [row]


def test_lengths_cut_passages_and_remove_rows() -> None:
    rows = [
        example("short query", "q", "long enough"),
        example("one positive left", "long enough", "p", "long enough", negatives=("n", "long enough too")),
        example("no positive left", "long enough", "p"),
        example("fine", "as it is", "long enough"),
    ]
    report = Report()
    left = list(clean(rows, report, filters=Filters(min_chars=3)))
    assert [row.id for row in left] == ["one positive left", "fine"]
    assert left[0].positives == (Passage("long enough"),) and left[0].negatives == (Passage("long enough too"),)
    assert report.to_json() == {"kept": 2, "rows_removed": {"length": 2}, "passages_cut": {"length": 2}, "leaks": {}}


def test_rows_without_a_task_have_the_licence_of_the_set_that_the_file_is_named_after(tmp_path: Path) -> None:
    (tmp_path / "banking77.jsonl").write_text('{"query": "q", "positive": "p"}\n')
    report = clean_file(tmp_path / "banking77.jsonl", None, filters=Filters(allow=("MIT",)))
    assert report["kept"] == 1


def test_a_row_that_a_filter_removes_hides_no_later_one() -> None:
    rows = [example("closed", "q", "p", task="closed"), example("free", "q", "p", task="free")]
    rows += [example("german", "Wie entstehen Gezeiten?", "Durch den Mond und die Sonne.", task="free")]
    filters = Filters(licences={"closed": "CC-BY-NC-4.0", "free": "MIT"}, deny=("*-NC-*",), languages=("en",))
    ids, report = cleaned(rows, filters=filters, by="query")
    assert ids == ["free"] and report.removed == {"licence": 1, "language": 1}
    stated = [replace(rows[0], language="de"), replace(rows[0], id="later", language="en")]
    assert cleaned(stated, filters=Filters(languages=("en",)))[0] == ["later"]


# ---- leaks


@pytest.fixture
def held_out(tmp_path: Path) -> EvalTexts:
    file = tmp_path / "test.jsonl"
    rows = [{"text": text, "label": "x", "id": f"h{i}"} for i, text in enumerate(["how do tides work", TEXT, "é 漢字"])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalTexts([file])


def test_a_leaking_query_removes_the_row_and_a_passage_is_cut(held_out: EvalTexts, tmp_path: Path) -> None:
    rows = [
        example("query", "How do  TIDES work", "the moon"),
        example("fine", "waves", "the wind", negatives=("rain",)),
        example("only positive", "why", NEAR_TEXT),
        example("others left", "why not", "É 漢字", "because", negatives=("work tides do how", "rain")),
    ]
    lines: list[dict[str, Any]] = []
    report = Report()
    left = list(clean(rows, report, held_out=held_out, on_leak=lines.append))
    assert [row.id for row in left] == ["fine", "others left"]
    assert left[1].positives == (Passage("because"),) and left[1].negatives == (Passage("rain"),)
    assert report.removed == {"leaked": 2} and report.cut == {"leaked": 2}
    counts = {"query exact": 1, "positive near": 1, "positive exact": 1, "negative bm25": 1}
    assert report.leaks == {str(tmp_path / "test.jsonl"): counts}
    assert [(line["row"], line["id"], line["side"], line["rule"], line["evaluation_row"]) for line in lines] == [
        (1, "query", "query", "exact", "h0"),
        (3, "only positive", "positive", "near", "h1"),
        (4, "others left", "positive", "exact", "h2"),
        (4, "others left", "negative", "bm25", "h0"),
    ]
    assert (
        lines[1]["text"] == NEAR_TEXT[:200]
        and lines[1]["evaluation_text"] == TEXT[:200]
        and 0.8 <= lines[1]["score"] < 1
    )


def test_scored_pairs_below_the_threshold_stay_with_their_score_and_repeat_each_other_alone(
    held_out: EvalTexts,
) -> None:
    def low(name: str, query: str, other: str, score: float) -> Example:
        return replace(example(name, query, negatives=(other,)), score=score)

    high = [replace(example("a", "one", "two"), score=4.0), replace(example("b", "three", "four"), score=5.0)]
    pairs = [low("c", "one", "two", 0.5), low("d", "three", "five", 2.0), low("e", "three", "six", 2.0)]
    again = [low("f", "One", " two", 3.0), replace(example("g", "three", "four"), score=4.5)]
    rows = [
        *pairs[:1],
        *high,
        *pairs[1:],
        *again,
        low("h", "same", "Same", 1.0),
        low("i", "seven", "How do tides WORK", 1.0),
    ]
    report = Report()
    kept = list(clean(rows, report, held_out=held_out))
    assert kept == [*pairs[:1], *high, *pairs[1:]]  # whole, in order
    assert report.removed == {"repeated_exact": 2, "repeated": 1, "leaked": 1} and not report.cut
    assert cleaned(rows[:-2], by="positive")[0] == ["c", "a", "b", "d", "e"]
    assert cleaned(rows[:-2], by="query")[0] == ["c", "a", "b", "d"]
    assert cleaned(rows[:-2], filters=Filters(min_chars=4))[0] == ["b", "d"]


def test_texts_that_come_again_are_judged_alike(held_out: EvalTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedwright.data.clean.clean._BATCH", 4)
    monkeypatch.setattr("embedwright.data.clean.clean._REMEMBERED", 10)
    rows = [
        example(str(i), f"{i * i} is a number", f"and {i} a positive", negatives=(f"n{i % 3}", "how do tides work"))
        for i in range(50)
    ]
    report = Report()
    left = list(clean(rows, report, held_out=held_out))
    assert [row.id for row in left] == [str(i) for i in range(50)]
    assert [row.negatives for row in left] == [(Passage(f"n{i % 3}"),) for i in range(50)]
    assert report.cut == {"leaked": 50}


# ---- files


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_a_file_is_cleaned_with_a_report_of_what_leaks(name: str, held_out: EvalTexts, tmp_path: Path) -> None:
    source, out, leaks = tmp_path / "in.jsonl", tmp_path / "new" / name, tmp_path / "new" / "leaks.jsonl"
    lines = [{"query": f"q{i} {i}", "positive": f"p{i}"} for i in range(5)]
    lines += [{"query": "how do tides work", "positive": "x"}, lines[2]]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    for _ in range(2):  # again over what is there: the same
        report = clean_file(source, out, leaks_to=leaks, held_out=held_out)
        assert (report["rows"], report["examples"], report["quarantined"], report["kept"]) == (7, 7, 1, 5)
        assert report["tasks"] == {"in": 7} and report["rows_removed"] == {"repeated_exact": 1, "leaked": 1}
        assert [row.query for row in open_examples(out)] == [f"q{i} {i}" for i in range(5)]
        (line,) = map(json.loads, leaks.read_text().splitlines())
        assert (line["file"], line["row"], line["id"], line["side"]) == (str(source), 6, "in:6", "query")
        assert sorted(path.name for path in out.parent.iterdir()) == sorted([name, "leaks.jsonl"])


def test_only_counting_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    write_examples(source, [example("a", "q", "p"), example("b", "q", "p")])
    assert clean_file(source, None)["rows_removed"] == {"repeated_exact": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_nothing_left_is_an_error_and_leaves_the_old_files(held_out: EvalTexts, tmp_path: Path) -> None:
    source, out, leaks = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "leaks.jsonl"
    write_examples(source, [example("a", "how do tides work", "p")])
    out.write_text("old")
    leaks.write_text("old")
    with pytest.raises(DataError, match=r"in\.jsonl: no row is left \(leaked 1\)"):
        clean_file(source, out, leaks_to=leaks, held_out=held_out)
    assert out.read_text() == leaks.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "leaks.jsonl", "out.jsonl", "test.jsonl"]


# ---- real and big data

MILLION = """
import json, random, sys, time
from pathlib import Path
from embedwright.data.clean.clean import clean_file

source, out = Path(sys.argv[1]), Path(sys.argv[2])
rng = random.Random(0)
words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(30_000)]
with source.open("w") as file:
    for i in range(1_000_000):
        if i % 10 == 1:  # an exact copy of the row before
            row = [side.upper() for side in row]
        elif i % 10 == 6:  # a near copy of it
            row = [side + " end" for side in row]
        else:
            row = [" ".join(rng.choices(words, k=54)) for _ in range(2)]
        file.write(json.dumps({"query": row[0], "positive": row[1]}) + "\\n")
started = time.perf_counter()
report = clean_file(source, out)
seconds = time.perf_counter() - started
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({**report, "peak": peak, "rows_per_second": report["rows"] / seconds, "bytes": source.stat().st_size}))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak")
def test_a_million_rows_are_cleaned_within_two_gigabytes(tmp_path: Path) -> None:
    """Texts of 300 characters on both sides, every fifth row a copy; reading, cleaning and writing in one process."""
    arguments = [sys.executable, "-c", MILLION, str(tmp_path / "in.jsonl"), str(tmp_path / "out.parquet")]
    report = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    print(f"peak {report['peak'] / 1e9:.2f} GB, {report['rows_per_second']:,.0f} rows/s")
    assert report["bytes"] / 2e6 > 300
    assert report["rows_removed"] == {"repeated_exact": 100_000, "repeated_near": 100_000}
    assert report["kept"] == 800_000 and report["peak"] < 2e9


REAL = os.environ.get("EMBEDWRIGHT_DATA")


@pytest.mark.skipif(not REAL, reason="EMBEDWRIGHT_DATA is not set")
def test_real_training_data_against_real_evaluation_data(tmp_path: Path) -> None:
    held_out = EvalTexts([Path(str(REAL)) / "dev" / "sts14.scored.jsonl.gz"])
    report = clean_file(Path(str(REAL)) / "train" / "sts12-13.scored.jsonl.gz", tmp_path / "o.jsonl", held_out=held_out)
    # its authors took the sentences of sts14 out; three that are nearly there stand in pairs of a low score
    assert [dict(counts) for counts in report["leaks"].values()] == [{"query near": 3, "negative near": 3}]
    assert (
        report["kept"]
        == report["examples"] - sum(report["rows_removed"].values())
        == len(open_examples(tmp_path / "o.jsonl"))
    )
    assert report["rows_removed"]["repeated_exact"] > 100
