"""The benchmarks' own parts: what turns seconds into figures, and figures into the page of the docs."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

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
    assert report.PAGE.read_text() == report.render(results, report.read_earlier(report.RESULTS))
    assert report.PICTURE.is_file()
    readme = report.README.read_text()
    assert readme == report.with_headlines(readme, results)
    assert all(f"`{results[name]['command']}`" in readme for name in report.HEADLINES.values())
    planning = report.PLANNING.read_text()
    assert planning == report.with_runs(planning, results)


def test_no_result_names_a_path(part: Any) -> None:
    texts = {file.name: file.read_text() for file in part("report").RESULTS.rglob("*.json")}
    assert texts
    assert [name for name, text in texts.items() if str(Path.home()) in text or "/tmp/" in text] == []


def test_the_goals_are_judged_by_the_median(part: Any) -> None:
    report = part("report")
    assert report.verdict("encode_fp32", []) == "not measured"
    assert report.verdict("encode_fp32", [2.4, 2.5, 9]) == "must"
    assert report.verdict("encode_fp32", [2.4, 2.4, 9]) == "missed"
    assert report.verdict("encode_fp32", [3, 3]) == "stretch"
    assert report.verdict("mfu_int8", [0.5]) == "missed"  # it has no must
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
    low = {"int8": {"faster_than": {"peer": {"median": 3.0}}, "peer_mfu": 0.2}}
    both = {"model": "m", "dtype": "bfloat16", "sets": {"mixed": found | low}}
    seconds = {"peer, torch, search": [9, 6, 6], "peer, faiss, search": [8] * 3, "int8 product alone": [4] * 3}
    mining = {"size": {"documents": 1000, "width": 8, "queries": 2}, "ratios": {"search": {"median": 1.2}}}
    ceiling_section = part("sections").ceiling_section
    section = "\n".join(ceiling_section({"a": encode, "b": mining | {"seconds": seconds}, "c": both}))
    assert "| encode, m, float32, queries | 1.50x | 2.00x | 75% |" in section
    assert "| encode, m, bfloat16, mixed | 1.50x | 2.00x | 75% |" in section
    assert "| encode, m, int8, mixed | 3.00x | 5.00x | 60% |" in section
    assert "| search, 1,000 x 8, 2 queries | 1.20x | 1.50x | 80% |" in section
    del seconds["int8 product alone"]
    assert ceiling_section({"b": mining | {"seconds": seconds}}) == []
    assert ceiling_section({"c": {"goals": {}}}) == []


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


def test_layer_shapes_are_counted_from_the_config(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = part("models")
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    monkeypatch.setattr(models, "_qwen3_config", lambda: config)
    shapes = models.layer_shapes("qwen3-0.6b-shape")
    assert shapes == {(32, 32): 6, (32, 16): 6, (32, 48): 6, (48, 32): 3}  # q and o, k and v, gate and up, down
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert part("peaks").flops(shapes) == 2 * 3 * layer


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


def test_each_piece_is_taken_out_alone(part: Any, tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.available() or not onednn.gated_available():
        pytest.skip("no C compiler, or no oneDNN, on this machine")
    split = part("split")
    model = Embedder.from_decoder(tiny_decoder("llama", head_dim=32), pooling="mean")
    texts = ["one", "two words", "and one", "a longer text of some more words"]
    expected = model.encode(texts)
    kinds = [type(module) for module in model.network.modules()]
    ran: set[str] = set()
    run = kernels._run
    monkeypatch.setattr(kernels, "_run", lambda name, *job: (ran.add(name), run(name, *job))[1])
    missing = {"attention": "attention", "norms": "norm", "rotary": "rotary"}  # by the first word of a piece
    for piece, change in split.PIECES.items():
        ran.clear()
        with change(model):
            changed = sum(type(module) is not kind for module, kind in zip(model.network.modules(), kinds, strict=True))
            assert model.encode(texts) == pytest.approx(expected, abs=1e-5)
        gone = missing.get(piece.split()[0])
        assert ran == {"attention", "norm", "rotary"} - {gone}, piece
        assert bool(changed) == (gone != "attention"), piece
        assert [type(module) for module in model.network.modules()] == kinds


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


def test_every_product_that_is_timed_is_right(part: Any) -> None:
    if not onednn.gated_available():
        pytest.skip("oneDNN's products are not usable here")
    peaks = part("peaks")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        kernels = peaks.kernels(dtype, (64, 32), 48)
        assert kernels.keys() == {"torch", "onednn", "onednn_reordered"}
        exact = kernels["torch"]().float()
        for product in kernels.values():
            torch.testing.assert_close(
                product().float(), exact, rtol=0.02, atol=1e-4 if dtype == torch.float32 else 0.1
            )
    if not onednn.int8_matmul_available():
        pytest.skip("this processor has no fast products in int8")
    kernels = peaks.kernels(torch.int8, (64, 32), 48)
    assert kernels.keys() >= {"int_mm", "qlinear"}
    whole = kernels.pop("int_mm")()
    assert whole.dtype == torch.int32 and whole.abs().max() > 1000
    for product in kernels.values():  # both scales are 0.01
        torch.testing.assert_close(product().float(), whole * 1e-4, rtol=0.02, atol=1e-3)
    found = peaks.product_seconds(torch.int8, [(64, 32)], 48, 1)
    assert found.keys() == {(64, 32)} and min(found[64, 32].values()) > 0


def test_a_peak_is_of_all_products_each_at_its_fastest(part: Any) -> None:
    peaks = part("peaks")
    # 2 x (1, 2) and 1 x (3, 4): 4 FLOPs a row each, and 24. The fastest: 1 s for 10 rows, and 2 s for 20 rows.
    seconds = {
        10: {(1, 2): {"a": 3.0, "b": 1.0}, (3, 4): {"a": 9.0, "b": 2.0}},
        20: {(1, 2): {"a": 4.0, "b": 5.0}, (3, 4): {"a": 2.0, "b": 7.0}},
    }
    assert peaks.peak_of({(1, 2): 2, (3, 4): 1}, seconds) == pytest.approx((2 * 4 + 24) / (2 * 0.1 + 0.1))
    assert peaks.over_all_shapes(seconds[10], 10) == {"a": 10 * 28 / 12 / 1e9, "b": 10 * 28 / 3 / 1e9}


def test_the_peers_best_batch_is_found(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = part("models")
    seconds = {1: 9.0, 2: 5.0, 4: 4.0, 8: 4.2, 16: 4.3, 32: 6.0}
    monkeypatch.setattr(models, "timed", lambda run: run() or seconds[tried[-1]])
    tried: list[int] = []
    best, found = models.best_batch(lambda texts, prefix, batch: tried.append(batch), ["text"], None)
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


def test_each_processor_keeps_its_newest_record(part: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    common, report = part("common"), part("report")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    machine = common.machine()

    def run(cpu: str, seconds: float) -> None:
        monkeypatch.setattr(common, "machine", lambda: machine | {"cpu": cpu})
        common.record("x", {"seconds": seconds}, {})

    def seconds(file: str) -> float:
        return float(json.loads((tmp_path / file).read_text())["seconds"])

    run("One (family 1, model 2)", 1.0)
    run("One (family 1, model 2)", 2.0)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    run("Two", 3.0)
    assert (seconds("x.json"), seconds("earlier/one-family-1-model-2/x.json")) == (3, 2)
    run("One (family 1, model 2)", 4.0)
    assert (seconds("x.json"), seconds("earlier/two/x.json")) == (4, 3)
    assert not (tmp_path / "earlier/one-family-1-model-2/x.json").exists()
    assert [records["x"]["machine"]["cpu"] for records in report.read_earlier(tmp_path)] == ["Two"]


def test_tables_of_earlier_processors_stand_below_and_dated(part: Any) -> None:
    report = part("report")
    results = report.read(report.RESULTS)
    name = next(name for name in results if name.startswith("mining-"))
    older = results[name] | {"date": "2020-01-02", "machine": results[name]["machine"] | {"cpu": "Old One"}}
    newest, page = report.render(results), report.render(results, [{name: older}])
    assert page.startswith(newest)  # goals too are of the newest runs alone
    below = page.removeprefix(newest)
    assert "## Earlier: Old One\n" in below and "; 2020-01-02 (mining-" in below
    assert "### Mining\n" in below and "documents | seconds, ours / ST" in below
    assert "as ST's `mine_hard_negatives` does it" in newest and "as ST's `mine_hard_negatives` does it" not in below


def test_the_gpus_section_says_how_busy_it_is_and_what_compiling_brings(part: Any) -> None:
    gpu_section, record = part("gpu_section").gpu_section, part("report").read(part("report").RESULTS)["gpu"]
    assert "of the time" not in "\n".join(gpu_section(record))
    first, second = (dict(found) for found in record["encode"].values())
    first |= {"profile": {"busy": 0.75}, "compiled": {"tokens_per_second": 1234.0, "cosine": 0.9999}}
    second |= {"profile": {"busy": 1.0}, "compiled": {"failed": "Error: two\nlines"}}
    page = "\n".join(gpu_section(record | {"encode": {"a": first, "b": second}}))
    assert "a: the GPU computes 75% of the time. Layers compiled by torch: 1,234 tokens/s, cosine 0.9999." in page
    assert "b: the GPU computes 100% of the time. Layers compiled by torch: Error: two lines." in page


def test_a_training_step_is_infonce_over_all_candidates(
    part: Any, tiny_embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss against four lines of torch; a step in parts has the gradients of a whole one."""
    train = part("train")
    monkeypatch.setattr(train, "opened", lambda *_: tiny_embedder("mean"))
    texts = tuple([f"{kind} {i} " + "word " * i for i in range(6)] for kind in ("query", "positive", "negative"))
    mine = train.Ours(None, "float32")
    loss = mine.backward(texts, train.WHOLE)
    whole = train.gradients(mine.backbone)
    query_QE, *passages = (torch.from_numpy(mine.model.encode(list(column))) for column in texts)
    scores_QC = query_QE @ torch.cat(passages).T / train.TEMPERATURE
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(scores_QC, torch.arange(6))), abs=1e-4)
    assert mine.backward(texts, 40) == pytest.approx(loss, abs=1e-5)
    assert train.difference(train.gradients(mine.backbone), whole) < 1e-4
    mine.step(texts, train.WHOLE)


