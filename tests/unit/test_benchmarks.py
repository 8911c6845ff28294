"""The benchmarks' own parts: what turns seconds into figures, and figures into the page of the docs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.cpu import kernels, onednn
from embedwright.model.embedder import Embedder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`part(name)`: a script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_PROC_BIND", "true")  # or the scripts would start again
    names = {file.stem for file in BENCHMARKS.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    yield importlib.import_module
    for name in names & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(before)


# ---- the page


def test_the_page_is_what_the_results_give(part: Any) -> None:
    report = part("report")
    results = report.read(report.RESULTS)
    assert report.PAGE.read_text() == report.render(results)
    assert report.PICTURE.is_file()
    readme = report.README.read_text()
    assert readme == report.with_headlines(readme, results)
    assert all(f"`{results[name]['command']}`" in readme for name in report.HEADLINES.values())
    planning = report.PLANNING.read_text()
    assert planning == report.with_runs(planning, results)


def test_no_result_names_a_path(part: Any) -> None:
    texts = {file.name: file.read_text() for file in part("report").RESULTS.glob("*.json")}
    assert texts
    assert [name for name, text in texts.items() if str(Path.home()) in text or "/tmp/" in text] == []


def test_the_goals_are_judged_by_the_median(part: Any) -> None:
    report = part("report")
    assert report.verdict("encode_fp32", []) == "not measured"
    assert report.verdict("encode_fp32", [2.4, 2.5, 9]) == "must"
    assert report.verdict("encode_fp32", [2.4, 2.4, 9]) == "missed"
    assert report.verdict("encode_fp32", [3, 3]) == "stretch"
    assert report.verdict("encode_int8", [2.7]) == "missed"  # it has no must
    assert [report.verdict("encode_memory", [v]) for v in (0.7, 0.8, 1, 1.1)] == ["stretch", "must", "must", "missed"]


def test_the_goal_table_takes_figures_from_all_results(part: Any) -> None:
    report = part("report")
    results = {
        "a": {"goals": {"mfu_bf16": [{"of": "x", "value": 0.5}, {"of": "y", "value": 0.7}]}},
        "b": {"goals": {"mfu_bf16": [{"of": "z", "value": 0.9}], "mining": [{"of": "m", "value": 3.0}]}},
    }
    table = "\n".join(report.goal_table(results))
    assert "| MFU bf16, linear layers' FLOPs only | 0.6 | 0.75 | **0.70** (0.50 to 0.90) | must |" in table
    assert "| mining, exact top-100 with the 95 % rule | 2.8x | 4x | **3.00x** | must |" in table
    assert table.count("not measured | not measured") == len(report.GOALS) - 2
    with pytest.raises(KeyError, match="speed"):
        report.goal_table({"a": {"goals": {"speed": []}}})


def test_what_is_possible_is_the_peers_time_over_that_of_the_products(part: Any) -> None:
    found = {"ratio": {"median": 1.5}, "peer_mfu": 0.5}
    encode = {"model": "m", "dtype": "float32", "sets": {"queries": found}}
    seconds = {"peer, torch, search": [9, 6, 6], "peer, faiss, search": [8] * 3, "int8 product alone": [4] * 3}
    mining = {"size": {"documents": 1000, "width": 8, "queries": 2}, "ratios": {"search": {"median": 1.2}}}
    section = "\n".join(part("report").ceiling_section({"a": encode, "b": mining | {"seconds": seconds}}))
    assert "| encode, m, float32, queries | 1.50x | 2.00x | 75% |" in section
    assert "| search, 1,000 x 8, 2 queries | 1.20x | 1.50x | 80% |" in section
    del seconds["int8 product alone"]
    assert part("report").ceiling_section({"b": mining | {"seconds": seconds}}) == []
    assert part("report").ceiling_section({"c": {"goals": {}}}) == []


# ---- figures


def test_a_ratio_is_the_median_of_the_rounds(part: Any) -> None:
    assert part("common").ratio([6, 4, 30], [2, 2, 10]) == {"median": 3, "least": 2, "most": 3}


def test_rounds_take_turns(part: Any) -> None:
    calls: list[str] = []
    seconds = part("common").rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 3
    assert [len(each) for each in seconds.values()] == [3, 3]


def test_peak_memory_is_that_of_the_run(part: Any) -> None:
    common = part("common")
    before = common.resident()
    assert common.peak_during(lambda: b"x" * 300 * common.MB) - before > 290 * common.MB
    assert common.peak_during(lambda: None) - before < 100 * common.MB  # an earlier peak does not count


def test_linear_flops(part: Any, tiny_embedder: Any) -> None:
    # hidden 32, heads 4 x 8, key/value heads 2 x 8, intermediate 48, 3 layers: two FLOPs for every weight
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert part("common").linear_flops(tiny_embedder("mean").network.backbone) == 2 * 3 * layer


def test_records_are_rounded(part: Any) -> None:
    assert part("common").rounded({1: [1.23456789, "a", 7], "b": (0.000123456789,)}) == {
        "1": [1.2346, "a", 7],
        "b": [0.00012346],
    }


# ---- texts


def test_text_sets(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = part("texts")
    monkeypatch.delenv("EMBEDWRIGHT_DATA", raising=False)  # docstrings: on every machine
    monkeypatch.setattr(texts, "_LIBRARIES", ("numpy",))
    words = lambda text: len(text.split())  # noqa: E731
    queries, prefix = texts.text_set("queries", 400, words)
    assert prefix == texts.PREFIX and sum(words(prefix + q) for q in queries[:-1]) < 400
    assert sum(words(prefix + q) for q in queries) >= 400
    passages, prefix = texts.text_set("passages", 400, words)
    assert prefix is None and all(words(p) >= texts.LONG for p in passages)
    mixed, _ = texts.text_set("mixed", 400, words)
    assert mixed[0] == queries[0] and mixed[1] == passages[0]
    assert texts.text_set("mixed", 400, words)[0] == mixed
    with pytest.raises(ValueError, match="fewer than 1000000000 tokens"):
        texts.text_set("mixed", 10**9, words)
    with pytest.raises(ValueError, match="'long' is none of"):
        texts.text_set("long", 1, words)


# ---- what is taken out of our path


def test_parts_taken_out_change_no_vector_and_are_put_back(
    part: Any, tiny_embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = part("split")
    model: Embedder = tiny_embedder("mean")
    texts = ["one", "two words", "and one", "a longer text of some more words"]
    expected = model.encode(texts)
    kinds = [type(module) for module in model.network.modules()]
    ran: list[str] = []
    run = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda name, *job: (ran.append(name), run(name, *job))[1])
    with split.stock_linears(model), split.text_by_text(model), split.without_kernels(model):
        inside = [type(module) for module in model.network.modules()]
        assert not any("OneDnn" in kind.__name__ for kind in inside)
        assert model.encode(texts) == pytest.approx(expected, abs=1e-5)
        assert not ran
    assert [type(module) for module in model.network.modules()] == kinds
    assert (model.encode(texts) == expected).all()
    assert bool(ran) == kernels.available()


def test_the_profile_is_all_of_the_time_in_parts(part: Any, tiny_embedder: Any) -> None:
    split = part("split")
    model = tiny_embedder("mean", family="qwen3")
    shares = split.profile(model, ["one text", "and another"], None)
    assert list(shares) == list(split.PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    assert not any("watched" in type(module).forward.__qualname__ for module in model.network.modules())


def test_a_part_is_not_charged_with_the_parts_in_it(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = part("common")
    ticks = iter([0, 0, 1, 3, 7, 15, 31])  # begins, enters, enters, leaves, leaves, ends
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    place = SimpleNamespace(inner=lambda: None)
    place.outer = lambda: place.inner()
    before = vars(place).copy()
    found = common.own_seconds(lambda: place.outer(), [(place, "outer", "a"), (place, "inner", "b")], "rest")
    assert found == {"a": 2 + 8, "b": 4, "rest": 1 + 16}
    assert vars(place) == before


def test_every_kernel_of_the_linears_runs(part: Any) -> None:
    if not onednn.available():
        pytest.skip("oneDNN's linear is not usable here")
    found = part("linears").gflops(32, torch.float32, 1)
    assert found.keys() == {"torch", "onednn", "onednn_reordered"} and min(found.values()) > 0


def test_the_peers_best_batch_is_found(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = part("models")
    seconds = {1: 9.0, 2: 5.0, 4: 4.0, 8: 4.2, 16: 4.3, 32: 6.0}
    monkeypatch.setattr(models, "encode_peer", lambda peer, texts, prefix, batch: tried.append(batch))
    monkeypatch.setattr(models, "timed", lambda run: run() or seconds[tried[-1]])
    tried: list[int] = []
    best, found = models.best_batch(None, ["text"], None)
    assert best == 4 and found == {2: 5.0, 4: 4.0, 8: 4.2, 16: 4.3, 32: 6.0}


def test_results_are_json_with_a_command(part: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common = part("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["/somewhere/else/encode.py", "--dtype", "float32"])
    common.record("x", {"seconds": 1.23456789}, {"mining": []})
    record = json.loads((tmp_path / "results" / "x.json").read_text())
    assert record["command"] == "python benchmarks/encode.py --dtype float32"
    assert record["seconds"] == 1.2346 and record["goals"] == {"mining": []}
    assert {"cpu", "cores", "threads", "torch"} <= record["machine"].keys()


# ---- mistakes of the contract

DOCUMENTS = ["the moon is far away, and it pulls at the sea", "tides", "a dog that does not mind the rain at all"]


@pytest.fixture
def mistakes(part: Any, tiny_embedder: Any) -> Any:
    """`mistakes(name, texts, task)`: the vectors of a tiny model that makes this mistake; without a name, of none."""
    module, model = part("contract_mistakes"), tiny_embedder("latent", bos=True)
    made = {**module.MISTAKES, None: module.Mistake("none")}
    vectors = lambda name, texts, task: module.Mistaken(model, made[name], "Find it").encode(texts, task)  # noqa: E731
    return SimpleNamespace(names=[*module.MISTAKES], vectors=vectors, model=model, module=module)


def test_without_a_mistake_vectors_are_the_models(mistakes: Any) -> None:
    for task in (None, "Find it"):
        found = mistakes.vectors(None, DOCUMENTS, task)
        np.testing.assert_allclose(found, mistakes.model.encode(DOCUMENTS, task), atol=1e-6)


def test_each_mistake_changes_vectors(mistakes: Any) -> None:
    right = {task: mistakes.model.encode(DOCUMENTS, task) for task in (None, "Find it")}
    moved = {
        name: [bool(np.abs(mistakes.vectors(name, DOCUMENTS, task) - own).max() > 1e-4) for task, own in right.items()]
        for name in mistakes.names
    }
    of_queries = {"no-instruction", "no-newline", "prefix-pooled"}
    expected = {name: [name not in of_queries, name != "on-documents"] for name in mistakes.names}
    assert moved == expected


def test_mistakes_are_what_they_say(mistakes: Any, tiny_embedder: Any) -> None:
    model, vectors = mistakes.model, mistakes.vectors
    close = lambda found, expected: np.testing.assert_allclose(found, expected, atol=1e-6)  # noqa: E731
    close(vectors("no-instruction", DOCUMENTS, "Find it"), model.encode(DOCUMENTS))
    close(vectors("on-documents", DOCUMENTS, None), model.encode(DOCUMENTS, "Find it"))
    close(vectors("no-newline", DOCUMENTS, "Find it"), model.encode(DOCUMENTS, prefix="Instruct: Find it Query: "))
    causal = tiny_embedder("latent", bos=True, attention="causal")
    close(vectors("other-mask", DOCUMENTS, None), causal.encode(DOCUMENTS))
    assert model.network.backbone.config.is_causal is False  # as before
    alone = np.concatenate([vectors("padding-pooled", [text], None) for text in DOCUMENTS])
    close(alone, model.encode(DOCUMENTS))  # one text alone has no padding


def test_the_script_scores_each_mistake(
    mistakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text1": a, "text2": b, "score": n} for n, (a, b) in enumerate(zip(DOCUMENTS, DOCUMENTS[1:] * 2))]  # noqa: B905
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = {"name": "s", "tasks": [{"name": "sts", "kind": "sts", "path": "sts.jsonl", "instruction": "Find it"}]}
    (tmp_path / "s.yaml").write_text(json.dumps(suite))
    mistakes.model.save(tmp_path / "model")
    words = [
        "contract_mistakes.py",
        str(tmp_path / "model"),
        str(tmp_path / "s.yaml"),
        "--only",
        "no-eos",
        "other-mask",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "out.json")])
    mistakes.module.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        found["scores"].keys() == {"right", "no-eos", "other-mask"} and found["mistakes"]["no-eos"] == "EOS is missing"
    )
    assert found["scores"]["right"].keys() == {"sts"} and found["about"]["fingerprint"] == mistakes.model.fingerprint()
    assert "other-mask" in capsys.readouterr().out
