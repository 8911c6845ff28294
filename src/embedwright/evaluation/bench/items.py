"""Per-item scores of an MTEB task, from the predictions that mteb writes: `<Task>.items.npz`.

Arrays are named `<split>/<hf_subset>/<array>`, with the names of `results`. Their mean, correlation, precision or
v-measure is the task's main score in that split and subset: where it is not, the arrays are left out.

    retrieval, reranking   `score` and `id` of each query, for main scores that are a mean over queries
    summarization          `score` and `id` (row) of each text: the correlation of its summaries with human judgements
    classification         `score`: in how many of the experiments the text was classified correctly
    sts, pair              `cosine` and `gold`; in `pair` the similarity that gives mteb's main score, mostly the cosine
    clustering             `<split>/<hf_subset>/<part>/cluster` (S, N), one row a run of k-means, and `gold` (N,);
                           `times` (S, N) where mteb draws the texts of each run: how often it drew each
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks import AbsTask
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.text.summarization import AbsTaskSummarization
from mteb.results import TaskResult
from numpy.typing import NDArray

from embedwright.files import whole_file

Arrays = dict[str, NDArray[Any]]

KINDS = {  # mteb's types that have a kind of ours; others keep their name
    "Retrieval": "retrieval",
    "Reranking": "reranking",
    "Classification": "classification",
    "Clustering": "clustering",
    "STS": "sts",
    "PairClassification": "pair",
    "Summarization": "summarization",
}
_NEAR = 1e-4  # mteb rounds to five decimals
_MEASURES = {
    "ndcg_at": "ndcg_cut",
    "map_at": "map_cut",
    "recall_at": "recall",
    "precision_at": "P",
    "hit_rate_at": "success",
}

logger = logging.getLogger(__name__)


def write_items(file: Path, task: AbsTask, result: TaskResult, predictions: Path) -> None:
    """Writes what the main score of a task was computed from. Splits and subsets that `file` has already stay in it.

    `predictions` is the folder that mteb wrote to. The task's random generator began at its seed.
    """
    arrays: Arrays = {}
    if file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    for where, some in _items(task, predictions):
        split, subset = where
        main = next((s["main_score"] for s in result.scores.get(split, []) if s["hf_subset"] == subset), np.nan)
        found = _value(some)
        if abs(found - main) <= _NEAR:
            arrays |= {f"{split}/{subset}/{name}": array for name, array in some.items()}
        else:
            logger.warning(
                "%s, %s/%s: its items give %.5f and its main score is %.5f: no items are kept for it",
                *(task.metadata.name, split, subset, found, main),
            )
    if not arrays:
        return
    with whole_file(file) as temp, temp.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def remove_broken(folder: Path) -> None:
    """Removes JSON files that a killed process left half written."""
    for file in folder.rglob("*.json"):
        try:
            json.loads(file.read_bytes())
        except ValueError:
            file.unlink()


def _items(task: AbsTask, predictions: Path) -> Iterator[tuple[tuple[str, str], Arrays]]:
    """Gives the arrays of each split and subset that has predictions."""
    file = predictions / task.prediction_file_name
    if task.metadata.type not in KINDS or not file.is_file():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    draws = random.Random(task.seed)
    for split in task.eval_splits:
        for subset in task.hf_subsets:
            predicted = found.get(subset, {}).get(split)
            if predicted is None:
                continue
            some = _arrays(task, _rows(task, split, subset), predicted, draws)
            if some:
                yield (split, subset), some


def _rows(task: Any, split: str, subset: str) -> Any:
    """Returns the data of a split, as mteb finds them: many data sets of one subset do not name it."""
    return task.dataset[split] if subset not in task.dataset and subset == "default" else task.dataset[subset][split]


def _arrays(task: Any, rows: Any, predicted: Any, draws: random.Random) -> Arrays:
    """Returns the arrays of one split and subset; none for a task whose main score is not a mean over items."""
    main = task.metadata.main_score
    if isinstance(task, AbsTaskRetrieval):
        return _retrieval(task, rows["relevant_docs"], predicted, main)
    if isinstance(task, AbsTaskSTS) and main == "cosine_spearman":
        return {"cosine": np.array(predicted["cosine_scores"]), "gold": np.array(rows["score"], dtype=np.float64)}
    if isinstance(task, AbsTaskPairClassification) and main.endswith("_ap"):
        labels = rows[0][task.label_column_name] if len(rows) == 1 else rows[task.label_column_name]
        return _pair(predicted, np.array(labels, dtype=np.int64), main)
    if type(task).evaluate is AbsTaskClassification.evaluate and main == "accuracy" and not task.is_cross_validation:
        correct_EN = np.array(predicted) == np.array(rows[task.label_column_name])
        return {"score": correct_EN.mean(axis=0), "id": np.arange(correct_EN.shape[1])}
    if isinstance(task, AbsTaskSummarization):
        return _summaries(task, rows, predicted, main)
    if isinstance(task, AbsTaskClusteringLegacy) and main == "v_measure":
        return _sets(task, rows, list(predicted))
    if isinstance(task, AbsTaskClustering) and main == "v_measure":
        return _bootstrapped(task, rows, predicted, draws)
    return {}


def _retrieval(task: Any, qrels: Mapping[str, Mapping[str, int]], found: Any, main: str) -> Arrays:
    import pytrec_eval

    name, _, depth = main.rpartition("_")
    if name not in _MEASURES:
        return {}
    run = {
        query: {doc: score for doc, score in hits.items() if not (task.ignore_identical_ids and doc == query)}
        for query, hits in found.items()
    }
    if task.skip_first_result:
        run = {query: dict(sorted(hits.items(), key=lambda hit: -hit[1])[1:]) for query, hits in run.items()}
    scores = pytrec_eval.RelevanceEvaluator(qrels, {f"{_MEASURES[name]}.{depth}"}).evaluate(run)
    values = [scores[query][f"{_MEASURES[name]}_{depth}"] for query in scores]
    return {"score": np.array(values), "id": np.array(list(scores))}


def _pair(predicted: Mapping[str, Sequence[float]], gold: NDArray[np.int64], main: str) -> Arrays:
    """Takes the similarity with the main score's average precision: mteb's `max_ap` is the best of five."""
    from sklearn.metrics import average_precision_score

    sides = {
        "cosine": np.array(predicted["cosine_scores"]),
        "similarity": np.array(predicted["similarity_scores"]),
        "dot": np.array(predicted["dot_scores"]),
        "euclidean": -np.array(predicted["euclidean_distances"]),
        "manhattan": -np.array(predicted["manhattan_distances"]),
    }
    name = main.removesuffix("_ap")
    if name == "max":
        name = max(sides, key=lambda side: average_precision_score(gold, sides[side]))
    return {"cosine": sides[name], "gold": gold} if name in sides else {}


def _summaries(task: Any, rows: Any, predicted: Mapping[str, Sequence[Sequence[float]]], main: str) -> Arrays:
    """Scores each text as mteb does: in SummEval, the mean of a correlation and its p-value.

    mteb has no prediction for a text whose summaries are all judged, or all scored, the same.
    """
    span, number = task.max_score - task.min_score, 0
    ids: list[int] = []
    for row, relevance in enumerate(rows[task.relevancy_column_name]):
        judged = ((np.array(relevance) - task.min_score) / span).tolist()
        if number < len(predicted["human_scores"]) and judged == predicted["human_scores"][number]:
            ids.append(row)
            number += 1
    texts = [{name: [values[i]] for name, values in predicted.items()} for i in range(number)]
    values = [task.evaluator._calculate_metrics(task, text)[main] for text in texts]
    return {"score": np.array(values), "id": np.array(ids)}


def _sets(task: Any, rows: Any, predicted: list[Sequence[int]]) -> Arrays:
    """Each row of the older clustering tasks is a set of texts with a clustering of its own; one of one label has
    none, and counts as right.
    """
    arrays: Arrays = {}
    for number, labels in enumerate(rows[task.label_column_name]):
        gold = np.unique(np.array(labels), return_inverse=True)[1]
        cluster = predicted.pop(0) if gold.any() else np.zeros(len(gold), np.int64)
        arrays |= {f"{number}/cluster": np.array([cluster]), f"{number}/gold": gold}
    return arrays


def _bootstrapped(
    task: Any, rows: Any, predicted: Mapping[str, Sequence[Sequence[int]]], draws: random.Random
) -> Arrays:
    """Draws the texts of each run again, as mteb has drawn them, to know their labels."""
    most = task.max_document_to_embed
    if task.max_fraction_of_documents_to_embed is not None:
        most = int(task.max_fraction_of_documents_to_embed * len(rows))
    chosen = range(len(rows)) if most is None else draws.sample(range(len(rows)), k=min(len(rows), most))
    column = rows[task.label_column_name]
    labels = [label if isinstance(label, list) else [label] for label in (column[i] for i in chosen)]
    arrays: Arrays = {}
    for level, (name, runs) in enumerate(predicted.items()):
        known = np.array([label[level] for label in labels if len(label) > level])
        gold = np.unique(known, return_inverse=True)[1]
        cluster_SN, times_SN = np.full((len(runs), len(gold)), -1), np.zeros((len(runs), len(gold)), np.int64)
        for run, cluster in enumerate(runs):
            picked = draws.choices(range(len(gold)), k=task.max_documents_per_cluster)
            cluster_SN[run, picked] = cluster  # equal texts are in one cluster
            times_SN[run] = np.bincount(picked, minlength=len(gold))
        arrays |= {f"{name}/cluster": cluster_SN, f"{name}/times": times_SN, f"{name}/gold": gold}
    return arrays


def _value(arrays: Arrays) -> float:
    """Returns the main score that the arrays of one split and subset give."""
    from scipy.stats import spearmanr
    from sklearn.metrics import average_precision_score, v_measure_score

    if "score" in arrays:
        return float(arrays["score"].mean())
    if "cosine" in arrays and arrays["gold"].dtype == np.int64:
        return float(average_precision_score(arrays["gold"], arrays["cosine"]))
    if "cosine" in arrays:
        return float(spearmanr(arrays["gold"], arrays["cosine"])[0])
    values = []
    for part in [name.removesuffix("gold") for name in arrays if name.endswith("/gold")]:
        gold, clusters = arrays[f"{part}gold"], arrays[f"{part}cluster"]
        for cluster, times in zip(clusters, arrays.get(f"{part}times", np.ones_like(clusters)), strict=True):
            values.append(v_measure_score(np.repeat(gold, times), np.repeat(cluster, times)))
    return float(np.mean(values))