def test_the_longest_text_of_scaling_fits_the_model(part: Any, smollm2_folder: Path) -> None:
    longest = json.loads((smollm2_folder / "config.json").read_text())["max_position_embeddings"]
    assert max(part("scaling").LENGTHS) == longest


# ---- which setting


def record_of(dtype: str, rates: dict[str, float], mb: dict[str, float], away: dict[str, float]) -> dict[str, Any]:
    """Of encode: 50 texts of 5,000 tokens on 2 cores."""
    found = {"texts": 50, "tokens": 5000, "tokens_per_second": rates, "distance_to_float32": away}
    if dtype == "float32":
        del found["distance_to_float32"]
    memory = {side: {"peak_mb": size} for side, size in mb.items()}
    return {"model": "m", "dtype": dtype, "machine": {"cores": 2}, "sets": {"passages": found}, "memory": memory}


def test_the_setting_follows_from_the_records(part: Any) -> None:
    choosing = part("choosing")
    exact = record_of("float32", {"ours": 500, "peer": 400}, {"ours": 600, "peer": 700}, {})
    rates = {"ours": 1000, "peer": 800, "int8": 2000, "onnx": 1500}
    sizes = {"ours": 300, "peer": 300, "int8": 200, "onnx": 250}
    away = {"ours": 1e-3, "peer": 1e-3, "int8": 1.9e-3, "onnx": 9e-3}
    cold = {"model": "m", "seconds": {"int8": [3.0, 2.0, 9.0]}}
    results = {
        "encode-m-float32": exact,
        "encode-m-bfloat16": record_of("bfloat16", rates, sizes, away),
        "cold-m": cold,
    }
    moved = {"candidate": "int8", "task": "sts", "difference": -0.1, "low": -0.52, "high": 0.31}
    measured = {"model": "trained", "differences": [moved]}
    results["int8-trained"] = measured
    page = "\n".join(choosing.choosing_section(results))
    # 100 tokens a passage at 2,000 tokens/s: 50,000 s for a million, on two cores
    usd = 50_000 / 3600 * 2 * choosing.PRICE_PER_CORE_HOUR
    costs = f"{usd:.2f} USD (bfloat16 {2 * usd:.2f} USD, float32 {4 * usd:.2f} USD) for a million."
    assert f'**A CPU server** wants cheap passages. `dtype="int8"`: {costs}' in page
    assert "int8 moves scores by -0.10 to -0.10 points (intervals within -0.5 to +0.3) on 1 tasks of trained" in page
    assert '**A laptop** wants little memory. `dtype="int8"`: 200 MB (bfloat16 300 MB, float32 600 MB).' in page
    assert '**A GPU:** `dtype="bfloat16"`. Not measured' in page
    assert f"| m | int8 | 2,000 | {usd:.2f} | 200 | 3.0 | 1.9e-03 |" in page
    assert "| m | ONNX Runtime int8 | 1,500 |" in page and "| m | ST float32 | 400 |" in page
    measured["differences"].append(moved | {"task": "nli", "difference": -0.6})
    page = "\n".join(choosing.choosing_section(results))
    assert f'passages. `dtype="bfloat16"`: {2 * usd:.2f} USD (float32 ' in page and "int8 moves" not in page
    assert choosing.choosing_section({"cold-m": cold}) == []
    del results["encode-m-float32"]
    assert "Not answered: no model has been measured in every type yet." in choosing.choosing_section(results)


