"""Each metric against mteb's own task on the same embeddings, and against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from suite_files import Looked as Encoder
from suite_files import write_rows, write_set

from embedwright.evaluation import metrics, ranking
from embedwright.evaluation.metrics import Scored
from embedwright.evaluation.tasks import SuiteTask

mteb = pytest.importorskip("mteb")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.mocks.mock_tasks.classification import MockClassificationTask  # noqa: E402
from mteb.mocks.mock_tasks.clustering import MockClusteringTask  # noqa: E402
from mteb.mocks.mock_tasks.pair_classification import MockPairClassificationTask  # noqa: E402
from mteb.mocks.mock_tasks.reranking import MockRerankingTask  # noqa: E402
from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask  # noqa: E402
from mteb.mocks.mock_tasks.sts import MockSTSTask  # noqa: E402


def noisy_centres(count: int, labels: int, seed: int) -> tuple[NDArray[np.float32], list[str]]:
    """(N, 16) around one centre a label: far enough from chance and from perfect that a wrong call shows."""
    random = np.random.default_rng(seed)
    centre_LE = np.random.default_rng(0).normal(size=(labels, 16))
    label_N = random.integers(labels, size=count)
    vectors_NE = centre_LE[label_N] + random.normal(scale=2.0, size=(count, 16))
    return vectors_NE.astype(np.float32), [f"label {label}" for label in label_N]


def names(prefix: str, vectors_NE: NDArray[np.float32]) -> list[str]:
    return [f"{prefix}{number}" for number in range(len(vectors_NE))]


class Looked:
    """An mteb model that looks its texts' vectors up."""

    mteb_model_meta = None

    def __init__(self, *columns: tuple[list[str], NDArray[np.float32]]) -> None:
        self.vector_of = {
            text: vector for texts, vectors in columns for text, vector in zip(texts, vectors, strict=True)
        }

    def encode(self, inputs: Any, **_: Any) -> NDArray[np.float32]:
        return np.stack([self.vector_of[text] for batch in inputs for text in batch["text"]])

    def similarity(self, a: Any, b: Any) -> Any:
        return mteb.similarity_functions.cos_sim(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        return mteb.similarity_functions.pairwise_cos_sim(a, b)


def mteb_scores(task: Any, dataset: Any, model: Looked) -> dict[str, float]:
    task.dataset, task.data_loaded = dataset, True
    (scores,) = task.evaluate(model, split="test", encode_kwargs={"batch_size": 64}).values()
    return dict(scores)


def retrieval(
    folder: Path,
    query_QE: NDArray[np.float32],
    query_ids: list[str],
    corpus_CE: NDArray[np.float32],
    corpus_ids: list[str],
    qrels: dict[str, dict[str, int]],
    **keys: Any,
) -> Scored:
    """A retrieval task on these vectors. Each text is its id with a word in front."""
    queries = {id_: f"ask {id_}" for id_ in query_ids}
    corpus = {id_: f"text {id_}" for id_ in corpus_ids}
    write_set(folder, queries, corpus, qrels)
    encoder = Encoder(dict(zip([*queries.values(), *corpus.values()], [*query_QE, *corpus_CE], strict=True)))
    return ranking.score(encoder, SuiteTask(name="x", kind="retrieval", path=folder, **keys))


@pytest.mark.parametrize("ignore_identical_ids", [False, True])
def test_retrieval_is_mtebs(ignore_identical_ids: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    corpus_CE = random.normal(size=(150, 16)).astype(np.float32)
    corpus_CE[60:64] = corpus_CE[50]  # ties
    corpus_ids = names("d", corpus_CE)
    # Queries 0 to 4 are documents too, and stand in the corpus under their own id.
    query_ids = corpus_ids[:5] + [f"q{number}" for number in range(25)]
    near_Q = random.integers(150, size=30)
    query_QE = (corpus_CE[near_Q] + random.normal(scale=1.2, size=(30, 16))).astype(np.float32)
    query_QE[:5] = corpus_CE[:5]
    qrels = {
        query: {f"d{near}": 2, f"d{(near + 7) % 150}": 1, f"d{(near + 9) % 150}": 0}
        for query, near in zip(query_ids, near_Q, strict=True)
    }
    qrels["d2"] = {"d2": 1}  # relevant to itself, as the ids have it
    qrels["q3"] = {"d9": 0}  # judged, and nothing is relevant
    qrels["q4"] = {"d8": -1, "d1": 1}
    keys = {"ignore_identical_ids": ignore_identical_ids}
    ours = retrieval(tmp_path, query_QE, query_ids, corpus_CE, corpus_ids, qrels, **keys).values

    task = MockRetrievalTask()
    task.ignore_identical_ids = ignore_identical_ids
    data = {
        "corpus": Dataset.from_dict({"id": corpus_ids, "text": [f"text {id_}" for id_ in corpus_ids]}),
        "queries": Dataset.from_dict({"id": query_ids, "text": [f"ask {id_}" for id_ in query_ids]}),
        "relevant_docs": {query: qrels[query] for query in query_ids},
        "top_ranked": None,
    }
    model = Looked(([f"text {id_}" for id_ in corpus_ids], corpus_CE), ([f"ask {id_}" for id_ in query_ids], query_QE))
    theirs = mteb_scores(task, {"default": {"test": data}}, model)
    for metric in ("nDCG@10", "Recall@10", "MRR@10", "Recall@100", "MAP@1000"):
        name = metric.lower().replace("@", "_at_")
        assert ours[metric] == pytest.approx(theirs[name], abs=1e-5)  # mteb rounds to five digits
        assert 0.05 < ours[metric] < 0.95


def test_retrieval_by_hand(tmp_path: Path) -> None:
    corpus_CE = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.5, 0.5]], dtype=np.float32)
    query_QE = np.array([[5, 0]], dtype=np.float32)  # ranks a, b, d, c, whatever its length
    found = retrieval(tmp_path, query_QE, ["q"], corpus_CE, list("abcd"), {"q": {"b": 1, "d": 1}}).values
    ideal = 1 + 1 / np.log2(3)
    assert found["nDCG@10"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(4)) / ideal)
    assert found["MRR@10"] == pytest.approx(0.5)
    assert found["Recall@10"] == found["Recall@100"] == 1


