"""AIR-Bench 24.05: scores the dev splits, and writes the search results of the test splits for a submission.

A set is a corpus with questions, of one task (`qa`, or `long-doc`: chunks of a long document), domain and language
(`airbench_sets`). Judgements of the dev splits are public, those of the test splits are not. One folder has all results
of a model:

    model.json                                 the model, the instruction and the version; others are refused
    qa_wiki_en.json, qa_wiki_en.items.npz      scores of a dev split, as `write_results` writes them
    NoReranker/qa/wiki/en_default_test.json    search results of a test split, laid out as by air-benchmark
    <model>_NoReranker.zip                     all of these search results, for the leaderboard
    vectors/                                   the vectors of a corpus that is not finished, in shards

`Q` queries, `K` hits of a query, `N` queries with a score.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from embedwright.encoders.options import WithOptions
from embedwright.encoders.protocol import Encoder, encode_finite
from embedwright.encoders.sharded import itself
from embedwright.errors import InputError, OutOfReachError, as_input_error
from embedwright.evaluation.about import about
from embedwright.evaluation.bench.airbench_sets import NAME, AirSet, sets_file
from embedwright.evaluation.bench.hub import open_splits
from embedwright.evaluation.results import Result, Results, Row, read_results, write_results
from embedwright.files import whole_file, write_json, write_text
from embedwright.fingerprint import differences, fingerprint_of
from embedwright.model.embedder import Embedder
from embedwright.vectors.search import top_k
from embedwright.vectors.store import encode_texts

LEADERBOARD = "https://huggingface.co/spaces/AIR-Bench/leaderboard"
MAIN = {"qa": "nDCG@10", "long-doc": "Recall@10"}
DEPTH = 1000  # hits of a query in a submission
_MEASURES = {"nDCG@10": "ndcg_cut_10", "Recall@10": "recall_10", "MAP@10": "map_cut_10", "Recall@100": "recall_100"}

logger = logging.getLogger(__name__)

Hits = dict[str, dict[str, float]]  # query id -> document id -> score, best first


def bench(
    encoder: Encoder,
    model: str,
    sets: Sequence[AirSet],
    home: Path,
    *,
    max_tokens: int | None = None,
    progress: Callable[[str], None],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Runs a model on sets, and writes scores and search results into the folder `home`.

    Questions get the instruction of `airbench_sets.yaml`, documents none. What is in `home` already is not done again,
    and a corpus that was stopped half-way goes on by shards. Hits are exact, by inner product.

    Args:
        encoder: The model.
        model: Its name in the results.
        sets: What `choose` returns.
        home: The folder of this model's results.
        max_tokens: Tokens after which a text is cut. Default: where the model cuts.
        progress: A function that gets lines.
        advance: A function that gets the number of documents done, and that of all documents.

    Returns:
        Why a set failed, by its name. The results of the others are kept.

    Raises:
        InputError: `home` has results of another model, instruction, version or length.
    """
    if max_tokens is not None:
        if not isinstance(own := itself(encoder), Embedder):
            raise InputError(f"max_tokens={max_tokens}: a {type(own).__name__} cuts texts where it wants")
        encoder = WithOptions(encoder, {"max_tokens": max_tokens})
    version, instruction = sets_file()["version"], sets_file()["instruction"]
    facts = about(model, fingerprint_of(encoder)) | {"instruction": instruction, "version": version}
    _claim(home, {key: facts[key] for key in ("model", "fingerprint", "instruction", "version")})
    todo = {one: [split for split in one.splits if not _file(home, one, split).exists()] for one in sets}
    progress(f"sets: {len(sets)}, done before: {sum(not splits for splits in todo.values())}")
    left, failed = [one for one in sets if todo[one]], dict[str, str]()
    total, done, unreached = sum(one.documents for one in left), 0, False

    def count(documents: int) -> None:
        nonlocal done
        done += documents
        advance(done, total)

    for one in left:
        where = f"[{left.index(one) + 1}/{len(left)}] {one.name}"
        progress(f"{where} ({', '.join(todo[one])}): {one.documents:,} documents")
        try:
            for row in _run(encoder, one, todo[one], home, facts, count, offline=unreached):
                progress(f"{where}: {row.metric} {row.value:.4f}")
        except Exception as error:  # whatever it is, the other sets go on
            logger.debug("%s failed", one.name, exc_info=True)
            unreached |= isinstance(error, OutOfReachError)
            failed[one.name] = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            progress(f"{where}: FAILED")
    return failed


def _claim(home: Path, own: dict[str, Any]) -> None:
    """Makes `home` the folder of this model. Raises InputError if it is that of another one."""
    file = home / "model.json"
    if not file.exists():
        write_json(file, own)
        return
    with as_input_error(file, "is not what `embedwright bench` has written"):
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [key for key in ("instruction", "version") if before[key] != own[key]]
        if before["fingerprint"] != own["fingerprint"]:
            changed.append(f"the model: {differences(before['fingerprint'] or {}, own['fingerprint'] or {})}")
    if changed:
        raise InputError(f"{home} holds results made otherwise ({'; '.join(changed)}): take another --out")


def _file(home: Path, one: AirSet, split: str) -> Path:
    """Returns where the results of a split go."""
    if split == "dev":
        return home / f"{one.name}.json"
    return home / "NoReranker" / one.task / one.domain / f"{one.language}_{one.dataset}_{split}.json"