def test_int8_has_its_goals_from_one_run(part: Any) -> None:
    encode = part("encode")
    found = {
        "ratio": {"median": 1.5},
        "mfu": 0.6,
        "int8": {"faster_than": {"ours": {"median": 1.6}, "peer": {"median": 2.4}}, "mfu": 0.5},
        "distance_to_float32": {"ours": 0.001, "peer": 0.002, "int8": 0.003},
    }
    memory = {"ours": {"peak_mb": 200}, "peer": {"peak_mb": 400}, "int8": {"peak_mb": 100}}
    options = SimpleNamespace(model="m", dtype="bfloat16")
    goals = encode.goals(options, {"mixed": found}, memory)
    values = {name: value["value"] for name, [value] in goals.items()}
    assert values == pytest.approx(
        {
            "encode_bf16": 1.5,
            "encode_memory": 0.5,
            "encode_bf16_distance": 0.5,
            "mfu_bf16": 0.6,
            "encode_int8_own": 1.6,
            "encode_int8": 2.4,
            "encode_int8_distance": 3,
            "mfu_int8": 0.5,
            "encode_int8_memory": 0.5,
        }
    )
    assert goals.keys() <= part("report").GOALS.keys()
    found["int8"]["faster_than"]["onnx"] = {"median": 1.3}
    [goal] = encode.goals(options, {"mixed": found}, memory | {"onnx": {"peak_mb": 300}})["encode_int8_onnx"]
    assert goal == {"of": "m, mixed", "value": 1.3}


