"""What is ranked for each query, and how: against plain loops and against bm25s and pytrec_eval used by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import pytrec_eval
from suite_files import Looked, Words, one_task, write_beir, write_rows, write_set

from embedwright.evaluation.metrics import Scored
from embedwright.evaluation.ranking import score
from embedwright.evaluation.suite import evaluate
from embedwright.evaluation.tasks import SuiteTask
from embedwright.model.embedder import Embedder
from embedwright.text import Contract

WORDS = [
    "moon",
    "tide",
    "sea",
    "sun",
    "gravity",
    "dog",
    "fox",
    "lazy",
    "quick",
    "brown",
    "jump",
    "over",
    "river",
    "bank",
    "stone",
]


def sentence(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """Thirty documents of 4 to 60 words, twelve queries, one or two relevant documents each."""
    corpus = {f"d{i}": f"{sentence(i, 4 + i * 2)} d{i}" for i in range(30)}
    queries = {f"q{i}": sentence(100 + i, 3) for i in range(12)}
    qrels = {f"q{i}": {f"d{(i * 7) % 30}": 1, f"d{(i * 11 + 3) % 30}": 1} for i in range(12)}
    return write_set(tmp_path / "beir", queries, corpus, qrels)


def texts_of(folder: Path, name: str) -> dict[str, str]:
    rows = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    return {row["_id"]: row["text"] for row in rows}


def qrels_of(folder: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, doc, value = line.split("\t")
        qrels.setdefault(query, {})[doc] = int(value)
    return qrels


def by_trec(folder: Path, run: dict[str, dict[str, float]]) -> dict[str, float]:
    found = pytrec_eval.RelevanceEvaluator(qrels_of(folder), {"ndcg_cut.10", "map_cut.1000"}).evaluate(run)
    names = {"nDCG@10": "ndcg_cut_10", "MAP@1000": "map_cut_1000"}
    return {name: float(np.mean([found[query][measure] for query in run])) for name, measure in names.items()}


def scored(encoder: Any, path: Path, kind: Any = "retrieval", **keys: Any) -> Scored:
    return score(encoder, SuiteTask(name="x", kind=kind, path=path, **keys))


# ---- long documents


def test_by_chunks_a_document_scores_as_its_best_chunk(beir: Path, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    queries, corpus = texts_of(beir, "queries"), texts_of(beir, "corpus")

    def chunks(text: str) -> list[str]:
        spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        starts = [spans[place][0] for place in range(0, len(spans), 16)]
        return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]

    vectors = {doc: [model.encode([chunk])[0] for chunk in chunks(text)] for doc, text in corpus.items()}
    assert max(map(len, vectors.values())) > 4
    run: dict[str, dict[str, float]] = {}
    for query, text in queries.items():
        asked = model.encode([text], task="Find it")[0]
        run[query] = {doc: max(float(chunk @ asked) for chunk in own) for doc, own in vectors.items()}
    wanted = by_trec(beir, run)
    found = scored(model, beir, instruction="Find it", chunk_tokens=16)
    assert found.values["nDCG@10"] == pytest.approx(wanted["nDCG@10"], abs=1e-9)
    assert found.values["MAP@1000"] == pytest.approx(wanted["MAP@1000"], abs=1e-9)
    assert found.values["MAP@1000"] != scored(model, beir, instruction="Find it").values["MAP@1000"]


def test_documents_shorter_than_a_chunk_score_as_whole(beir: Path) -> None:
    assert scored(Words(), beir, chunk_tokens=500).values == scored(Words(), beir).values


def test_queries_of_a_task_without_an_instruction_have_the_models_own(beir: Path) -> None:
    asked: list[str | None] = []

    class Told(Words):
        contract = Contract(eos_id=1, default_task="Find it")

        def encode(self, texts: Any, task: str | None = None) -> Any:
            asked.append(task)
            return super().encode(texts, task)

    scored(Told(), beir)
    scored(Told(), beir, instruction="Find another")
    assert list(dict.fromkeys(asked)) == ["Find it", None, "Find another"]


# ---- read-outs


class Offset(Words):
    """The vectors of `Words`, which all lean the same way, and whose lengths differ."""

    def encode(self, texts: Any, task: str | None = None) -> Any:
        lean_E = 0.4 * np.random.default_rng(5).normal(size=24)
        return ((super().encode(texts, task) + lean_E) * len(texts[0])).astype(np.float32)


def by_hand(queries: dict[str, str], parts: dict[str, list[str]], own: bool = True) -> tuple[float, Any]:
    """The mean cosine of all pairs of parts, and a run in which the parts' mean vector is subtracted: plain loops."""
    unit = {
        text: vector / np.linalg.norm(vector)
        for text in [*queries.values(), *(part for some in parts.values() for part in some)]
        for vector in [Offset().encode([text])[0].astype(np.float64)]
    }
    flat = [unit[part] for some in parts.values() for part in some]
    cosines = [float(a @ b) for i, a in enumerate(flat) for j, b in enumerate(flat) if i != j]
    mean = np.mean(flat, axis=0)

    def centred(text: str) -> Any:
        return (unit[text] - mean) / np.linalg.norm(unit[text] - mean)

    run = {
        query: {
            doc: max(float(centred(part) @ centred(text)) for part in some)
            for doc, some in parts.items()
            if own or doc != query
        }
        for query, text in queries.items()
    }
    return float(np.mean(cosines)), run