def _run(
    encoder: Encoder,
    one: AirSet,
    splits: Sequence[str],
    home: Path,
    facts: dict[str, Any],
    advance: Callable[[int], None],
    offline: bool,
) -> list[Result]:
    """Runs one set, and returns the row of its dev split if that is asked for. Loads all files before it encodes."""
    started, version, key = time.perf_counter(), facts["version"], one.dataset.replace("-", "_")
    parts = {split: f"queries_{key}_{split}" for split in splits}
    tables, commits = open_splits(one.repository, version, [f"corpus_{key}", *parts.values()], offline)
    judged: dict[str, dict[str, int]] = {}
    if "dev" in splits:
        repository = f"{NAME}/qrels-{one.repository.partition('/')[2]}-dev"
        judgements, more = open_splits(repository, version, [f"qrels_{key}_dev"], offline)
        commits |= more
        for row in judgements[f"qrels_{key}_dev"]:
            judged.setdefault(str(row["qid"]), {})[str(row["docid"])] = int(row["relevance"])
    corpus, folder = tables[f"corpus_{key}"], home / "vectors" / one.name
    if len(corpus) != one.documents:
        told = f"{one.repository}: corpus_{key} has {len(corpus):,} documents here, and {one.documents:,} in {version}"
        if offline or constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{told}: the cache has a part of its files, or other ones. `hf download {one.repository} --repo-type "
                f"dataset --include README.md '{version}/*'` brings all"
            )
        logger.warning("%s: the hub's files are others than in air-benchmark's table", told)  # all were fetched
    vectors = encode_texts(encoder, lambda: _texts(corpus), len(corpus), folder=folder, advance=advance)
    ids = [str(id_) for id_ in corpus["id"]]
    rows: list[Result] = []
    for split, part in parts.items():
        texts = list(_texts(tables[part]))
        scores_QK, rows_QK = top_k(encode_finite(encoder, texts, facts["instruction"]), vectors, DEPTH)
        hits = {
            str(query): dict(zip((ids[row] for row in row_K), score_K, strict=True))
            for query, row_K, score_K in zip(tables[part]["id"], rows_QK.tolist(), scores_QK.tolist(), strict=True)
        }
        if split == "dev":
            rows.append(_scored(one, hits, judged))
            # a suite of its own for each task, whose metrics are two: no mean is over both
            seconds, made = time.perf_counter() - started, facts | {"data": commits}
            write_results(_file(home, one, split), Results(f"{NAME} {one.task} dev", tuple(rows), seconds, made))
        else:
            write_text(_file(home, one, split), _submission(one, split, home.name, hits))
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # other sets are under way
        folder.parent.rmdir()
    return rows


def _scored(one: AirSet, hits: Hits, judged: Mapping[str, Mapping[str, int]]) -> Result:
    """Scores the hits of the queries that have judgements, by trec_eval, as air-benchmark does."""
    import pytrec_eval

    measures = {"ndcg_cut.10", "recall.10,100", "map_cut.10"}
    found = pytrec_eval.RelevanceEvaluator({query: dict(own) for query, own in judged.items()}, measures).evaluate(hits)
    if not found:
        raise InputError(f"{one.repository}: no query of its dev split has a judgement")
    by_query = {name: np.array([of[measure] for of in found.values()]) for name, measure in _MEASURES.items()}
    details = {name: float(score_N.mean()) for name, score_N in by_query.items()}
    metric = MAIN[one.task]
    items = {"score": by_query[metric], "id": np.array(list(found))}
    return Result(one.name, "retrieval", metric, details.pop(metric), details, items)


def _submission(one: AirSet, split: str, model: str, hits: Hits) -> str:
    """Returns a file of search results as air-benchmark writes and reads it."""
    names = {"task_type": one.task, "domain": one.domain, "language": one.language, "dataset_name": one.dataset}
    head = {"model_name": model, "reranker_name": "NoReranker", "benchmark_version": sets_file()["version"], **names}
    return json.dumps({**head, "split": split, "search_results": hits})


def pack(home: Path) -> Path | None:
    """Packs all search results of test splits into the zip file that the leaderboard takes. None if there are none."""
    files = sorted(home.glob("NoReranker/*/*/*_test.json"))
    if not files:
        return None
    packed = home / f"{home.name}_NoReranker.zip"
    with whole_file(packed) as temp, zipfile.ZipFile(temp, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.relative_to(home / "NoReranker"))
    return packed


def table(home: Path, sets: Sequence[AirSet]) -> list[Row]:
    """Returns the dev scores in `home` that `sets` ask for and their mean by task, beside published ones of 24.04."""
    rows: list[Row] = []
    for task, metric in MAIN.items():
        asked = [one for one in sets if one.task == task and "dev" in one.splits]
        own = [(one, file) for one in asked if (file := _file(home, one, "dev")).exists()]
        scored: list[Row] = []
        for one, file in own:
            row: Row = {"set": one.name, "split": "dev", "metric": metric, home.name: read_results(file).rows[0].value}
            for model, tasks in sets_file()["published"].items():
                known = tasks.get(task, {}).get(one.domain) if one.language == "en" else None
                row[f"{model} (24.04)"] = None if known is None else known / 100
            scored.append(row)
        if len(scored) > 1:
            mean: Row = {"set": f"mean of {len(scored)}", "split": "dev", "metric": metric}
            mean |= {column: _mean([row[column] for row in scored]) for column in scored[0] if column not in mean}
            scored.append(mean)
        rows += scored
    return rows


def _mean(values: Sequence[str | float | None]) -> float | None:
    """Returns the mean, or None if a value is missing: a mean of fewer sets is another number."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def _texts(rows: Any) -> Iterator[str]:
    """Gives the texts of a table, a batch of rows in memory at a time."""
    for batch in rows.iter(1000):
        yield from batch["text"]
