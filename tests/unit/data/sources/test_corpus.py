"""The corpus that `data build` keeps for mining: what is in it, under which ids, and what a share takes of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from stand_ins import beir, repository, write

from embedwright.data.files.beir import read_corpus
from embedwright.data.schema import DataError, Example
from embedwright.data.sources import catalog
from embedwright.data.sources import corpus as corpus_module
from embedwright.data.sources.build import build
from embedwright.data.sources.catalog import load_catalog
from embedwright.data.tables.documents import open_corpus
from embedwright.data.tables.table import open_as_named, open_examples
from embedwright.errors import InputError
from embedwright.mining.mine import mine


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))


def built(name: str, source: Path, **options: Any) -> tuple[list[Example], dict[str, str], dict[str, int]]:
    out, corpus = source.parent / "out.parquet", source.parent / "corpus.parquet"
    counts = build(load_catalog()[name], out, source=source, corpus_out=corpus, **options)
    return list(open_examples(out)), read_corpus(corpus), counts


def test_a_set_with_a_corpus_gives_all_of_it_whatever_is_drawn(tmp_path: Path) -> None:
    examples, corpus, counts = built("scifact", beir(tmp_path / "set"), limit=2)
    assert corpus == {f"d{i}": f"Title {i} body" for i in range(9)} and counts["corpus"] == 9
    assert len(examples) == 2
    for example in examples:
        assert [corpus[str(p.id)] for p in example.positives] == [p.text for p in example.positives]


def test_pages_have_the_ids_of_the_claims_evidence(tmp_path: Path) -> None:
    claims = [{"uid": "u", "claim": "c", "supporting_facts": [{"key": "P1", "value": 0}]}]
    pages = [{"_id": f"{i}7", "title": f"P{i}", "text": f"page {i}"} for i in range(4)]
    source = repository(tmp_path / "set", default=("train", claims), corpus=("corpus", pages))
    (example,), corpus, _ = built("hover", source)
    assert corpus == {f"{i}7": f"P{i} page {i}" for i in range(4)}
    assert [(p.id, p.text) for p in example.positives] == [("17", "P1 page 1")]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        (
            "nq",
            [{"query": f"q{i}", "answer": answer} for i, answer in enumerate(["a", "b", "A ", "c"])] + [{"query": "x"}],
            {"nq:1": "a", "nq:2": "b", "nq:4": "c"},
        ),
        (
            "squad",
            [{"id": f"s{i}", "question": f"q{i}", "context": f"text {i // 2}"} for i in range(4)],
            {"s0": "text 0", "s2": "text 1"},
        ),
        (
            "miracl",
            [{"anchor": "q", "positive": "p", "negative": "n"}, {"anchor": "q", "positive": "n", "negative": "m"}],
            {"miracl:1": "p", "miracl:1#2": "n", "miracl:2": "m"},
        ),
        (
            "nli",
            [{"premise": "p", "hypothesis": f"h{i}", "label": label} for i, label in enumerate([0, 1, -1])],
            {"nli:1": "h0", "nli:2": "h1", "nli:3": "h2"},
        ),
        (
            "stsb",
            [{"sentence1": "a", "sentence2": "b", "score": 5.0}, {"sentence1": "b", "sentence2": "c", "score": 0.0}],
            {"stsb:1": "a", "stsb:1#2": "b", "stsb:2": "c"},
        ),
    ],
)
def test_other_sets_give_each_passage_of_all_rows_once(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], expected: dict[str, str]
) -> None:
    _, corpus, counts = built(name, write(tmp_path / "in.jsonl", rows))
    assert corpus == expected and counts["corpus"] == len(expected)
    assert built(name, write(tmp_path / "in.jsonl", rows), limit=1)[1] == expected


def test_one_id_for_several_texts_becomes_several_ids(tmp_path: Path) -> None:
    entry = load_catalog()["nq"]
    entry = entry.model_copy(update={"rows": entry.rows.model_copy(update={"positive_id": "doc"})})
    rows = [{"query": f"q{i}", "answer": f"part {i}", "doc": doc} for i, doc in enumerate(["d", "d", "d#2", "D"])]
    corpus = tmp_path / "corpus.jsonl"
    build(entry, tmp_path / "out.jsonl", source=write(tmp_path / "in.jsonl", rows), corpus_out=corpus)
    assert read_corpus(corpus) == {"d": "part 0", "d#2": "part 1", "d#2#2": "part 2", "D": "part 3"}


def test_mining_searches_the_corpus_and_knows_the_answers_in_it(tmp_path: Path) -> None:
    examples, corpus, _ = built("scifact", beir(tmp_path / "set"), limit=2)
    mined, _ = mine(examples, corpus, "random", rule="naive", negatives=8, depth=9)
    for example in mined:
        ids = [p.id for p in example.negatives]
        assert set(map(str, ids)) == corpus.keys() - {example.positives[0].id}


def test_a_share_draws_rows_and_documents_and_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "FEWEST", 50)
    monkeypatch.setattr(corpus_module, "FIRST", 100)
    judged = [{"query-id": f"q{i}", "corpus-id": f"d{2 * i}", "score": 1.0} for i in range(240)]
    source = repository(
        tmp_path / "set",
        default=("train", judged),
        queries=("queries", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(240)]),
        corpus=("corpus", [{"_id": f"d{i}", "title": "", "text": f"body {i}"} for i in range(1000)]),
    )
    examples, corpus, counts = built("fiqa", source, share=0.04)  # of 5,000 samples
    assert len(examples) == 200 and counts["not_drawn"] == 40
    answers = {str(p.id) for example in examples for p in example.positives}
    first = {f"d{i}" for i in range(100)}
    assert answers | first <= corpus.keys()
    others = corpus.keys() - answers - first
    assert 8 < len(others) < 56  # 4 % of some 750: 30 +- 4 standard deviations
    assert built("fiqa", source, share=0.04)[:2] == (examples, corpus)
    assert built("fiqa", source, share=0.04, seed=1)[1] != corpus
    assert len(built("fiqa", source, share=0.001)[0]) == 50
    assert len(built("fiqa", source, share=1)[1]) == 1000


def test_how_many_rows_a_share_is() -> None:
    sets = load_catalog()
    assert sets["msmarco"].drawn(1) == 500_000 and sets["msmarco"].drawn(0.1) == 50_000
    assert sets["sts22"].drawn(0.5) == 300 == sets["sts22"].samples  # fewer than FEWEST
    assert sets["sts22"].drawn(1) is None
    for share in (0, 1.5, -1, float("nan")):
        with pytest.raises(InputError, match="is not above 0"):
            sets["nq"].drawn(share)
    with pytest.raises(InputError, match="nq: its number of samples is not known: give a limit"):
        sets["nq"].model_copy(update={"samples": None}).drawn(0.5)


def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "t", "label": 1}])
    with pytest.raises(DataError, match="imdb: its rows have labels"):
        build(load_catalog()["imdb"], tmp_path / "o.jsonl", source=source, corpus_out=tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="both given"):
        build(load_catalog()["imdb"], tmp_path / "o.jsonl", source=source, share=0.5, limit=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_no_examples_without_their_corpus(tmp_path: Path) -> None:
    """A corpus that cannot be written leaves no file of examples either: what is there is complete."""
    source = beir(tmp_path / "set")
    write(source / "corpus" / "corpus" / "0001.parquet", [{"_id": "d9", "title": "no text", "text": None}])
    with pytest.raises(DataError, match=r"corpus, row 10: no text"):
        build(load_catalog()["scifact"], tmp_path / "out.jsonl", source=source, corpus_out=tmp_path / "c.jsonl")
    assert not {"out.jsonl", "c.jsonl"} & {path.name for path in tmp_path.iterdir()}


def test_the_sample_of_nli_is_of_premises_with_all_their_hypotheses(tmp_path: Path) -> None:
    rows = [
        {"premise": f"p{i}", "hypothesis": f"{label} of {i}", "label": label}
        for label in (0, 1, 2)
        for i in range(50)
        if label or i % 2
    ]
    examples, _, counts = built("nli", write(tmp_path / "in.jsonl", rows), limit=10)
    assert counts["not_drawn"] == 15 and len(examples) == 10
    for example in examples:
        number = example.query[1:]
        assert [p.text for p in example.positives] == [f"0 of {number}"]
        assert [p.text for p in example.negatives] == [f"1 of {number}", f"2 of {number}"]
    drawn = Counter(
        example.query for seed in range(20) for example in built("nli", tmp_path / "in.jsonl", limit=10, seed=seed)[0]
    )
    assert len(drawn) == 25  # each comes up


def test_jsonl_and_parquet_hold_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"query": "q", "answer": f"ä {i}"} for i in range(3)])
    found = []
    for name in ("c.jsonl", "c.jsonl.gz", "c.parquet"):
        build(load_catalog()["nq"], tmp_path / "o.jsonl", source=source, corpus_out=tmp_path / name)
        found.append(read_corpus(tmp_path / name))
    assert found[0] == found[1] == found[2] == {f"nq:{i + 1}": f"ä {i}" for i in range(3)}
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0]) == {"_id": "nq:1", "text": "ä 0"}


def test_an_arrow_corpus_is_mined_without_a_copy(tmp_path: Path) -> None:
    corpus, source = tmp_path / "corpus.arrow", beir(tmp_path / "set")
    counts = build(load_catalog()["scifact"], tmp_path / "out.parquet", source=source, corpus_out=corpus)
    assert counts["corpus"] == 9
    examples = open_as_named(tmp_path / "out.parquet")
    mined, _ = mine(examples, open_corpus(corpus), "random", rule="naive", negatives=2)
    assert {n.text for row in mined for n in row.negatives} <= set(read_corpus(corpus).values())
    assert not (tmp_path / "cache").exists()
