"""AIR-Bench from a filled cache of the hub: its scores are those of brute force, and a killed run goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hub_cache import SHA, offline, put
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from numpy.typing import NDArray

from embedwright.cli import main as cli
from embedwright.errors import InputError
from embedwright.evaluation.bench import airbench, airbench_sets
from embedwright.evaluation.bench.airbench import bench, pack, table
from embedwright.evaluation.bench.airbench_sets import choose
from embedwright.evaluation.results import read_results

VERSION = "AIR-Bench_24.05"
MODULES = (statistics, textwrap, shutil, zipfile, subprocess, socket, json, inspect, os, math)


class Words:
    """Encodes a text as its hashed words; questions with their instruction, whose words count little."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.tasks: set[str | None] = set()

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.encoded += texts
        self.tasks.add(task)
        vectors_NE = np.full((len(texts), 64), 1e-3, np.float32)
        for row, text in enumerate(texts):
            for word, weight in [(w, 1.0) for w in text.lower().split()] + [(w, 0.1) for w in (task or "").split()]:
                vectors_NE[row, int(hashlib.sha256(word.encode()).hexdigest(), 16) % 64] += weight
        unit_NE: NDArray[np.float32] = vectors_NE / np.linalg.norm(vectors_NE, axis=1, keepdims=True)
        return unit_NE

    def fingerprint(self) -> dict[str, str]:
        return {"weights": "words"}


def documentation() -> list[tuple[str, str]]:
    """Real text: (summary, body) of functions of Python's own library."""
    found: dict[str, str] = {}
    for module in MODULES:
        for _, item in inspect.getmembers(module, lambda item: inspect.isroutine(item) or inspect.isclass(item)):
            summary, _, body = (inspect.getdoc(item) or "").partition("\n\n")
            if len(body) > 80 and "\n" not in summary and body not in found.values():
                found.setdefault(summary, body)
    return list(found.items())


def filled(hub: Path) -> dict[str, Any]:
    """A cache with `AIR-Bench/qa_arxiv_en` and one set of `AIR-Bench/long-doc_book_en`, in the hub's own layout."""
    pairs = documentation()
    corpus = [{"id": f"doc-{i}", "text": body} for i, (_, body) in enumerate(pairs)]
    queries = [{"id": f"q-{i}", "text": summary} for i, (summary, _) in enumerate(pairs)]
    dev, test = queries[::3], queries[1::3]
    judged = [{"qid": query["id"], "docid": f"doc-{query['id'][2:]}", "relevance": 1} for query in dev]
    judged += [
        {"qid": query["id"], "docid": f"doc-{(int(query['id'][2:]) + 1) % len(corpus)}", "relevance": 1}
        for query in dev[::2]
    ]
    judged += [
        {"qid": query["id"], "docid": f"doc-{(int(query['id'][2:]) + 2) % len(corpus)}", "relevance": 0}
        for query in dev
    ]
    put(
        hub,
        "AIR-Bench/qa_arxiv_en",
        VERSION,
        {
            "corpus_default": ("default/corpus.jsonl", corpus),
            "queries_default_dev": ("default/dev_queries.jsonl", dev),
            "queries_default_test": ("default/test_queries.jsonl", test),
        },
    )
    put(hub, "AIR-Bench/qrels-qa_arxiv_en-dev", VERSION, {"qrels_default_dev": ("default/dev_qrels.jsonl", judged)})
    name, split = "a-brief-history-of-time_stephen-hawking", "a_brief_history_of_time_stephen_hawking"
    book = {
        f"corpus_{split}": (f"{name}/corpus.jsonl", corpus),
        f"queries_{split}_dev": (f"{name}/dev_queries.jsonl", dev),
    }
    put(hub, "AIR-Bench/long-doc_book_en", VERSION, book)
    put(
        hub,
        "AIR-Bench/qrels-long-doc_book_en-dev",
        VERSION,
        {f"qrels_{split}_dev": (f"{name}/dev_qrels.jsonl", judged)},
    )
    return {"corpus": corpus, "dev": dev, "test": test, "judged": judged}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    offline(monkeypatch, tmp_path)
    return small(monkeypatch, filled(tmp_path / "hub"))


def small(patch: pytest.MonkeyPatch, made: dict[str, Any]) -> dict[str, Any]:
    """Says of all sets that they are as large as those that `filled` has made."""
    sets = [one._replace(documents=len(made["corpus"])) for one in airbench_sets._sets()]
    patch.setattr(airbench_sets, "_sets", lambda: sets)
    return made


