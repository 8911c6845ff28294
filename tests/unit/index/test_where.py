from __future__ import annotations

import itertools
import json
import operator
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_index import Rounded

from embedwright.index.build import build_index
from embedwright.index.index import Index

LANGS, YEARS, RATES, DRAFTS = ["en", "de", None, "fr"], [2019, 2020, 2021, None], [0.5, 2, None], [True, False, None]
HOW = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def rows() -> list[dict[str, Any]]:
    found = []
    for i, (lang, year, rate, draft) in enumerate(itertools.product(LANGS, YEARS, RATES, DRAFTS)):
        given = {"lang": lang, "year": year, "rate": rate, "draft": draft, "tags": ["x"]}
        meta = {key: value for key, value in given.items() if value is not None}
        found.append({"_id": f"d{i}", "text": f"text {i}", **meta})
    return found


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    at = tmp_path_factory.mktemp("where")
    (at / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return Index.open(build_index(Rounded(), at / "c.jsonl", at / "index", metadata=["all"], shard_rows=50))


def holds(row: dict[str, Any], condition: str) -> bool:
    column, how, text = condition.split(" ")
    if (value := row.get(column)) is None:
        return False
    read = {"lang": str, "year": float, "rate": float, "draft": {"true": True, "false": False}.get}[column]
    if how == "in":
        return value in [read(part) for part in text.split(",")]
    return bool(HOW[how](value, read(text)))


SINGLE = [
    *(f"lang {how} {value}" for how in HOW for value in ("en", "de", "es")),
    *(f"year {how} {value}" for how in HOW for value in ("2020", "2021.0")),
    *(f"rate {how} {value}" for how in HOW for value in ("2", "0.5")),
    *(f"draft {how} {value}" for how in ("=", "!=") for value in ("true", "false")),
    *("lang in en,fr", "year in 2019,2021", "rate in 0.5", "draft in true,false"),
]


def test_filters_are_those_of_a_loop_and_the_search_behind_them_is_exact(index: Index) -> None:
    everything = rows()
    vectors, query = Rounded().encode([row["text"] for row in everything]), Rounded().encode(["q"], "")
    order = np.argsort(-(vectors @ query[0]), kind="stable").tolist()
    pairs = random.Random(0).sample(list(map(list, itertools.combinations(SINGLE, 2))), 60)
    for where in [[], *([one] for one in SINGLE), *pairs]:
        expected = [row["_id"] for row in map(everything.__getitem__, order) if all(holds(row, c) for c in where)]
        (hits,) = index.search_vectors(query, 7, where)
        assert [hit.id for hit in hits] == expected[:7], where
    (hits,) = index.search_vectors(query, 999, ["lang=en"])
    assert len(hits) == sum(row.get("lang") == "en" for row in everything)


def test_a_mapping_says_the_same(index: Index) -> None:
    query = Rounded().encode(["q"], "")
    for mapping, texts in (
        ({"lang": "en", "year": 2020}, ["lang=en", "year==2020"]),
        ({"lang": ["en", "fr"], "draft": True}, [" lang in en, fr ", "draft=true"]),
    ):
        hits = index.search_vectors(query, 99, mapping)
        assert hits == index.search_vectors(query, 99, texts) and hits[0]
    assert index.search_vectors(query, 99, {"lang": []}) == [[]]
    assert index.search_vectors(query, 99, ["rate<1e999"]) == index.search_vectors(query, 99, ["rate>=0"])
    metadata = hits[0][0].metadata
    assert metadata.keys() == {"lang", "year", "rate", "draft"} and metadata["draft"] is True


def parts(column: str, operator: str, value: Any) -> dict[str, Any]:
    return {"column": column, "operator": operator, "value": value}


def test_conditions_in_parts_say_what_texts_say(index: Index) -> None:
    query = Rounded().encode(["q"], "")
    for text in SINGLE:
        column, how, value = text.split(" ")
        given = value.split(",") if how == "in" else value
        expected = index.search_vectors(query, 99, [text, "rate<=2"])
        assert index.search_vectors(query, 99, [parts(column, how, given), "rate<=2"]) == expected, text
    numbers = [parts("year", ">=", 2020.0), parts("draft", "=", True), parts("rate", "in", (0.5, 2))]
    assert index.search_vectors(query, 99, numbers) == index.search_vectors(
        query, 99, ["year>=2020", "draft=true", "rate in 0.5,2"]
    )


def test_a_value_in_parts_is_taken_as_it_is(tmp_path: Path) -> None:
    langs = ["en", "en,de", " en", "en ", "", "a=b", "in", '"', "[1]"]
    rows = [{"_id": f"of {lang}", "text": f"text {lang}", "lang": lang} for lang in langs]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Index.open(build_index(Rounded(), tmp_path / "c.jsonl", tmp_path / "i", metadata=["lang"]))
    for lang in langs:
        for condition in (parts("lang", "=", lang), parts("lang", "in", [lang, "nowhere"])):
            (hits,) = index.search_vectors(Rounded().encode(["q"], ""), 9, [condition])
            assert [hit.id for hit in hits] == [f"of {lang}"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["langs=en"], "no metadata column 'langs'.*did you mean 'lang'"),
        (["tags=x"], "no metadata column 'tags'"),
        (["year=late"], "year holds int, not 'late'"),
        (["draft=ture"], "did you mean 'true'"),
        (["draft<true"], "take = or !="),
        (["lang"], "expected a column"),
        ([" " * 1_000_000], "expected a column"),  # in one pass: a cubic search would never end
        (["rate>" + "9" * 400], "does not fit into 64 bits"),
        (["lang=\ud800"], "half a character"),
        (["lang in en,\ud800"], "half a character"),
        (["year>2020.5"], "holds whole numbers, not 2020.5"),
        (["year<99999999999999999999"], "does not fit into 64 bits"),
        (["year=nan"], "whole numbers, not nan"),
        (["year=-inf"], "whole numbers"),
        ({"year": "2020x"}, "year holds int"),
        ({"lang": 3}, "lang holds text, not '3'"),
        ({"year": True}, "year holds int"),
        ({"rate": 2**70}, "does not fit into 64 bits"),
        ({"year": 1e30}, "does not fit into 64 bits"),
        (["rate=nan"], "nan equals no number"),
        ("lang=en", "give a list"),
        ([3], "expected a text, or a mapping of column, operator and value"),
        ([{"column": "lang", "value": "en"}], "expected a text, or a mapping of column, operator and value"),
        ([parts("lang", "~", "en")], "operator '~': =, !="),
        ([parts("lang", "in", "en")], "`in` takes a list"),
        ([parts("lang", "=", ["en"])], "`in` takes a list"),
        ([parts("langs", "=", "en")], "did you mean 'lang'"),
        ([parts("year", "in", [2020, None])], "year holds int, not 'None'"),
    ],
)
def test_bad_conditions_are_named(index: Index, where: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index.search_vectors(Rounded().encode(["q"], ""), 3, where)


def test_a_column_is_found_whatever_its_name_holds(tmp_path: Path) -> None:
    names = ["year", "year of print", "published in year", "a=b", "a", "is < 3", "in", "größer >= als"]
    rows = [
        {"_id": f"d{i}", "text": f"text {i}"} | {name: (i + at) % 5 for at, name in enumerate(names)} for i in range(9)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = Index.open(build_index(Rounded(), tmp_path / "c.jsonl", tmp_path / "i", metadata=names))
    for name in names:
        for how, text in (("=", "3"), (" = ", "3"), (">=", "2"), (" in ", "1,3")):
            (hits,) = index.search_vectors(Rounded().encode(["q"], ""), 9, [f" {name}{how}{text} "])
            wanted = {"=": {3}, ">=": {2, 3, 4}, "in": {1, 3}}[how.strip()]
            assert {hit.id for hit in hits} == {row["_id"] for row in rows if row[name] in wanted}, (name, how)
    for unknown in ("ye" + "a" * 10**6 + "=3", "published on year=3", "yearly=3"):
        with pytest.raises(ValueError, match="no metadata column") as found:
            index.search_vectors(Rounded().encode(["q"], ""), 9, [unknown])
        assert len(str(found.value)) < 300


def test_a_text_that_no_document_has_is_warned_of(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    assert index.search_vectors(Rounded().encode(["q"], ""), 3, ["lang=enn"]) == [[]]
    assert not caplog.text  # what a server calls: filters are private there
    assert index.search(Rounded(), ["q"], 3, "", ["lang=enn", "year>2000"]) == [[]]
    assert "no document has lang enn (did you mean 'en'?)" in caplog.text
    caplog.clear()
    assert index.search(Rounded(), ["q"], 3, "", ["lang in en,enn", "year<0"]) == [[]]
    assert not caplog.text