def test_read_outs_are_the_mean_cosine_of_all_pairs_and_ndcg_without_the_mean_vector(beir: Path) -> None:
    queries, corpus = texts_of(beir, "queries"), texts_of(beir, "corpus")
    cosine, run = by_hand(queries, {doc: [text] for doc, text in corpus.items()})
    found = scored(Offset(), beir).values
    assert found["mean_cosine"] == pytest.approx(cosine, abs=1e-6) and 0.3 < cosine < 0.95
    assert found["nDCG@10_centred"] == pytest.approx(by_trec(beir, run)["nDCG@10"], abs=1e-9)
    assert found["nDCG@10_centred"] != found["nDCG@10"]  # the score itself is of the vectors as they are
    pull = {text: Offset().encode([text])[0].astype(np.float64) for text in [*queries.values(), *corpus.values()]}
    unit = {text: vector / np.linalg.norm(vector) for text, vector in pull.items()}
    plain = {q: {d: float(unit[text] @ unit[asked]) for d, text in corpus.items()} for q, asked in queries.items()}
    assert found["nDCG@10"] == pytest.approx(by_trec(beir, plain)["nDCG@10"], abs=1e-9)


def test_read_outs_of_chunks_and_without_identical_ids(tmp_path: Path) -> None:
    corpus = {f"q{i}": sentence(i, 3 + i) + f" d{i}" for i in range(12)}
    queries = {f"q{i}": sentence(50 + i, 3) for i in range(9)}
    path = write_set(tmp_path / "set", queries, corpus, {f"q{i}": {f"q{(i * 5 + 1) % 12}": 1} for i in range(9)})
    chunks = {
        doc: [" ".join(text.split()[at : at + 4]) for at in range(0, len(text.split()), 4)]
        for doc, text in corpus.items()
    }
    cosine, run = by_hand(queries, chunks, own=False)
    found = scored(Offset(), path, chunk_tokens=4, ignore_identical_ids=True).values
    assert found["mean_cosine"] == pytest.approx(cosine, abs=1e-6)
    assert found["nDCG@10_centred"] == pytest.approx(by_trec(path, run)["nDCG@10"], abs=1e-9)


def test_a_read_out_is_of_retrieval_by_vectors_and_never_the_main_score(beir: Path, tmp_path: Path) -> None:
    for found in (scored(None, beir), scored(Words(), beir, "reranking", candidates="bm25", depth=5)):
        assert "mean_cosine" not in found.values
    (row,) = evaluate(Offset(), one_task(tmp_path, "{name: x, kind: retrieval, path: beir}")).rows
    assert row.metric == "nDCG@10" and {"mean_cosine", "nDCG@10_centred"} < row.details.keys()
    with pytest.raises(ValueError, match="mean_cosine"):
        SuiteTask(name="x", kind="retrieval", path=beir, metric="mean_cosine")
    one = write_set(tmp_path / "one", {"q": "tide"}, {"d": "the tide"}, {"q": {"d": 1}})
    assert "mean_cosine" not in scored(Words(), one).values


# ---- a smaller corpus