def test_memory_is_measured_from_weights_in_the_type_of_each_side(
    part: Any, tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, models = part("encode"), part("models")
    monkeypatch.setattr(models, "_random_qwen3", lambda folder: shutil.copytree(tiny_decoder("qwen3"), folder))
    options = SimpleNamespace(model="qwen3-0.6b-shape", dtype="bfloat16", folder=tmp_path)
    models.make_folders(options.model, tmp_path)
    place = encode.stored_apart(options, ["peer", "ours", "int8"])
    types = {
        side: Embedder.load(folder).fingerprint()["dtype"]
        for side, folder in (("peer", place / "peer"), ("ours", models.saved(place)), ("int8", place / encode.STORED))
    }
    assert types["peer"] == types["ours"] == "bfloat16" and "int8" in types["int8"]
    assert encode.stored_apart(SimpleNamespace(**vars(options) | {"dtype": "float32"}), ["ours"]) == tmp_path
    assert Embedder.load(models.saved(tmp_path)).fingerprint()["dtype"] == "float32"


def test_a_batch_of_onnx_runtime_has_room_for_its_padding(part: Any) -> None:
    batches = part("onnx_int8").padded_batches
    assert [*batches([3, 9, 5, 4, 1], 10)] == [[1], [2, 3], [0, 4]]
    assert [*batches([50, 2, 2], 10)] == [[0], [1, 2]]  # a text that is too long is a batch of its own
    assert [*batches([], 10)] == []


@pytest.mark.long
def test_onnx_runtime_gets_the_tokens_that_ours_gets(
    part: Any, tiny_embedder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'embedwright[onnx]'")
    peer = part("onnx_int8")
    monkeypatch.setattr(peer, "bind_main_thread", lambda: os.sched_setaffinity(0, peer.CORES))
    model = tiny_embedder("mean")
    model.save(tmp_path / "saved")
    assert peer.export(tmp_path / "saved", tmp_path / "onnx") is None
    theirs = peer.Model(tmp_path / "saved", tmp_path / "onnx")
    texts = ["one text", "another one that is longer than the first", "a", "b c d e f g"]
    for prefix in (None, "Instruct: find it\nQuery: "):
        vectors_NE = model.encode(texts, prefix=prefix)
        for batch_tokens in (16, 1000):
            assert (theirs.encode(texts, prefix, batch_tokens) * vectors_NE).sum(1).min() > 0.98
        assert (theirs.encode(texts[::-1], prefix, 16) * vectors_NE).sum(1).min() < 0.9  # of other texts


def test_seconds_of_a_cold_start_come_from_a_new_process(
    part: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cold = part("cold")
    lines = (
        "import types",
        "time.sleep(0.2); model = types.SimpleNamespace(encode=lambda texts: print(texts, dtype, folder))",
    )
    monkeypatch.setitem(cold.SIDES, "float32", (lines, "float32"))
    seconds = cold.first_vector("float32", tmp_path)
    assert [*seconds] == ["import", "load", "encode"]
    assert 0.2 <= seconds["load"] < 20 and seconds["import"] > 0 and seconds["encode"] > 0


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