def test_the_dev_splits_score_as_brute_force_does(hub: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    sets = choose("AIR-Bench/qa/arxiv/en", "AIR-Bench/book/dev")
    model, home = Words(), tmp_path / "air-bench" / "words"
    counted: list[tuple[int, int]] = []
    advance = lambda done, total: counted.append((done, total))  # noqa: E731
    assert bench(model, "words", sets, home, progress=said.append, advance=advance) == {}
    assert model.tasks == {None, "Given a question, retrieve passages that answer the question"}
    expected = by_hand(hub, next(task for task in model.tasks if task))
    for one in sets:
        results = read_results(home / f"{one.name}.json")
        (row,) = results.rows
        metric = {"qa": "nDCG@10", "long-doc": "Recall@10"}[one.task]
        assert (row.task, row.kind, row.metric) == (one.name, "retrieval", metric)
        assert row.items["id"].tolist() == [query["id"] for query in hub["dev"]]
        np.testing.assert_allclose(row.items["score"], [expected[metric][id_] for id_ in row.items["id"]], atol=1e-9)
        assert row.value == pytest.approx(np.mean(list(expected[metric].values())), abs=1e-9)
        assert 0.1 < row.value < 0.95  # neither trivial nor hopeless, else the comparison would say little
        assert results.about["data"][f"AIR-Bench/qrels-{one.repository[10:]}-dev"] == SHA
        assert results.about["fingerprint"] == {"weights": "words"}
    assert counted[-1] == (2 * len(hub["corpus"]), 2 * len(hub["corpus"]))
    assert not (home / "vectors").exists()
    suites = [read_results(home / f"{one.name}.json").suite for one in sets]
    assert suites == ["AIR-Bench qa dev", "AIR-Bench long-doc dev"]  # else `compare` makes one mean of two metrics


def by_hand(hub: dict[str, Any], instruction: str) -> dict[str, dict[str, float]]:
    """nDCG@10 and Recall@10 of each dev query, by numpy and the definitions."""
    encode = Words().encode
    scores_QC = encode([q["text"] for q in hub["dev"]], instruction) @ encode([d["text"] for d in hub["corpus"]]).T
    found: dict[str, dict[str, float]] = {"nDCG@10": {}, "Recall@10": {}}
    for query, scores_C in zip(hub["dev"], scores_QC.astype(np.float64), strict=True):
        good = {row["docid"] for row in hub["judged"] if row["qid"] == query["id"] and row["relevance"] > 0}
        ranked = [hub["corpus"][place]["id"] for place in np.argsort(-scores_C, kind="stable")[:10]]
        gain = sum(1 / math.log2(rank + 2) for rank, document in enumerate(ranked) if document in good)
        found["nDCG@10"][query["id"]] = gain / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(good))))
        found["Recall@10"][query["id"]] = len(good & {*ranked}) / len(good)
    return found


