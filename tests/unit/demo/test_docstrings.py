"""Harvesting and building from packages made on the spot, and from networkx as it is installed."""

from __future__ import annotations

import csv
import importlib
import json
import logging
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from embedwright.data.clean.repeats import leaks
from embedwright.data.keys import near_key
from embedwright.data.schema import parse_example
from embedwright.demo.docstrings import Docstring, build, harvest, split_docstring

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
    def _sift(self):
        """Moves the item further down.

        {BODY}
        """
try:
    import absent
except ImportError:
    def fallback():
        """Does without the absent module.

        {BODY}
        """
if fast:
    def either():
        """Is there on fast machines.

        {BODY}
        """
else:
    def either():
        """Is there on slow machines.

        {BODY}
        """
    def slow():
        """Is there on slow machines alone.

        {BODY}
        """
def outer():
    def inner():
        """Is of no use from outside.

        {BODY}
        """
''',
            "fakelib/tests/test_it.py": public,
            "fakelib/part/conftest.py": public,
            "fakelib/_vendor/six.py": public,
            "fakelib/_private/code.py": public,
        },
    )
    assert [doc.id for doc in harvest(["fakelib"])] == [
        "fakelib:largest",
        "fakelib._core.code:largest",
        "fakelib._impl:largest",
        "fakelib.part._deep.code:largest",
        "fakelib.part.code:Heap",
        "fakelib.part.code:Heap.push",
        "fakelib.part.code:fallback",
        "fakelib.part.code:either",
        "fakelib.part.code:slow",
    ]
    assert "fakelib" not in sys.modules
    assert next(harvest(["fakelib"])) == Docstring(
        "fakelib", "fakelib", "largest", "Gives the largest of all items.", BODY
    )


def test_a_file_that_does_not_parse_is_named_and_passed_over(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(
        site,
        {
            "fakelib/__init__.py": "",
            "fakelib/a.py": "def {{ name }}",
            "fakelib/b.py": function("f", "One two three four."),
        },
    )
    with caplog.at_level(logging.WARNING):
        assert [doc.module for doc in harvest(["fakelib"])] == ["fakelib.b"]
    assert "a.py" in caplog.text


def test_what_is_no_installed_package_is_refused(site: Path) -> None:
    write(site, {"lonely.py": ""})
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        list(harvest(["no_such_library"]))
    with pytest.raises(ValueError, match="single module"):
        list(harvest(["lonely"]))
    with pytest.raises(ValueError, match="top-level"):
        list(harvest(["os.path"]))


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
        " through, None of them missing. Returns float The peak, as it was found in the values.",
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
        f"items (list of str, *optional*): What to look through.\n\n{BODY}",
        f"Gives the largest of all items.\n\n\ud800 {BODY}",
    ],
    ids=["short", "long", "alone", "14 words", "numbers", "in the body", "argument", "surrogate"],
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
    return build(out, packages=[library], **{"heldout_share": 0.3, "labels_min": 10, **changes})


def test_the_same_inputs_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path, library: str) -> None:
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        build_small(out, library, seed=seed)
    a, b, c = ({str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in outs)
    assert a == b
    assert a.keys() == c.keys() and a["train/pairs.jsonl"] != c["train/pairs.jsonl"]
    assert not list(tmp_path.glob(".*"))


def test_no_module_is_on_both_sides_and_rows_fit_their_readers(tmp_path: Path, library: str) -> None:
    report = build_small(tmp_path / "out", library, max_train=50, max_eval_queries=20, max_body_words=12, labels_max=15)
    out = tmp_path / "out"
    heldout = out / "heldout"
    corpus, held_corpus = rows(out / "corpus.jsonl"), rows(heldout / "retrieval/corpus.jsonl")
    modules = [{row["_id"].split(":")[0] for row in side} for side in (corpus, held_corpus)]
    assert modules[0].isdisjoint(modules[1])
    assert len(modules[0]) + len(modules[1]) == 60 and 8 < len(modules[1]) < 28
    assert all(len(row["text"].split()) <= 12 for row in corpus + held_corpus)

    pairs = [parse_example(row, default_task="?") for row in rows(out / "train/pairs.jsonl")]
    texts = {row["_id"]: row["text"] for row in corpus}
    assert len(pairs) == 50 and {pair.query.split()[-1] for pair in pairs} == {
        "boats.",
        "roads.",
    }  # no first files alone
    assert all(texts[pair.id] == pair.positives[0].text and pair.task == "docs" for pair in pairs)

    with (heldout / "retrieval/qrels/test.tsv").open() as file:
        qrels = list(csv.DictReader(file, delimiter="\t"))
    queries = {row["_id"] for row in rows(heldout / "retrieval/queries.jsonl")}
    assert {row["query-id"] for row in qrels} == queries and len(qrels) == 20
    assert {row["corpus-id"] for row in qrels} <= {row["_id"] for row in held_corpus}

    files = {name: len(rows(out / name)) for name in report.written}
    assert files == report.written
    assert files["train/topics.jsonl"] == 2 * 15 and files["heldout/topics-train.jsonl"] == 2 * 10
    assert json.loads((out / "report.json").read_text())["written"] == files


def test_topics_are_labelled_by_part_and_do_not_name_the_library(tmp_path: Path, library: str) -> None:
    report = build_small(tmp_path / "out", library)
    assert list(report.topics) == ["fakelib.boats", "fakelib.roads"]
    for name in (
        "train/topics.jsonl",
        "heldout/topics.jsonl",
        "heldout/topics-train.jsonl",
        "heldout/topics-test.jsonl",
    ):
        topics = rows(tmp_path / "out" / name)
        assert {row["label"] for row in topics} == set(report.topics)
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

    assert (report.exact_leaks - clean.exact_leaks, report.near_leaks - clean.near_leaks) == (2, 1)
    assert report.exact_duplicates - clean.exact_duplicates == 1
    assert report.shared_summaries - clean.shared_summaries == 2  # neither of the two is asked, both are documents
    ids = {row["_id"].split(":")[1] for row in rows(tmp_path / "out/corpus.jsonl")}
    assert ids.isdisjoint({"body_leak", "near_leak", "summary_leak", "body_copy"}) and "same_summary" in ids
    queries = {row["query"] for row in rows(tmp_path / "out/train/pairs.jsonl")}
    assert train[2]["query"] not in queries


def test_a_folder_in_use_a_wrong_share_and_too_little_are_refused(tmp_path: Path, library: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError):
        build_small(tmp_path / "used", library)
    with pytest.raises(ValueError, match="heldout_share"):
        build_small(tmp_path / "out", library, heldout_share=1.0)
    with pytest.raises(ValueError, match="0 topics"):
        build_small(tmp_path / "out", library, labels_min=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "used"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="disk full"):
            build_small(tmp_path / "out", library)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_networkx_as_installed(tmp_path: Path) -> None:
    pytest.importorskip("networkx")
    report = build(tmp_path / "out", packages=["networkx"], heldout_share=0.15, labels_min=20)
    out = tmp_path / "out"
    assert report.harvested["networkx"] > 800
    assert {"networkx.algorithms", "networkx.generators"} <= report.topics.keys()
    pairs, queries = rows(out / "train/pairs.jsonl"), rows(out / "heldout/retrieval/queries.jsonl")
    assert len(pairs) > 500 and len(queries) > 50
    for pair in pairs:
        text = pair["positives"][0]["text"]
        assert near_key(pair["query"]) not in near_key(text)
        assert ">>>" not in text and ":func:" not in text
    bodies = [pair["positives"][0]["text"] for pair in pairs]
    held_bodies = [row["text"] for row in rows(out / "heldout/retrieval/corpus.jsonl")]
    assert leaks(bodies, held_bodies)[0] == []
    assert leaks([pair["query"] for pair in pairs], [row["text"] for row in queries])[0] == []
