"""`data pairs` as a whole: counts, tasks, ids, what is drawn, bad input; and properties of each way on real data."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from small_wordnet import TEXT as ON_FERRIES
from small_wordnet import write_wordnet
from typer.testing import CliRunner

from embedwright.cli import options
from embedwright.cli.main import app
from embedwright.data.files.documents import Document, columns_of
from embedwright.data.files.tasks import tasks_beside
from embedwright.data.keys import exact_key
from embedwright.data.schema import DataError, Example
from embedwright.data.tables.table import open_examples
from embedwright.errors import InputError, OutputExistsError
from embedwright.pairs import make
from embedwright.pairs.make import MEANINGS, WAYS, Options, make_pairs
from embedwright.pairs.wordnet import WordNet

REAL = Path(os.environ.get("EMBEDWRIGHT_DATA", "none")) / "train"
needs_data = pytest.mark.skipif("EMBEDWRIGHT_DATA" not in os.environ, reason="EMBEDWRIGHT_DATA is not set")
PAIRS = columns_of(["title=query", "text=positive"])
TEXT = "Perl is a programming language by Larry Wall. Its users share modules on a large archive of modules there."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Example]:
    return list(open_examples(path))


def test_rows_tasks_and_counts(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"id": "a", "title": "Perl", "text": TEXT}, {"id": "b", "text": "No title."})
    with source.open("a") as file:
        file.write("{\n")
    counts = make_pairs(source, tmp_path / "out.parquet", ["title", "summary"], licence="cc0")
    assert counts == {
        "documents": 2,
        "quarantined": 1,
        "ways": {
            "title": {"documents": 1, "examples": 1, "skipped": {"no_title": 1}},
            "summary": {"documents": 1, "examples": 1, "skipped": {"no_sentence": 1}},
        },
    }
    a, b = read(tmp_path / "out.parquet")
    assert (a.id, a.task, a.query, a.positives[0].id) == ("title:a:0", "d-title", "Perl", "d::a")
    assert (b.id, b.task) == ("summary:a:0", "d-summary")
    assert (tmp_path / "out.parquet.quarantine.jsonl").read_text() == "{\n"
    tasks = tasks_beside(tmp_path / "out.parquet")
    assert {(t.name, t.family, t.licence) for t in tasks.values()} == {
        ("d-title", "retrieval", "cc0"),
        ("d-summary", "retrieval", "cc0"),
    }
    assert all(task.instruction and "d.jsonl" in task.source for task in tasks.values())


def test_a_query_that_is_its_positive_is_left_out_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"title": "Same  TEXT", "text": "same text"}, {"title": "a", "text": "b"})
    counts = make_pairs(source, tmp_path / "out.jsonl", ["title"])["ways"]["title"]
    assert counts == {"documents": 1, "examples": 1, "skipped": {"query_is_positive": 1}}


def test_what_a_way_draws_depends_on_seed_way_and_id_alone(tmp_path: Path) -> None:
    texts = [
        {"id": f"d{i}", "text": f"{TEXT} Number {i} of all of these texts has words of its own."} for i in range(9)
    ]
    source, turned = write(tmp_path / "d.jsonl", *texts), write(tmp_path / "t.jsonl", *reversed(texts))

    def rows(path: Path, how: str, **settings: Any) -> dict[str, tuple[str, str]]:
        make_pairs(path, tmp_path / "o.jsonl", how.split(","), name="n", **settings)
        return {e.id: (e.query, e.positives[0].text) for e in read(tmp_path / "o.jsonl")}

    alone = rows(source, "crops")
    together = rows(source, "sentence,crops,title")
    assert alone.items() <= together.items() and rows(turned, "crops,sentence") == together
    assert rows(source, "crops") == alone != rows(source, "crops", seed=1)
    more = rows(source, "crops", per_document=4)
    assert alone.items() <= more.items() and len(more) == 4 * len(alone) == 36


def test_the_ways_that_draw_are_those_that_another_seed_changes(tmp_path: Path) -> None:
    """So `--per-document` acts on each way that can make other examples: `templates` has but other words for one."""
    senses = "a room where books are kept for people to read; "
    documents = [
        Document(
            "page", f"{ON_FERRIES} {TEXT} In 1953 Edmund Hillary climbed it. See also Other.", "On ferries", ("a",)
        ),
        *(
            Document(
                f"w{i}",
                f'{senses}sense {i}; "she read in the library {i}"; "he slept there {i}"',
                "library, den",
                ("a",),
            )
            for i in range(3)
        ),
        Document("other", "Another text with a class of its own.", "Other", ("b",)),
        Document("more", "One more text of that class, and longer.", "More", ("b",)),
    ]
    options = Options(2, WordNet(write_wordnet(tmp_path / "wordnet")))
    for name, way in WAYS.items():
        make = way.make(documents, options)
        made = [repr([make(document, random.Random(seed)) for document in documents]) for seed in range(30)]
        assert "Example" in made[0], name
        assert (len(set(made)) > 1) == (way.draws or name == "templates"), name


def test_an_output_among_the_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"# Perl\n\n{TEXT}\n")
    with pytest.raises(InputError, match=r"pairs\.jsonl lies among the documents"):
        make_pairs(tmp_path, tmp_path / "pairs.jsonl", ["title"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.md"]


def test_the_same_bytes_again(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", *({"text": f"{TEXT} {i}"} for i in range(50)))
    files = []
    for name in ("a", "b"):
        make_pairs(source, tmp_path / f"{name}.jsonl.gz", ["crops", "sentence"], per_document=2)
        files.append([(tmp_path / f"{name}.jsonl.gz{end}").read_bytes() for end in ("", ".tasks.jsonl")])
    assert files[0] == files[1]


def test_nothing_is_written_where_nothing_comes_out(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    empty, untitled = write(tmp_path / "e.jsonl"), write(tmp_path / "u.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"e\.jsonl: no document"):
        make_pairs(empty, out, ["title"])
    with pytest.raises(DataError, match=r"no example of 1 documents \(title: no_title 1\)"):
        make_pairs(untitled, out, ["title"])
    with pytest.raises(InputError, match=r"--how 'titel': no such way \(did you mean 'title'\?\)"):
        make_pairs(untitled, out, ["titel"])
    with pytest.raises(InputError, match="name at least one way"):
        make_pairs(untitled, out, [])
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["e.jsonl", "out.jsonl", "u.jsonl"]


def test_lemma_needs_wordnet_and_writes_scored_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"id": "a", "text": ON_FERRIES})
    with pytest.raises(InputError, match=r"--how lemma needs --wordnet FOLDER.*wordnet-base"):
        make_pairs(source, tmp_path / "o.jsonl", ["title", "lemma"])
    with pytest.raises(InputError, match="--wordnet is read by the way lemma alone"):
        make_pairs(source, tmp_path / "o.jsonl", ["title"], wordnet=tmp_path / "wordnet")
    make_pairs(source, tmp_path / "o.jsonl", ["lemma"], wordnet=write_wordnet(tmp_path / "wordnet"))
    assert [row.score for row in read(tmp_path / "o.jsonl")] == [5.0, 4.0, 2.5, 1.5]
    (task,) = tasks_beside(tmp_path / "o.jsonl").values()
    assert (task.name, task.family, task.symmetric) == ("d-lemma", "sts", True) and task.instruction


def test_a_stopped_run_goes_on_and_other_inputs_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def docs(name: str, last: str) -> Path:
        texts = [{"id": f"d{i}", "title": f"t{i}", "text": f"{ON_FERRIES} {i} {TEXT}"} for i in range(7)]
        return write(tmp_path / name, *texts, {"id": "d7", "title": last, "text": TEXT})

    first, other = docs("d.jsonl", "t7"), docs("other.jsonl", "another title")
    nets = [write_wordnet(tmp_path / "w"), write_wordnet(tmp_path / "w2", uses={"bank": [9, 1]})]
    out, parts = tmp_path / "o.jsonl", tmp_path / "o.jsonl.parts"
    monkeypatch.setattr(make, "BLOCK", 3)
    given: dict[str, Any] = {"path": first, "how": ["title", "crops", "lemma"], "wordnet": nets[0], "name": "n"}

    def stopped(at: int, **settings: Any) -> set[str]:
        """Stops before that document, counted over all ways; returns the documents that were done before."""
        done: list[str] = []

        def one(way: str, _: Any, document: Any, *rest: Any) -> Any:
            if len(done) == at:
                raise KeyboardInterrupt
            done.append(f"{way}:{document.id}")
            return real(way, _, document, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            real = make._of_document
            patch.setattr(make, "_of_document", one)
            make_pairs(out=out, **{**given, **settings})
        return {*done}

    whole = make_pairs(out=tmp_path / "whole.jsonl", **given)
    expected = (tmp_path / "whole.jsonl").read_bytes()
    assert not out.exists() and len(stopped(5)) == 5 and [*parts.glob("title-*")]
    assert "title:d2" not in stopped(20) and "title:d3" not in stopped(1)  # its first parts are there
    assert make_pairs(out=out, **given) == whole and out.read_bytes() == expected and not parts.exists()
    for change in ({"path": other}, {"seed": 1}, {"per_document": 2}, {"negatives": 3}, {"wordnet": nets[1]}):
        stopped(9)
        assert "title:d0" in stopped(5, **change), change
        assert make_pairs(out=out, **given) == whole and out.read_bytes() == expected
    stopped(9)
    more = [*given["how"], "sentence"]  # other ways, and what the tasks are called, leave the parts as they are
    assert "title:d0" not in stopped(9, how=more, name="m", licence="mit")
    make_pairs(out=out, **{**given, "how": more})
    assert out.read_bytes().startswith(expected)


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl.parts").mkdir()
    (tmp_path / "o.jsonl.parts" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"o\.jsonl\.parts holds mine .*: remove it, or"):
        make_pairs(write(tmp_path / "d.jsonl", {"title": "a", "text": TEXT}), tmp_path / "o.jsonl", ["title"])
    assert (tmp_path / "o.jsonl.parts" / "mine").read_text() == "mine"


def test_every_way_has_a_meaning_and_every_meaning_a_way() -> None:
    assert {kind.removesuffix("-term").removesuffix("-usage") for kind in MEANINGS} == {*WAYS}


def test_the_help_names_the_ways() -> None:
    assert options.WAYS.split(", ") == [*WAYS]


def test_the_command(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"summary": "Perl", "text": TEXT})
    options = ["--column", "title=summary", "--licence", "mit", "--name", "faq", "--per-document", "2", "--seed", "3"]
    done = CliRunner().invoke(
        app, ["data", "pairs", str(source), "--how", "title, crops", "--out", str(tmp_path / "o.parquet"), *options]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ways"]["title"]["examples"] == 1
    assert {e.task for e in read(tmp_path / "o.parquet")} == {"faq-title", "faq-crops"}
    assert {task.licence for task in tasks_beside(tmp_path / "o.parquet").values()} == {"mit"}


@needs_data
@pytest.mark.parametrize("name", ["perlfaq", "foldoc"])
def test_properties_on_real_data(tmp_path: Path, name: str) -> None:
    packed = (REAL / f"{name}.pairs.jsonl.gz").read_bytes()
    lines = "".join(gzip.decompress(packed).decode().splitlines(keepends=True)[:800])
    (tmp_path / "d.jsonl").write_text(lines)
    wordnet = write_wordnet(tmp_path / "wordnet")
    counts = make_pairs(tmp_path / "d.jsonl", tmp_path / "o.jsonl", [*WAYS], columns=PAIRS, wordnet=wordnet)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert counts["documents"] == lines.count("\n") and counts["quarantined"] == 0
    assert sum(way["examples"] for way in counts["ways"].values()) == len(rows)
    for way in counts["ways"].values():
        assert way["documents"] + sum(way["skipped"].values()) == counts["documents"]
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        texts = [p if isinstance(p, str) else p["text"] for p in (*row["positives"], *row.get("negatives", []))]
        keys = [exact_key(text) for text in texts]
        assert all(keys) and exact_key(row["query"]) not in keys
        assert not {*keys[: len(row["positives"])]} & {*keys[len(row["positives"]) :]}
    kept = [r["query"] in r["positives"][0]["text"] for r in rows if r["id"].startswith("sentence:")]
    assert 0.04 < sum(kept) / len(kept) < 0.17