def test_a_smaller_corpus_keeps_what_is_judged_and_its_order(beir: Path) -> None:
    words = Words()
    scored(words, beir, limit=3, corpus_limit=10)
    taken = words.calls[1][0]
    corpus = texts_of(beir, "corpus")
    judged = {corpus[doc] for query in ("q0", "q1", "q2") for doc in qrels_of(beir)[query]}
    assert len(taken) == 10 and judged < set(taken)
    assert taken == [text for text in corpus.values() if text in set(taken)]
    again = Words()
    scored(again, beir, limit=3, corpus_limit=10)
    assert again.calls == words.calls
    scored(words, beir, limit=3, corpus_limit=2)
    assert set(words.calls[-1][0]) == judged
    scored(words, beir, limit=3, corpus_limit=99)
    assert words.calls[-1][0] == list(corpus.values())


# ---- candidates


def test_candidates_of_a_trec_run_and_of_rows_rank_alike(beir: Path, tmp_path: Path) -> None:
    """Against a loop that scores each candidate alone. The best `depth` are by the run's score, whatever its order."""
    corpus, queries = texts_of(beir, "corpus"), texts_of(beir, "queries")
    random = np.random.default_rng(3)
    lists = {query: [str(doc) for doc in random.permutation([*corpus])[:9]] for query in queries}
    lines = [
        f"{query} Q0 {doc} {place + 1} {20 - place / 8} name\n"
        for query, docs in lists.items()
        for place, doc in enumerate(docs)
    ]
    (tmp_path / "run.trec").write_text("".join(random.permutation(lines)))
    rows = [{"query-id": query, "corpus-ids": docs} for query, docs in lists.items()]
    write_rows(tmp_path / "top.jsonl.gz", rows)
    vectors = {text: Words().encode([text])[0] for text in [*corpus.values(), *queries.values()]}
    for depth in (None, 4):
        run = {
            query: {doc: float(vectors[corpus[doc]] @ vectors[queries[query]]) for doc in docs[:depth]}
            for query, docs in lists.items()
        }
        wanted = by_trec(beir, run)["MAP@1000"]
        assert 0 < wanted < 1
        for file in ("run.trec", "top.jsonl.gz"):
            encoder = Looked(vectors)
            found = scored(encoder, beir, "reranking", candidates=tmp_path / file, depth=depth)
            assert found.values["MAP@1000"] == pytest.approx(wanted, abs=1e-9)
        assert set(encoder.texts) - set(queries.values()) == {corpus[doc] for docs in run.values() for doc in docs}


def test_a_query_without_candidates_scores_zero_and_is_said(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.trec").write_text("q0 Q0 d0 1 5.0 x\n")
    found = scored(Words(), beir, "reranking", candidates=tmp_path / "run.trec", limit=2)
    assert found.means["MAP@1000"].tolist() == [0.5, 0]  # one of two relevant documents
    assert "1 of 2 queries have no candidate" in caplog.text
    (tmp_path / "run.trec").write_text("q9 Q0 d0 1 5.0 x\n")
    with pytest.raises(ValueError, match=r"run\.trec: no candidate for any query"):
        scored(Words(), beir, "reranking", candidates=tmp_path / "run.trec", limit=2)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("run.trec", "q0 Q0 d99 1 5.0 x", "document 'd99' is not in the corpus"),
        ("run.trec", "q99 Q0 d1 1 5.0 x", "query 'q99' is not among the queries"),
        ("run.trec", "q0 Q0 d0 2 4.0 x", "document 'd0' twice"),
        ("run.trec", "q0 Q0 d1 2 4.0", "expected query id, Q0, document id, rank, score"),
        ("run.trec", "q0 Q0 d1 2 nan x", "expected query id, Q0, document id, rank, score"),
        ("top.jsonl", '{"query-id": "q1", "corpus-ids": "d1"}', "corpus-ids: expected a list"),
        ("top.jsonl", '{"query": "q1", "corpus-ids": ["d1"]}', "no query-id"),
        ("top.jsonl", '{"query-id": "q1", "corpus-ids": ["d1", "d99"]}', "document 'd99' is not in the corpus"),
    ],
)
def test_a_bad_candidate_is_named_by_file_and_line(
    beir: Path, tmp_path: Path, name: str, line: str, message: str
) -> None:
    first = "q0 Q0 d0 1 5.0 x" if name == "run.trec" else '{"query-id": "q0", "corpus-ids": ["d0"]}'
    (tmp_path / name).write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=f"{name}:2: {message}"):
        scored(Words(), beir, "reranking", candidates=tmp_path / name)


