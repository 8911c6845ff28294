"""Harvesting and building from packages made on the spot, and from networkx as it is installed."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from embedwright.data.clean.repeats import DuplicateIndex
from embedwright.data.files.tasks import read_tasks, tasks_file
from embedwright.data.keys import near_key
from embedwright.data.schema import Example, Passage, parse_example
from embedwright.demo import docstrings
from embedwright.demo.docstrings import build, harvest, split_docstring
from embedwright.evaluation.suite import load_suite

BODY = "It goes over all the items once, keeps the largest that it has met so far, and gives that one back at the end."


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of packages that `harvest` finds."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    return folder


def write(site: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source), encoding="utf-8")


def function(name: str, summary: str, body: str = BODY) -> str:
    return f'def {name}():\n    """{summary}\n\n    {body}\n    """\n'


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- harvest


def test_public_definitions_of_public_places_are_read_in_order(site: Path) -> None:
    public = function("largest", "Gives the largest of all items.")
    write(
        site,
        {
            "fakelib/__init__.py": "raise RuntimeError('imported')\n" + public,
            "fakelib/_core/code.py": public,  # numpy's
            "fakelib/_impl.py": public,  # private files hold public functions
            "fakelib/broken.py": "def {{ name }}",
            "fakelib/part/_deep/code.py": public,
            "fakelib/part/code.py": f'''
class Heap:
    """A heap of the largest items.

    {BODY}
    """
    def push(self):
        """Puts one more item in.

        {BODY}
        """
class _Private:
    """Is of no use from outside.

    {BODY}
    """
def later():
    """Comes after the heap.

    {BODY}
    """
''',
            "fakelib/tests/test_it.py": public,
            "fakelib/part/conftest.py": public,
            "fakelib/_vendor/six.py": public,
            "fakelib/_private/code.py": public,
        },
    )
    assert [row.id for row in harvest(["fakelib"])] == [
        "fakelib:largest",
        "fakelib._core.code:largest",
        "fakelib._impl:largest",
        "fakelib.part._deep.code:largest",
        "fakelib.part.code:Heap",
        "fakelib.part.code:later",
    ]
    assert "fakelib" not in sys.modules
    answer = Passage(BODY, "fakelib:largest")
    assert next(harvest(["fakelib"])) == Example(
        "fakelib:largest", "docs", "Gives the largest of all items.", positives=(answer,)
    )


def test_what_is_no_installed_package_is_refused(site: Path) -> None:
    write(site, {"lonely.py": ""})
    for name in ("no_such_library", "lonely"):
        with pytest.raises(ValueError, match=f"'{name}' is not an installed package"):
            list(harvest([name]))


# ---- one docstring


def test_markup_and_code_go_and_prose_stays() -> None:
    pair = split_docstring(
        dedent("""\
        peak(values, axis) -> Tensor

        Gives the :func:`~fakelib.part.maximum` of ``values``, e.g. Peaks. More of it here.

        .. versionadded:: 1.2
           Together with a friend.

        .. note:: It is slow on a `long list <the list>`_ of items [1]_, see https://example.org/x for why.

        Parameters
        ----------
        values : list
            The values to look through, `None` of them missing.

        See Also
        --------
        minimum : Gives the smallest of the values.

        Returns
        -------
        float
            The peak, as it was found in the values.

        Examples
        --------
        >>> peak([1, 2])
        2

        References
        ----------
        .. [1] Somebody, "Something", 1999.
        """)
    )
    assert pair == (
        "Gives the maximum of values, e.g. Peaks.",
        "More of it here. It is slow on a long list of items , see for why. Parameters values : list The values to look"
        " through, None of them missing.",
    )


@pytest.mark.parametrize("section", ["Args:", "    Returns:", ":param items: the items", "Parameters\n----------"])
def test_a_section_right_below_ends_the_summary(section: str) -> None:
    pair = split_docstring(f"Gives the largest of all items\n{section}\n    {BODY}")
    assert pair is not None and pair[0] == "Gives the largest of all items"


@pytest.mark.parametrize(
    "docstring",
    [
        f"Too short indeed.\n\n{BODY}",
        f"{'word ' * 41}\n\n{BODY}",
        "Gives the largest of all items.",
        f"Gives the largest of all items.\n\n{' '.join(BODY.split()[:14])}",
        f"Gives the largest of all items.\n\n{'1.0 ' * 40}",
        f"Goes over ALL the items.\n\nIt {BODY[3:]}",
        f"Gives the largest of all items.\n\n\ud800 {BODY}",
    ],
    ids=["short", "long", "alone", "14 words", "numbers", "in the body", "surrogate"],
)
def test_what_makes_no_good_pair_is_left_out(docstring: str) -> None:
    assert split_docstring(docstring) is None


# ---- build

PLACES = ["river", "harbour", "mountain", "valley", "desert", "forest"]


@pytest.fixture
def library(site: Path) -> str:
    """Two parts of 30 files with 3 functions each, no two alike."""
    files = {"fakelib/__init__.py": ""}
    for part in ("boats", "roads"):
        files[f"fakelib/{part}/__init__.py"] = ""
        for n in range(30):
            files[f"fakelib/{part}/m{n}.py"] = "".join(
                function(
                    f"f{i}",
                    f"Finds the {place} number {n} among {part}.",
                    " ".join(f"{part} fakelib.{part}.m{n} {place}{n}{k} at {k} in" for k in range(20)),
                )
                for i, place in enumerate(PLACES[n % 2 :: 2])
            )
    write(site, files)
    return "fakelib"


def build_small(out: Path, library: str, **changes: Any) -> Any:
    return build(out, packages=[library], **{"heldout_share": 0.3, "topic_min": 10, **changes})


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, library: str) -> None:
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        build_small(out, library)
    a, b = ({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in outs)
    assert a == b
    assert not list(tmp_path.glob(".*"))


def test_no_module_is_on_both_sides_and_rows_fit_their_readers(tmp_path: Path, library: str) -> None:
    report = build_small(tmp_path / "out", library, max_train=50, max_queries=20, topic_max=15)
    out = tmp_path / "out"
    heldout = out / "heldout"
    pairs = [parse_example(row, default_task="?") for row in rows(out / "train/pairs.jsonl")]
    held_corpus = rows(heldout / "retrieval/corpus.jsonl")
    modules = [
        {id.split(":")[0] for id in side} for side in ((p.id for p in pairs), (row["_id"] for row in held_corpus))
    ]
    assert modules[0].isdisjoint(modules[1]) and 8 < len(modules[1]) < 28
    assert all(len(row["text"].split()) <= 40 for row in held_corpus)
    assert len(pairs) == 50 and {pair.query.split()[-1] for pair in pairs} == {
        "boats.",
        "roads.",
    }  # no first files alone
    assert all(len(pair.positives[0].text.split()) <= 40 and pair.task == "docs" for pair in pairs)
    assert read_tasks(tasks_file(out / "train/pairs.jsonl")) == {"docs": docstrings.TASK}

    with (heldout / "retrieval/qrels/test.tsv").open() as file:
        qrels = list(csv.DictReader(file, delimiter="\t"))
    queries = {row["_id"] for row in rows(heldout / "retrieval/queries.jsonl")}
    assert {row["query-id"] for row in qrels} == queries and len(qrels) == 20
    assert {row["corpus-id"] for row in qrels} <= {row["_id"] for row in held_corpus}

    files = {name: len(rows(out / name)) for name in ("train/topics.jsonl", "heldout/topics-train.jsonl")}
    assert files == {"train/topics.jsonl": 2 * 15, "heldout/topics-train.jsonl": 2 * 12}
    assert json.loads((out / "report.json").read_text()) == report
    assert list(report.values()) == [180, 0, 0, 50, 2, len(held_corpus), 20]
    assert load_suite(heldout / "suite.yaml").name == "docstrings"


def test_topics_are_labelled_by_part_and_do_not_name_the_library(tmp_path: Path, library: str) -> None:
    build_small(tmp_path / "out", library)
    for name in ("train/topics.jsonl", "heldout/topics.jsonl", "heldout/topics-train.jsonl"):
        topics = rows(tmp_path / "out" / name)
        assert {row["label"] for row in topics} == {"fakelib.boats", "fakelib.roads"}
        assert not any("fakelib" in row["text"] for row in topics)
        assert all(row["label"].removeprefix("fakelib.") in row["text"] for row in topics)  # what it is about stays


def test_copies_leaks_and_shared_summaries_are_left_out_and_counted(site: Path, tmp_path: Path, library: str) -> None:
    clean = build_small(tmp_path / "clean", library)
    held = rows(tmp_path / "clean/heldout/retrieval/queries.jsonl")[0]["text"]
    bodies = [row["text"] for row in rows(tmp_path / "clean/heldout/retrieval/corpus.jsonl")]
    train = rows(tmp_path / "clean/train/pairs.jsonl")
    module = train[0]["id"].split(":")[0]
    own = [f"{a}{b} is what" for a in PLACES for b in PLACES]
    extra = [
        function("body_leak", "Says it in some other words.", bodies[0]),
        function("near_leak", "Says nearly that with one change.", bodies[1].rsplit(" ", 1)[0] + " change"),
        function("summary_leak", held.upper(), " ".join(own)),
        function("body_copy", "Says what a neighbour says already.", train[1]["positives"][0]["text"]),
        function("same_summary", train[2]["query"], " ".join(reversed(own))),
    ]
    path = site / Path(*module.split(".")).with_suffix(".py")
    path.write_text(path.read_text() + "".join(extra))

    report = build_small(tmp_path / "out", library)

    _, copies, leaked, *_ = (after - before for after, before in zip(report.values(), clean.values(), strict=True))
    assert (copies, leaked) == (1, 3)
    ids = {row["id"].split(":")[1] for row in rows(tmp_path / "out/train/pairs.jsonl")}
    assert ids.isdisjoint({"body_leak", "near_leak", "summary_leak", "body_copy", "same_summary"})
    queries = {row["query"] for row in rows(tmp_path / "out/train/pairs.jsonl")}
    assert train[2]["query"] not in queries


def test_a_folder_in_use_and_too_little_are_refused(tmp_path: Path, library: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError):
        build_small(tmp_path / "used", library)
    with pytest.raises(ValueError, match="0 topics"):
        build_small(tmp_path / "out", library, topic_min=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "used"]


def test_networkx_as_installed(tmp_path: Path) -> None:
    pytest.importorskip("networkx")
    report = build(tmp_path / "out", packages=["networkx"], heldout_share=0.15, topic_min=20)
    out = tmp_path / "out"
    assert report["docstrings"] > 700
    labels = {row["label"] for row in rows(out / "heldout/topics.jsonl")}
    assert {"networkx.algorithms", "networkx.generators"} <= labels
    pairs, queries = rows(out / "train/pairs.jsonl"), rows(out / "heldout/retrieval/queries.jsonl")
    assert len(pairs) > 500 and len(queries) > 50
    for pair in pairs:
        text = pair["positives"][0]["text"]
        assert near_key(pair["query"]) not in near_key(text)
        assert ">>>" not in text and ":func:" not in text
    bodies = [pair["positives"][0]["text"] for pair in pairs]
    held_bodies = [row["text"] for row in rows(out / "heldout/retrieval/corpus.jsonl")]
    assert not any(DuplicateIndex(held_bodies).find(bodies))
    assert not any(DuplicateIndex(row["text"] for row in queries).find(pair["query"] for pair in pairs))
