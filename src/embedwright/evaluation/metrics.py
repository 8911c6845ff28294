"""Computes the metrics of mteb 2.26 from embeddings and gold labels, by the same calls of sklearn and pytrec_eval.

mteb's own evaluators want a `Dataset`, a `TaskMetadata`, a timer and a model with a dataloader. A user's file has none
of these, and importing the evaluators takes five seconds. test_metrics.py compares these functions with mteb's tasks on
the same embeddings. The `[eval]` extra is imported where it is used.

Shapes: `N` texts, `E` embedding, `Q` queries, `C` corpus, `K` hits of a query, `S` runs of k-means. For every metric,
higher is better. Each function returns the metrics of its kind (`METRICS`), with the items that they
come from (`Scored`).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedwright.errors import InputError
from embedwright.evaluation.results import Items

Kind = Literal["retrieval", "reranking", "classification", "clustering", "sts", "pair"]
Embeddings = NDArray[np.float32]
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
Qrels = Mapping[str, Mapping[str, int]]  # query id -> document id -> relevance

METRICS: dict[Kind, tuple[str, ...]] = {  # the first is the main one
    "retrieval": ("nDCG@10", "Recall@10", "MRR@10", "Recall@100", "MAP@1000"),
    "reranking": ("MAP@1000", "MRR@10", "nDCG@10", "Recall@10", "Recall@100"),
    "classification": ("accuracy", "f1"),
    "clustering": ("v_measure",),
    "sts": ("cosine_spearman", "cosine_pearson"),
    "pair": ("cosine_ap",),
}
READOUTS = ("mean_cosine", "nDCG@10_centred")  # kept for retrieval by vectors, besides the scores; they are not metrics
SEED = 42  # mteb's default seed, so the few-shot draws and clusters are the same
EXPERIMENTS, SAMPLES_PER_LABEL = 10, 8  # mteb's AbsTaskClassification
CLUSTERINGS = 3  # mteb runs k-means once; the result moves by about a point with the seed, so three are averaged

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scored:
    """The metrics of one task by name, and its items.

    `means` has one number an item for each metric that is the mean of its items. `items` is what the other metrics are
    computed from (a correlation is not a mean), and `id` where the items have names. `data` is a digest of
    what was scored.
    """

    values: dict[str, float]
    means: Items = field(default_factory=dict)
    items: Items = field(default_factory=dict)
    data: str = ""

    def items_of(self, metric: str) -> Items:
        """Returns the arrays that `metric` is computed from, as results.py names them; none if there are none."""
        if metric in self.means:
            return {"score": self.means[metric], "id": self.items["id"]}
        return {} if self.means else self.items


def ranking(run: Run, qrels: Qrels) -> Scored:
    """Returns the metrics of retrieval and reranking, averaged over the queries of `run`. An item is a query.

    `qrels` has the judgements of every query. A query without hits scores 0.
    """
    import pytrec_eval

    # best first; equal scores by descending id, as trec_eval ranks them
    order = {query: sorted(((score, doc) for doc, score in run[query].items()), reverse=True) for query in run}
    hits = {query: {doc: score for score, doc in pairs} for query, pairs in order.items()}
    judged = {query: dict(qrels[query]) for query in run}
    measures = {"ndcg_cut.10", "recall.10,100", "map_cut.1000"}
    scores = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(hits)
    # trec_eval's reciprocal rank has no cutoff, so it gets the first ten hits only.
    first_ten = {query: dict(islice(found.items(), 10)) for query, found in hits.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first_ten)
    found = {
        "nDCG@10": [scores[query]["ndcg_cut_10"] for query in judged],
        "Recall@10": [scores[query]["recall_10"] for query in judged],
        "MRR@10": [reciprocal[query]["recip_rank"] for query in judged],
        "Recall@100": [scores[query]["recall_100"] for query in judged],
        "MAP@1000": [scores[query]["map_cut_1000"] for query in judged],
    }
    values = {metric: sum(of_queries) / len(judged) for metric, of_queries in found.items()}
    return Scored(values, {metric: np.array(of_queries) for metric, of_queries in found.items()}, {"id": _ids(judged)})


def _ids(names: Iterable[str]) -> NDArray[Any]:
    return np.array(list(names), dtype=np.str_)


def few_shot(labels: Sequence[str]) -> list[list[int]]:
    """Returns the training rows of each of ten experiments: up to 8 rows of every label, drawn as mteb draws them."""
    order = list(range(len(labels)))
    draws = []
    for _ in range(EXPERIMENTS):
        # mteb seeds anew for each experiment, but continues from the order of the last one
        np.random.RandomState(SEED).shuffle(order)
        seen: Counter[str] = Counter()
        draw = []
        for row in order:
            if seen[labels[row]] < SAMPLES_PER_LABEL:
                seen[labels[row]] += 1
                draw.append(row)
        draws.append(draw)
    return draws


def halves(labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Splits the rows into train and test, half of each label, by a seed; the odd row of a label is for training.

    Raises ValueError if no row is left to test on.
    """
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    if len(rows_of) == len(labels):
        raise InputError("no label has two rows: a split leaves nothing to test on")
    random = np.random.default_rng(SEED)
    train: list[int] = []
    test: list[int] = []
    for rows in rows_of.values():
        random.shuffle(rows)
        middle = (len(rows) + 1) // 2
        train += rows[:middle]
        test += rows[middle:]
    return sorted(train), sorted(test)