def test_mrr_and_recall_stop_at_their_cuts(tmp_path: Path) -> None:
    angle_C = np.linspace(0, 1, 200, dtype=np.float32)
    corpus_CE = np.stack([np.cos(angle_C), np.sin(angle_C)], axis=1)
    ids = names("d", corpus_CE)
    query_QE = np.array([[1, 0], [1, 0]], dtype=np.float32)
    qrels = {"p": {"d10": 1, "d9": 1}, "q": {"d10": 1, "d99": 1, "d100": 1}}
    found = retrieval(tmp_path, query_QE, ["p", "q"], corpus_CE, ids, qrels).values
    assert found["MRR@10"] == pytest.approx((1 / 10 + 0) / 2)
    assert found["Recall@10"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["Recall@100"] == pytest.approx((1 + 2 / 3) / 2)


def test_a_document_of_the_querys_own_id_is_a_hit_unless_told_otherwise(tmp_path: Path) -> None:
    corpus_CE = np.array([[1, 0], [0.9, 0.1]], dtype=np.float32)
    query_QE = np.array([[1, 0]], dtype=np.float32)

    def ndcg(relevant: str, **options: bool) -> float:
        found = retrieval(tmp_path, query_QE, ["1"], corpus_CE, ["1", "2"], {"1": {relevant: 1}}, **options)
        return found.values["nDCG@10"]

    assert ndcg("2") == pytest.approx(1 / np.log2(3)) and ndcg("1") == 1  # 0.63, as mteb has it
    assert ndcg("2", ignore_identical_ids=True) == 1 and ndcg("1", ignore_identical_ids=True) == 0


def test_a_query_without_a_hit_counts_as_zero() -> None:
    found = metrics.ranking({"1": {}, "2": {"a": 0.5}}, {"1": {"b": 1}, "2": {"a": 1}})
    assert set(found.values.values()) == {0.5} and found.means["MRR@10"].tolist() == [0, 1]


def test_of_many_equal_scores_those_count_that_trec_eval_ranks_first(tmp_path: Path) -> None:
    """150 copies of a document: by descending id, as in mteb, whatever the search finds first."""
    corpus_CE = np.ones((150, 4), dtype=np.float32)
    ids = [f"d{number:03}" for number in range(150)]
    query_QE = np.ones((2, 4), dtype=np.float32)
    qrels = {"p": {"d149": 1}, "q": {"d010": 1, "d060": 1}}
    found = retrieval(tmp_path, query_QE, ["p", "q"], corpus_CE, ids, qrels)
    assert (found.values["nDCG@10"], found.values["Recall@100"]) == (0.5, 0.75)


def test_reranking_is_mtebs(tmp_path: Path) -> None:
    """Rows as mteb's old reranking sets have them, through mteb's own transformation and task."""
    from mteb.abstasks.text import reranking as old

    class Old(old.AbsTaskReranking):
        metadata = MockRerankingTask.metadata

    random = np.random.default_rng(8)
    rows = []
    vector_of: dict[str, NDArray[np.float32]] = {}
    for number in range(20):
        query = f"query {number % 18}"  # two rows ask the same
        vector_of[query] = random.normal(size=16).astype(np.float32)
        row: dict[str, Any] = {"query": query, "positive": [], "negative": []}
        for side, count, noise in (("positive", 1 + number % 3, 1.6), ("negative", 4 + number % 9, 2.2)):
            for place in range(count):
                text = f"{side} {number} {place}"
                vector_of[text] = (vector_of[query] + random.normal(scale=noise, size=16)).astype(np.float32)
                row[side].append(text)
        rows.append(row)
    rows[5]["negative"] = []  # mteb leaves it out
    given = DatasetDict(test=Dataset.from_list(rows))
    task = Old()
    old.OLD_FORMAT_RERANKING_TASKS.append(task.metadata.name)
    try:
        task.transform_old_dataset_format(given)
    finally:
        old.OLD_FORMAT_RERANKING_TASKS.remove(task.metadata.name)
    texts = list(vector_of)
    theirs = mteb_scores(task, task.dataset, Looked((texts, np.stack(list(vector_of.values())))))

    file = write_rows(tmp_path / "rows.jsonl", rows)
    found = ranking.score(Encoder(vector_of), SuiteTask(name="x", kind="reranking", path=file))
    assert len(found.items["id"]) == 19
    for metric in ("MAP@1000", "MRR@10", "nDCG@10", "Recall@10"):
        name = metric.lower().replace("@", "_at_")
        assert found.values[metric] == pytest.approx(theirs[name], abs=1e-5)
        assert np.mean(found.items_of(metric)["score"]) == pytest.approx(theirs[name], abs=1e-5)
        assert 0.2 < found.values[metric] <= 1
    assert theirs["main_score"] == theirs["map_at_1000"]


def test_reranking_of_a_retrievers_list_is_mtebs(tmp_path: Path) -> None:
    """One relevant document of each query is not in its list, one query has no list."""
    random = np.random.default_rng(9)
    corpus_CE = random.normal(size=(60, 16)).astype(np.float32)
    query_QE = (corpus_CE[:15] + random.normal(scale=1.5, size=(15, 16))).astype(np.float32)
    corpus = {f"d{i}": f"text d{i}" for i in range(60)}
    queries = {f"q{i}": f"ask q{i}" for i in range(15)}
    qrels = {f"q{i}": {f"d{i}": 2, f"d{(i + 5) % 60}": 1, f"d{(i + 9) % 60}": 1} for i in range(15)}
    lists = {f"q{i}": [f"d{(i + 3 * k) % 60}" for k in range(12)] for i in range(14)}  # d{i + 5} is in none
    data = {
        "corpus": Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
        "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
        "relevant_docs": qrels,
        "top_ranked": lists,
    }
    model = Looked((list(corpus.values()), corpus_CE), (list(queries.values()), query_QE))
    theirs = mteb_scores(MockRerankingTask(), {"default": {"test": data}}, model)
    write_set(tmp_path, queries, corpus, qrels)
    rows = [{"query-id": query, "corpus-ids": docs} for query, docs in lists.items()]
    candidates = write_rows(tmp_path / "top.jsonl", rows)
    task = SuiteTask(name="x", kind="reranking", path=tmp_path, candidates=candidates)
    found = ranking.score(Encoder(model.vector_of), task)
    for metric in ("MAP@1000", "MRR@10", "nDCG@10"):
        assert found.values[metric] == pytest.approx(theirs[metric.lower().replace("@", "_at_")], abs=1e-5)
        assert 0.1 < found.values[metric] < 0.9


def test_classification_is_mtebs() -> None:
    train_NE, train_labels = noisy_centres(200, 5, seed=2)
    test_NE, test_labels = noisy_centres(120, 5, seed=3)
    draws = metrics.few_shot(train_labels)
    ours = metrics.classification(train_NE, train_labels, test_NE, test_labels, draws).values

    train_texts, test_texts = names("train", train_NE), names("test", test_NE)
    data = DatasetDict(
        train=Dataset.from_dict({"text": train_texts, "label": train_labels}),
        test=Dataset.from_dict({"text": test_texts, "label": test_labels}),
    )
    theirs = mteb_scores(MockClassificationTask(), data, Looked((train_texts, train_NE), (test_texts, test_NE)))
    assert ours == pytest.approx({"accuracy": theirs["accuracy"], "f1": theirs["f1"]}, abs=1e-12)
    assert 0.4 < ours["accuracy"] < 0.95


def test_few_shot_draws_eight_of_each_label_ten_different_times() -> None:
    labels = ["a"] * 50 + ["b"] * 3 + ["c"] * 20
    draws = metrics.few_shot(labels)
    assert len(draws) == 10 and len({tuple(sorted(draw)) for draw in draws}) == 10
    for draw in draws:
        drawn = [labels[row] for row in draw]
        assert (drawn.count("a"), drawn.count("b"), drawn.count("c")) == (8, 3, 8)


def test_halves_are_stratified_and_disjoint() -> None:
    labels = ["a"] * 10 + ["b"] * 5 + ["c"]
    train, test = metrics.halves(labels)
    assert sorted(train + test) == list(range(16))
    assert sorted(labels[row] for row in test) == ["a"] * 5 + ["b"] * 2
    assert metrics.halves(labels) == (train, test)
    with pytest.raises(ValueError, match="nothing to test on"):
        metrics.halves(["a", "b", "c"])


def test_clustering_is_mtebs_averaged_over_three_seeds() -> None:
    vectors_NE, labels = noisy_centres(300, 6, seed=4)
    texts = names("t", vectors_NE)
    data = DatasetDict(test=Dataset.from_dict({"sentences": [texts], "labels": [labels]}))
    theirs = []
    for seed in (42, 43, 44):
        task = MockClusteringTask()
        task.dataset, task.data_loaded = data, True
        model = Looked((texts, vectors_NE))
        (scores,) = task.evaluate(model, split="test", encode_kwargs={"batch_size": 64}, seed=seed).values()
        theirs.append(scores["v_measure"])
    assert metrics.clustering(vectors_NE, labels).values["v_measure"] == pytest.approx(np.mean(theirs), abs=1e-12)
    assert len(set(theirs)) > 1  # else the average proves nothing


def test_sts_is_mtebs() -> None:
    random = np.random.default_rng(5)
    left_NE = random.normal(size=(80, 16)).astype(np.float32)
    right_NE = (left_NE + random.normal(size=(80, 16)) * random.uniform(0, 4, size=(80, 1))).astype(np.float32)
    scores = [float(round(score, 1)) for score in random.uniform(0, 5, size=80)]
    left, right = names("left", left_NE), names("right", right_NE)
    data = DatasetDict(test=Dataset.from_dict({"sentence1": left, "sentence2": right, "score": scores}))
    theirs = mteb_scores(MockSTSTask(), data, Looked((left, left_NE), (right, right_NE)))
    ours = metrics.sts(left_NE, right_NE, scores).values
    assert ours == pytest.approx({name: theirs[name] for name in ours}, abs=1e-9)


def test_sts_of_a_collapsed_model_is_zero_and_said(caplog: pytest.LogCaptureFixture) -> None:
    same_NE = np.ones((4, 3), dtype=np.float32)
    assert metrics.sts(same_NE, same_NE, [1, 2, 3, 4]).values == {"cosine_spearman": 0.0, "cosine_pearson": 0.0}
    assert "collapsed" in caplog.text


def test_pair_is_mtebs() -> None:
    random = np.random.default_rng(6)
    left_NE = random.normal(size=(90, 16)).astype(np.float32)
    right_NE = (left_NE + random.normal(scale=2, size=(90, 16))).astype(np.float32)
    labels = [int(label) for label in random.integers(2, size=90)]
    left, right = names("left", left_NE), names("right", right_NE)
    data = DatasetDict(test=Dataset.from_dict({"sentence1": left, "sentence2": right, "labels": labels}))
    theirs = mteb_scores(MockPairClassificationTask(), data, Looked((left, left_NE), (right, right_NE)))
    assert metrics.pair(left_NE, right_NE, labels).values["cosine_ap"] == pytest.approx(theirs["cosine_ap"], abs=1e-12)
