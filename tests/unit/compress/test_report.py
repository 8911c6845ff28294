"""The report of a chain: measured once, compared as `compare` does, and shown as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stock_layers import TEXTS
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.compress import report
from embedwright.compress.report import difference_text, evaluated, picture, size_of, table
from embedwright.compress.states import Texts
from embedwright.evaluation.compare.compare import Candidate, compare
from embedwright.evaluation.results import read_results
from embedwright.evaluation.suite import load_suite
from embedwright.model.embedder import Embedder

READ = Texts("four texts", lambda: TEXTS)


def words(seed: int) -> str:
    drawn = np.random.default_rng(seed).choice(["tide", "moon", "sea", "rise", "fall", "sun", "dog", "fox"], 6)
    return " ".join(drawn)


@pytest.fixture
def at(tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_embedder("mean", "qwen3").save(tmp_path / "model")
    (tmp_path / "suite").mkdir()
    for name, rows in (("alike", 60), ("few", 12)):
        scored = [{"text1": words(i), "text2": words(i + i % 5), "score": (i * 7) % 5} for i in range(rows)]
        (tmp_path / "suite" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def measured(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Stands for the process: `test_measure.py` runs it."""
    return {"parameters": 1_500_000, "seconds": [0.5, 0.25, 1.0], "peak_memory": 200_000_000}


def test_the_command_reports_every_step(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "measured", measured)
    words = ["compress", "model", "out", "--layers", "2", "--width", "0.7", "--texts", "texts.jsonl"]
    said = CliRunner().invoke(app, [*words, "--report", "suite"], catch_exceptions=False).stdout
    record = json.loads((at / "out" / "compression.json").read_text())
    assert [row["step"] for row in record["rows"]] == ["original", "layers", "width"]
    assert (record["name"], record["suite"], record["about"]["model"]) == ("out", "suite", "model")
    assert {"command", "date", "machine", "versions"} <= record["about"].keys() and "fingerprint" not in record["about"]
    assert [step["step"] for step in record["history"]] == ["layers", "width"]
    assert str(at) not in json.dumps(record)
    model = Embedder.load("model")
    assert record["tokens"] == sum(len(model.tokenize([text]).ids_T) for text in TEXTS)
    sizes = [row["size"] for row in record["rows"]]
    assert sizes[0] == sum(f.stat().st_size for f in (at / "model").rglob("*") if f.is_file()) > sizes[1] > sizes[2]
    assert record["rows"][0]["tokens_per_second"] == pytest.approx(record["tokens"] / 0.25, abs=0.1)
    card = (at / "out" / "README.md").read_text()
    for text in (said, card):
        assert "tokens/s" in text and "alike (cosine_spearman)" in text and "width" in text
    assert (at / "out" / "compression.svg").read_text() == picture([record])
    assert Embedder.load("out").encode(TEXTS).shape == (4, 32)  # a normal folder still


def test_scores_and_differences_are_those_of_eval_and_compare(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "measured", measured)
    model = Embedder.load("model")
    model.network.backbone.layers[0].self_attn.o_proj.weight.data.mul_(4)
    (at / "steps").mkdir()
    model.save("steps/1-other")
    Embedder.load("model").save("steps/2-same")
    models = {"original": "model", "other": "steps/1-other", "same": "steps/2-same"}
    record = evaluated("out", models, load_suite("suite"), READ, lambda _: None)
    found = [read_results(file) for file in sorted((at / "steps" / "report").glob("*.json"))]
    names = [*models]
    rows = compare([Candidate(name, {None: [each]}) for name, each in zip(names, found, strict=True)]).rows
    for row, results in zip(record["rows"], found, strict=True):
        assert row["mean"] == pytest.approx(100 * np.mean([one.value for one in results.rows]))
        for one in results.rows:
            assert row["tasks"][one.task]["score"] == pytest.approx(100 * one.value)
            assert row["tasks"][one.task]["half"] > 0
    expected = {(row.candidate, row.task): row for row in rows}
    for row in record["rows"][1:]:
        whole = expected[row["step"], "mean"]
        assert row["difference"] == {"value": whole.difference, "low": whole.low, "high": whole.high}
        task = expected[row["step"], "alike"]
        assert row["tasks"]["alike"]["difference"]["low"] == task.low
    assert record["rows"][0]["difference"] is None and record["rows"][2]["difference"]["value"] == 0
    shown = table(record)
    assert shown[0]["difference"] == "" and shown[2]["difference"] == "none"
    assert shown[2]["95 % interval"] == "+0.00 to +0.00" and shown[1]["mean"] == f"{record['rows'][1]['mean']:.2f}"

    monkeypatch.setattr(report, "measured", lambda *_: pytest.fail("it is done"))
    again = evaluated("out", models, load_suite("suite"), READ, lambda _: None)
    assert again["rows"] == record["rows"]


def test_what_is_kept_counts_for_the_same_texts_and_suite_alone(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(report, "measured", lambda model, texts: (seen.append(texts[0]), measured(model, texts))[1])
    suite = load_suite("suite")
    for text, tasks in (("a", 2), ("a", 2), ("b", 2), ("b", 1)):
        asked = suite.model_copy(update={"tasks": suite.tasks[:tasks]})
        evaluated("n", {"original": "model", "same": "model"}, asked, Texts(text, [text].copy), print)
    assert seen == ["a"] * 2 + ["b"] * 4  # two models each time, and nothing for the second call


def test_a_difference_whose_interval_covers_zero_is_called_none() -> None:
    assert difference_text({"value": -1.2, "low": -2.0, "high": -0.4}) == "-1.20"
    assert difference_text({"value": 1.2, "low": 0.4, "high": 2.0}) == "+1.20"
    assert difference_text({"value": -1.2, "low": -2.6, "high": 0.2}) == "none"
    assert difference_text({"value": -1.2, "low": None, "high": None}) == "-1.20, no interval"
    assert difference_text(None) == ""


def test_records_of_several_chains_share_a_picture_and_the_original(at: Path) -> None:
    rows = [{"step": step, "size": size, "tokens_per_second": 5.0, "mean": mean, "difference": None}
            for step, size, mean in (("original", 9e6, 50.0), ("layers", 5e6, 40.0))]  # fmt: skip
    text = picture([{"name": "a", "rows": rows}, {"name": "b", "rows": rows}])
    assert text.count("  original</text>") == 1 and "2  a: layers" in text and "3  b: layers" in text


def test_the_size_of_a_folder_leaves_out_what_is_hidden(at: Path) -> None:
    before = size_of("model")
    (at / "model" / ".cache").write_text("hidden")
    (at / "model" / "1_Pooling" / "more.json").write_text("12345")
    assert size_of("model") == before + 5 and size_of(str(at / "texts.jsonl")) == (at / "texts.jsonl").stat().st_size