def classification(
    train_NE: Embeddings,
    train_labels: Sequence[str],
    test_NE: Embeddings,
    test_labels: Sequence[str],
    draws: Sequence[Sequence[int]],
) -> Scored:
    """Returns accuracy and macro F1 of a logistic regression, averaged over a fit on each of `draws` (rows).

    An item is a test row: the part of the fits that name its label. F1 is not a mean over rows and has no items.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    accuracy, f1 = [], []
    gold_N, right_N = np.asarray(test_labels), np.zeros(len(test_labels))
    for draw in draws:
        classifier = LogisticRegression(max_iter=100, random_state=SEED)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # mteb stops at 100 steps too
            classifier.fit(train_NE[draw], [train_labels[row] for row in draw])
        predicted = classifier.predict(test_NE)
        accuracy.append(accuracy_score(test_labels, predicted))
        f1.append(f1_score(test_labels, predicted, average="macro"))
        right_N += predicted == gold_N
    values = {"accuracy": float(np.mean(accuracy)), "f1": float(np.mean(f1))}
    return Scored(values, {"accuracy": right_N / len(draws)}, {"id": np.arange(len(test_labels))})


def clustering(vectors_NE: Embeddings, labels: Sequence[str]) -> Scored:
    """Returns the v-measure of mini-batch k-means with one cluster a label, averaged over three seeds."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    found = []
    for seed in range(SEED, SEED + CLUSTERINGS):
        kmeans = MiniBatchKMeans(n_clusters=len(set(labels)), batch_size=500, n_init="auto", random_state=seed)
        found.append(kmeans.fit(vectors_NE).labels_)
    values = {"v_measure": float(np.mean([v_measure_score(labels, cluster_N) for cluster_N in found]))}
    gold_N = np.unique(np.asarray(labels), return_inverse=True)[1]
    return Scored(values, items={"cluster": np.stack(found), "gold": gold_N})


def sts(left_NE: Embeddings, right_NE: Embeddings, scores: Sequence[float]) -> Scored:
    """Returns Spearman's and Pearson's correlation of the pairs' cosines with the human scores."""
    from scipy.stats import pearsonr, spearmanr

    cosine_N = _paired_cosine(left_NE, right_NE)
    items: Items = {"cosine": cosine_N, "gold": np.asarray(scores, dtype=np.float64)}
    if np.ptp(cosine_N) == 0:  # the correlation is 0/0, and a nan would spoil every average
        logger.warning("every pair has the same cosine: the model has collapsed, and its correlation counts as 0")
        return Scored({"cosine_spearman": 0.0, "cosine_pearson": 0.0}, items=items)
    values = {
        "cosine_spearman": float(spearmanr(scores, cosine_N)[0]),
        "cosine_pearson": float(pearsonr(scores, cosine_N)[0]),
    }
    return Scored(values, items=items)


def pair(left_NE: Embeddings, right_NE: Embeddings, labels: Sequence[int]) -> Scored:
    """Returns the average precision of the pairs' cosines for `labels` of 0 and 1."""
    from sklearn.metrics import average_precision_score

    cosine_N = _paired_cosine(left_NE, right_NE)
    values = {"cosine_ap": float(average_precision_score(labels, cosine_N))}
    return Scored(values, items={"cosine": cosine_N, "gold": np.asarray(labels)})


def _paired_cosine(left_NE: Embeddings, right_NE: Embeddings) -> NDArray[np.float32]:
    from sklearn.metrics.pairwise import paired_cosine_distances

    cosine_N: NDArray[np.float32] = 1 - paired_cosine_distances(left_NE, right_NE)
    return cosine_N
