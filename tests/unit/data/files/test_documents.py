"""Documents as users have them: rows, lines, pages, a BEIR folder; and lines that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedwright.data.answers import ids_of
from embedwright.data.files.documents import Document, columns_of, read_documents
from embedwright.data.schema import DataError, Passage
from embedwright.errors import InputError, NotFoundError


def read(path: Path, *columns: str) -> tuple[list[Document], list[str]]:
    bad: list[str] = []
    found = read_documents(path, columns_of(list(columns)), lambda n, raw, e, file: bad.append(f"{file.name}:{n}: {e}"))
    return list(found), bad


def test_rows_give_text_title_id_labels_and_source(tmp_path: Path) -> None:
    rows = [
        {"_id": 7, "title": "A  title ", "text": " one\n\ntwo ", "tags": ["x", "y"], "source": "s", "other": 1},
        {"id": "b", "text": "only text", "title": "", "label": 3},
        {"text": "no id"},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist([{"text": "only text", "title": None}]), tmp_path / "p.parquet")
    expected = [
        Document("7", "one\n\ntwo", "A title", ("x", "y"), "s"),
        Document("b", "only text", "", ("3",)),
        Document("d:3", "no id"),
    ]
    assert read(tmp_path / "d.jsonl") == (expected, [])
    assert read(tmp_path / "p.parquet") == ([Document("p:1", "only text")], [])


def test_what_is_blank_is_absent_and_a_label_that_names_no_class_costs_the_document_nothing_else(
    tmp_path: Path,
) -> None:
    blank = ({"source": ""}, {"tags": ""}, {"tags": ["", None]}, {"title": " "}, {"title": "\u200b"}, {"id": ""}, {})
    rows = [*blank, {"label": 3.5}, {"tags": ["x", 3.5]}, {"_id": " ", "id": "own"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row | {"text": "one"}) + "\n" for row in rows))
    documents, bad = read(tmp_path / "d.jsonl")
    assert documents[: len(blank)] == [Document(f"d:{i + 1}", "one") for i in range(len(blank))]
    assert documents[len(blank) :] == [
        *(Document(f"d:{i}", "one", bad_label=True) for i in (8, 9)),
        Document("own", "one"),
    ]
    assert not bad


@pytest.mark.parametrize(
    ("heading", "title"),
    [("# C#", "C#"), ("# C# #", "C#"), ("# Its title ##  ", "Its title"), ("# A ## B", "A ## B"), ("# #", "")],
)
def test_only_marks_after_a_space_close_a_heading(tmp_path: Path, heading: str, title: str) -> None:
    (tmp_path / "a.md").write_text(f"{heading}\n\nIts text.\n")
    assert read(tmp_path) == ([Document("a.md", "Its text.", title)], [])


def test_a_heading_of_many_spaces_is_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# a" + " " * 20_000 + "# " * 20_000 + "x\nIts text.\n")
    assert read(tmp_path)[0][0].text == "Its text."


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "one", "package": null}\n')
    assert read(tmp_path / "d.jsonl", "source=package")[0]
    with pytest.raises(InputError, match=r"d\.jsonl: no row has a column 'packge' \(--column source=packge\)"):
        read(tmp_path / "d.jsonl", "source=packge")


def test_links_are_ids_and_titles(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "one", "see_also": ["b", 7, {"url": "x"}, None]},
        {"id": "b", "text": "two", "links": "Title of c"},
        {"id": "c", "text": "three", "links": {"not": "a list"}},
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, bad = read(tmp_path / "d.jsonl")
    assert [document.links for document in documents] == [("b", "7"), ("Title of c",), ()] and not bad
    documents, _ = read(tmp_path / "d.jsonl", "links=id")
    assert [document.links for document in documents] == [("a",), ("b",), ("c",)]


def test_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"query": "short", "positive": "long", "package": 5, "text": "not read"}\n')
    named = ("title=query", "text=positive", "source=package")
    assert read(tmp_path / "d.jsonl", *named)[0] == [Document("d:1", "long", "short", (), "5")]
    with pytest.raises(InputError, match=r"'titel=x'.*text, title, id, label, source, links.*did you mean 'title'"):
        columns_of(["titel=x"])
    with pytest.raises(InputError, match="PART=COLUMN"):
        columns_of(["title"])


def test_a_text_file_has_a_document_a_line(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"one\n\n \nfour\nb\xff\n")
    assert read(tmp_path / "d.txt") == (
        [Document("d:1", "one"), Document("d:4", "four")],
        ["d.txt:5: not UTF-8 at byte 1"],
    )


def test_a_folder_of_pages_has_a_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b.md").write_text("# Its title #\n\nIts text.\n")
    (tmp_path / "sub" / "a.txt").write_text("Line one.\nLine two.\n")
    (tmp_path / "sub" / "c.md").write_text("## not a title\n")
    (tmp_path / "empty.md").write_text("\n")
    (tmp_path / "code.py").write_text("not read")
    documents, bad = read(tmp_path)
    assert documents == [
        Document("b.md", "Its text.", "Its title"),
        Document("sub/a.txt", "Line one.\nLine two."),
        Document("sub/c.md", "## not a title"),
    ]
    assert bad == ["empty.md:1: text is empty"]
    assert read(tmp_path / "b.md")[0] == documents[:1]


@pytest.mark.parametrize("data", ["links.csv", "package.json", "pairs.jsonl"])
def test_pages_and_rows_in_one_folder_are_refused(tmp_path: Path, data: str) -> None:
    (tmp_path / data).write_text("text\none\n")
    (tmp_path / "README.md").write_text("what goes with rows\n")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.md").write_text("A page.\n")
    with pytest.raises(DataError, match=rf"pages \(pages/a\.md\) and rows \({data}\): name"):
        read(tmp_path)
    (tmp_path / data).unlink()
    assert len(read(tmp_path)[0]) == 2


def test_a_beir_folder_gives_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a question"}\n')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "title": "T", "text": "body", "metadata": {}}\n')
    assert read(tmp_path)[0] == [Document("d", "body", "T")]


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        '{"id": "a", "text": "good"}',
        "{",
        '{"title": "t"}',
        '{"text": "\\u200b"}',
        '{"id": "a", "text": "again"}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    documents, bad = read(tmp_path / "d.jsonl")
    assert [document.id for document in documents] == ["a"]
    assert [line.split(": ", 1)[0] for line in bad] == ["d.jsonl:2", "d.jsonl:3", "d.jsonl:4", "d.jsonl:5"]
    assert [line.split(": ", 1)[1] for line in bad[1:]] == [
        "no text; the row has title (--column text=NAME)",
        "text is empty",
        "id 'a' twice",
    ]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="a folder without data"):
        read(tmp_path)


def test_passages_of_one_source_share_a_name_and_keep_that_of_their_document() -> None:
    alone, a, b = Document("1", "x"), Document("2", "x", source="s"), Document("3", "x", "t", source="s")
    assert alone.passage("y") == Passage("y", "1")
    assert (ids_of(a.passage("y")), ids_of(b.passage("z"))) == (["source s", "2"], ["source s", "3"])
    assert (alone.whole, b.whole) == ("x", "t x")