def test_search_results_of_the_test_split_have_the_layout_of_a_submission(hub: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "words"
    assert bench(Words(), "words", choose("AIR-Bench/qa/arxiv/en"), home, progress=lambda line: None) == {}
    written = json.loads((home / "NoReranker" / "qa" / "arxiv" / "en_default_test.json").read_text())
    # what air-benchmark's Evaluator.check_data_info compares, and what its load_search_results takes out
    results = written.pop("search_results")
    assert written == {
        "model_name": "words",
        "reranker_name": "NoReranker",
        "benchmark_version": "AIR-Bench_24.05",
        "task_type": "qa",
        "domain": "arxiv",
        "language": "en",
        "dataset_name": "default",
        "split": "test",
    }
    assert list(results) == [query["id"] for query in hub["test"]]
    depth = min(1000, len(hub["corpus"]))
    for hits in results.values():
        assert len(hits) == depth and {*hits} <= {row["id"] for row in hub["corpus"]}
        assert list(hits.values()) == sorted(hits.values(), reverse=True)
    packed = pack(home)
    assert packed is not None and packed.name == "words_NoReranker.zip"
    with zipfile.ZipFile(packed) as archive:  # its dev results are no part of it, as in zip_results.py
        assert archive.namelist() == ["qa/arxiv/en_default_test.json"]


def test_a_killed_run_goes_on_with_what_is_missing(hub: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("embedwright.vectors.store._SHARD", 50)
    shards, last = divmod(len(hub["corpus"]), 50)
    assert shards >= 3 and last
    home, sets, killed = tmp_path / "words", choose("AIR-Bench/qa/arxiv/en"), Words()
    script = textwrap.dedent(
        f"""
        import os, pathlib, signal, sys
        sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
        from huggingface_hub import constants
        from datasets import config
        import embedwright.vectors.store, pytest, test_airbench
        from embedwright.evaluation.bench.airbench import bench
        from embedwright.evaluation.bench.airbench_sets import choose
        constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE = {constants.HF_HUB_CACHE!r}, {str(tmp_path / "datasets")!r}
        embedwright.vectors.store._SHARD = 50

        class Killed(test_airbench.Words):
            def encode(self, texts, task=None):
                if len(self.encoded) > 100:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().encode(texts, task)

        test_airbench.small(pytest.MonkeyPatch(), {{"corpus": range({len(hub["corpus"])})}})
        bench(Killed(), "words", choose("AIR-Bench/qa/arxiv/en"), pathlib.Path({str(home)!r}), progress=print)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()
    there = len(list(home.glob("vectors/*/*/shard-*.arrow")))
    assert 1 <= there < shards
    assert bench(killed, "words", sets, home, progress=lambda line: None) == {}
    documents = [text for text in killed.encoded if text in {row["text"] for row in hub["corpus"]}]
    assert documents == [row["text"] for row in hub["corpus"][50 * there :]]
    whole = tmp_path / "whole"
    bench(Words(), "words", sets, whole, progress=lambda line: None)
    assert read_results(whole / "qa_arxiv_en.json").rows == read_results(home / "qa_arxiv_en.json").rows
    again, said = Words(), list[str]()
    assert bench(again, "words", sets, home, progress=said.append) == {}
    assert again.encoded == [] and said == ["sets: 1, done before: 1"]


def test_results_of_another_model_are_not_mixed(hub: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    sets = choose("AIR-Bench/qa/arxiv/en/dev")
    bench(Words(), "words", sets, tmp_path / "words", progress=lambda line: None)
    monkeypatch.setattr(Words, "fingerprint", lambda self: {"weights": "others"})
    with pytest.raises(InputError, match=r"words holds results made otherwise .*weights.*another --out"):
        bench(Words(), "words", sets, tmp_path / "words", progress=lambda line: None)


def test_max_tokens_cuts_texts_and_is_part_of_the_results(
    hub: dict[str, Any], tmp_path: Path, tiny_embedder: Any
) -> None:
    model, sets, home = tiny_embedder("mean"), choose("AIR-Bench/qa/arxiv/en/dev"), tmp_path / "tiny"
    bench(model, "tiny", sets, home, max_tokens=120, progress=lambda line: None)
    queries, corpus = ([row["text"] for row in hub[part]] for part in ("dev", "corpus"))
    instruction = json.loads((home / "model.json").read_text())["instruction"]
    cut_QC = model.encode(queries, instruction, max_tokens=120) @ model.encode(corpus, max_tokens=120).T
    good = [{row["docid"] for row in hub["judged"] if row["qid"] == q["id"] and row["relevance"]} for q in hub["dev"]]
    found = [{hub["corpus"][place]["id"] for place in np.argsort(-scores)[:10]} for scores in cut_QC]
    recall = float(np.mean([len(a & b) / len(a) for a, b in zip(good, found, strict=True)]))
    assert read_results(home / "qa_arxiv_en.json").rows[0].details["Recall@10"] == pytest.approx(recall, abs=1e-9)
    with pytest.raises(InputError, match=r"max_tokens \(120, now not set\)"):
        bench(model, "tiny", sets, home, progress=lambda line: None)
    with pytest.raises(InputError, match="a Words cuts texts where it wants"):
        bench(Words(), "words", sets, tmp_path / "words", max_tokens=120, progress=lambda line: None)


def test_a_set_that_is_not_here_is_named_with_its_cache_and_the_rest_is_kept(
    hub: dict[str, Any], tmp_path: Path
) -> None:
    said: list[str] = []
    sets = [*choose("AIR-Bench/qa/law/en/dev"), *choose("AIR-Bench/qa/arxiv/dev")]
    failed = bench(Words(), "words", sets, tmp_path / "words", progress=said.append)
    assert list(failed) == ["qa_law_en"]
    bench(Words(), "words", choose("AIR-Bench/qa/arxiv/dev"), tmp_path / "words", progress=said.append)
    message = failed["qa_law_en"]
    place = tmp_path / "hub" / "datasets--AIR-Bench--qa_law_en"
    assert f"AIR-Bench/qa_law_en: the hub cannot be reached, and its cache {place} lacks corpus_default" in message
    assert f"hf download AIR-Bench/qa_law_en --repo-type dataset --include README.md '{VERSION}/*'" in message
    assert (tmp_path / "words" / "qa_arxiv_en.json").exists()
    rows = table(tmp_path / "words", sets)
    assert [row["set"] for row in rows] == ["qa_arxiv_en"] and rows[0]["NV-Embed-v1 (24.04)"] == pytest.approx(0.4610)


def test_a_hub_out_of_reach_is_asked_once(hub: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Each question to it costs 20 seconds of retries, and there are 69 sets."""
    asked: list[bool] = []

    def unreachable(*args: Any, local_files_only: bool, **kwargs: Any) -> NoReturn:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    sets = choose("AIR-Bench/qa/law/dev")
    assert len(bench(Words(), "words", sets, tmp_path / "words", progress=lambda line: None)) == 3
    assert asked == [False, True, True]


def test_nothing_is_encoded_before_all_files_are_there(hub: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hub" / "datasets--AIR-Bench--qrels-qa_arxiv_en-dev" / "refs" / "main").unlink()
    model = Words()
    failed = bench(model, "words", choose("AIR-Bench/qa/arxiv/dev"), tmp_path / "words", progress=lambda line: None)
    assert "lacks qrels_default_dev" in failed["qa_arxiv_en"]
    assert model.encoded == []
    assert bench(model, "words", choose("AIR-Bench/qa/arxiv/test"), tmp_path / "w", progress=lambda line: None) == {}


def test_half_a_corpus_is_an_error_of_its_set(hub: dict[str, Any], tmp_path: Path) -> None:
    """A corpus in several files, of which the cache has some, must not be scored as if it were whole."""
    model, (whole,) = Words(), choose("AIR-Bench/qa/arxiv/dev")
    half = whole._replace(documents=2 * whole.documents)
    failed = bench(model, "words", [half], tmp_path / "words", progress=lambda line: None)
    assert f"corpus_default has {whole.documents:,} documents here, and {half.documents:,} in" in failed["qa_arxiv_en"]
    assert model.encoded == [] and not (tmp_path / "words" / "qa_arxiv_en.json").exists()


def test_the_table_has_means_where_all_sets_have_a_score(hub: dict[str, Any], tmp_path: Path) -> None:
    sets = [*choose("AIR-Bench/qa/arxiv/en/dev"), *choose("AIR-Bench/book/dev")]
    bench(Words(), "words", sets, tmp_path / "words", progress=lambda line: None)
    first, second = table(tmp_path / "words", sets)
    assert first["words"] == read_results(tmp_path / "words" / "qa_arxiv_en.json").rows[0].value
    assert (second["metric"], second["NV-Embed-v2 (24.04)"]) == ("Recall@10", None)
    assert second["NV-Embed-v1 (24.04)"] == pytest.approx(0.7549)
    assert table(tmp_path / "words", choose("AIR-Bench/qa/arxiv/en/test")) == []
    assert [row["split"] for row in (first, second)] == ["dev", "dev"]
    assert airbench._mean([1.0, 3.0]) == 2.0 and airbench._mean([1.0, None]) is None


def test_the_command_scores_packs_and_says_what_failed(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], tiny_embedder: Any
) -> None:
    tiny_embedder("mean").save(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["embedwright", "bench", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            raise SystemExit(0)
        found = capsys.readouterr()
        return int(stopped.value.code or 0), found.out + found.err

    code, said = run("tiny", "AIR-Bench/qa/arxiv", "AIR-Bench/book/dev", "--out", "results", "--max-tokens", "200")
    assert code == 0, said
    rows = read_results(tmp_path / "results" / "air-bench" / "tiny" / "qa_arxiv_en.json")
    assert f"qa_arxiv_en: nDCG@10 {rows.rows[0].value:.4f}" in said
    assert re.search(r"qa_arxiv_en +dev +nDCG@10 +0\.\d{4} +0\.4894 +0\.4610", said)
    assert "results/air-bench/tiny/tiny_NoReranker.zip" in said and "spaces/AIR-Bench/leaderboard" in said
    assert rows.about["command"].startswith("embedwright bench tiny AIR-Bench/qa/arxiv")
    code, said = run("tiny", "AIR-Bench/law/fr/dev", "AIR-Bench/arxiv/qa", "--out", "results", "--max-tokens", "200")
    assert code == 1 and "1 of 2 sets failed" in said and "datasets--AIR-Bench--qa_law_fr lacks corpus_default" in said
    code, said = run("tiny", "AIR-Bench/qa/arxiv", "--out", "results")
    assert code == 2 and "results made otherwise" in said and "max_tokens (200, now not set)" in said
    code, said = run("tiny", "AIR-Bench/wiky", "--out", "results")
    assert code == 2 and "did you mean 'wiki'?" in said
    code, said = run("tiny", "AIR-Bench/qa", "SciFact", "--out", "results")
    assert code == 2 and "run AIR-Bench by itself" in said
