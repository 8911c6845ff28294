from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.studies.report.run import POINTS, is_run, read_run


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("model", "checkpoints"))
    return to


def curve(run: dict[str, Any], name: str) -> dict[str, Any]:
    return next(chart for chart in run["curves"] if chart["id"] == name)


def test_a_run_is_described_as_its_recipe_and_its_files_say(tiny_run: Path) -> None:
    run = read_run(tiny_run)
    facts = dict(run["facts"])
    assert run["name"] == "tiny & small" and facts["Attention"] == "bidirectional" and facts["Pooling"] == "mean"
    network = Embedder.load(tiny_run / "model").network
    assert facts["Parameters"] == f"{sum(p.numel() for p in network.parameters()) / 1e6:,.1f} million"
    steps = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert f"6 steps, {sum(step['tokens'] for step in steps):,} tokens in" in facts["Training"]
    assert [(stage["stage"], stage["steps"], stage["learning rate"]) for stage in run["stages"]] == [
        ("first", "4", "0.01"),
        ("second", "2", "0.001"),
    ]
    assert [(row["task"], row["rows"], row["licence"]) for row in run["data"]] == [
        ("pairs", "12", "CC0 <b>"),
        ("labels", "55", "not stated"),
    ]
    assert {"python", "torch", "cores"} <= dict(run["environment"]).keys()


def test_curves_are_the_values_of_the_log_with_the_stages_marked(tiny_run: Path) -> None:
    run = read_run(tiny_run)
    steps = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    loss = curve(run, "loss")
    assert loss["series"][0]["y"] == pytest.approx([step["loss"] for step in steps])
    assert loss["series"][0]["x"] == [1, 2, 3, 4, 5, 6]
    assert loss["marks"] == [{"name": "first", "from": 0, "to": 4}, {"name": "second", "from": 4, "to": 6}]
    assert curve(run, "lr")["series"][0]["y"] == pytest.approx([step["lr"] for step in steps])
    assert f"goes from {steps[0]['loss']:.4g} to {steps[-1]['loss']:.4g}" in loss["alt"]
    scores = curve(run, "scores-0")
    assert [line["x"] for line in scores["series"]] == [[0, 2, 4, 6]] * 3  # before, within the first stage, two ends
    records = [json.loads(line) for line in (tiny_run / "evaluations.jsonl").read_text().splitlines()]
    assert scores["series"][0]["y"] == [record["results"]["rows"][0]["value"] for record in records]


def test_what_is_not_finite_is_a_gap_and_a_long_run_is_shortened(tiny_run: Path, tmp_path: Path) -> None:
    folder = copied(tiny_run, tmp_path / "run")
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    steps = [{**first, "step": i + 1, "loss": float(i)} for i in range(2 * POINTS)]
    steps[0]["loss"], steps[2]["loss"] = None, float("nan")  # JSON of Python has NaN
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    loss = curve(read_run(folder), "loss")
    assert loss["note"].startswith("2 steps have no finite value")
    assert loss["series"][0]["y"] == [None, None, *(2 * i + 0.5 for i in range(2, POINTS))]
    assert loss["series"][0]["x"] == [2 * i for i in range(1, POINTS + 1)]


def test_a_run_without_steps_evaluations_or_files_has_empty_parts(tiny_run: Path, tmp_path: Path) -> None:
    folder = copied(tiny_run, tmp_path / "run")
    for name in ("evaluations.jsonl", "data.json", "environment.json"):
        (folder / name).unlink()
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    run = read_run(folder)
    assert (run["curves"], run["data"], run["environment"], run["steps"]) == ([], [], [], 1)
    assert "Parameters" not in dict(run["facts"])
    (folder / "data.json").write_text("{")
    with pytest.raises(InputError, match=r"data\.json is no JSON"):
        read_run(folder)
    assert is_run(folder) and not is_run(tmp_path)