def test_equal_documents_tie_against_the_positive(tmp_path: Path) -> None:
    negatives = [*(f"n{i}" for i in range(9)), "the same"]
    file = write_rows(tmp_path / "x.jsonl", [{"query": "x", "positive": ["the same"], "negative": negatives}])
    random = np.random.default_rng(0)
    encoder = Looked({text: random.normal(size=31).astype(np.float32) for text in {*negatives, "x"}})
    encoder.vector_of["the same"] = encoder.vector_of["x"] * np.float32(0.7)
    assert scored(encoder, file, "reranking").values["MAP@1000"] == pytest.approx(1 / 2)


def test_rows_without_both_sides_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"query": "moon", "positive": ["moon tide"], "negative": ["dog"]},
        {"query": "sun", "positive": [], "negative": ["dog"]},
        {"query": "fox", "positive": ["dog"], "negative": ["fox river"]},
    ]
    file = write_rows(tmp_path / "x.jsonl", rows)
    found = scored(Words(), file, "reranking")
    assert found.items["id"].tolist() == ["1", "3"] and found.means["MAP@1000"].tolist() == [1, 0.5]
    assert "1 queries without a positive or a negative are left out" in caplog.text
    with pytest.raises(ValueError, match="no query with a positive and a negative"):
        scored(Words(), write_rows(tmp_path / "y.jsonl", rows[1:2]), "reranking")
    assert len(scored(Words(), file, "reranking", limit=1).items["id"]) == 1


# ---- BM25


def by_bm25s(folder: Path) -> dict[str, dict[str, float]]:
    """bm25s used by hand: every document that shares a word with the query."""
    corpus, queries = texts_of(folder, "corpus"), texts_of(folder, "queries")
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(bm25s.tokenize(list(corpus.values()), stopwords="en", show_progress=False), show_progress=False)
    run: dict[str, dict[str, float]] = {}
    for query, text in queries.items():
        tokens = bm25s.tokenize([text], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [token for token in tokens if token in index.vocab_dict]
        scores = index.get_scores(known) if known else np.zeros(len(corpus))
        run[query] = {doc: float(value) for doc, value in zip(corpus, scores, strict=True) if value > 0}
    return run


def test_bm25_ranks_as_bm25s_used_by_hand(beir: Path) -> None:
    run = by_bm25s(beir)
    found, wanted = scored(None, beir).values, by_trec(beir, run)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert 0.05 < wanted["nDCG@10"] < 0.95

    first = {query: dict(sorted(hits.items(), key=lambda hit: -hit[1])[:5]) for query, hits in run.items()}
    found, wanted = scored(None, beir, "reranking", candidates="bm25", depth=5).values, by_trec(beir, first)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)

    corpus, words = texts_of(beir, "corpus"), Words()
    scored(words, beir, "reranking", candidates="bm25", depth=5)
    assert set(words.calls[1][0]) == {corpus[doc] for hits in first.values() for doc in hits}


def test_bm25_ranks_the_candidates_of_rows(tmp_path: Path) -> None:
    rows = [{"query": "tide moon", "positive": ["the moon makes a tide"], "negative": ["a dog", "moon dust"]}] * 2
    assert scored(None, write_rows(tmp_path / "x.jsonl", rows), "reranking").values["MAP@1000"] == 1


def test_bm25_has_no_row_for_what_it_cannot_rank(tmp_path: Path) -> None:
    write_beir(tmp_path / "set")
    write_rows(tmp_path / "sts.jsonl", [{"text1": f"a {i}", "text2": "b", "score": i} for i in range(3)])
    lines: list[str] = []
    results = evaluate("bm25", tmp_path, progress=lines.append)
    assert [row.task for row in results.rows] == ["set"] and results.rows[0].value > 0.7
    assert (results.about["model"], results.about["fingerprint"]) == ("bm25", None)
    assert "[2/2] sts: BM25 only ranks, and has no score for sts" in lines
    with pytest.raises(ValueError, match="neither retrieval nor reranking"):
        evaluate("bm25", one_task(tmp_path, "{name: x, kind: sts, path: sts.jsonl}"))
    with pytest.raises(TypeError, match="'minilm' is a name: open the model first"):
        evaluate("minilm", tmp_path)


def test_bm25_on_real_questions() -> None:
    folder = Path(__file__).resolve().parents[4] / "shared/data/dev/squadshifts-amazon"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not here")
    found = scored(None, folder).values["nDCG@10"]
    with gzip.open(folder / "queries.jsonl.gz", "rt") as file:
        assert sum(1 for _ in file) == 1000
    assert found == pytest.approx(0.419, abs=0.0005)
