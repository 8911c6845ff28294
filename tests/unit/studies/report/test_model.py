from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from embedwright.data.files.tasks import tasks_file, write_tasks
from embedwright.data.schema import Task
from embedwright.studies.report import model as report_model
from embedwright.studies.report.model import model_parts
from embedwright.studies.report.page import report


def changed(run: Path, to: Path, **changes: Any) -> Path:
    """A copy of the run without its checkpoints, whose recipe has other values."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints"))
    recipe = yaml.safe_load((to / "recipe.yaml").read_text())
    for key, value in changes.items():
        recipe[key] = value(recipe[key])
    (to / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return to


def test_a_run_has_every_part(tiny_run: Path) -> None:
    said: list[str] = []
    parts = model_parts(tiny_run, said.append)
    assert parts["left_out"] == {} and len(said) == 3
    assert [chart["title"] for chart in parts["pairs"]] == ["Task pairs", "Task labels"]
    assert parts["hits"]["task"] == "docs" and len(parts["hits"]["examples"]) == 6
    assert parts["map"]["task"] == "kinds" and len(parts["map"]["points"]) == 56


def test_without_a_model_the_parts_say_why(tiny_run: Path, tmp_path: Path) -> None:
    run = changed(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "model")
    parts = model_parts(run, str)
    assert set(parts["left_out"]) == {"pairs", "hits", "map"}
    assert all("model is not there" in why for why in parts["left_out"].values())


@pytest.mark.parametrize("half", [False, True])
def test_a_model_that_is_empty_or_half_a_copy_leaves_out_its_parts(tiny_run: Path, tmp_path: Path, half: bool) -> None:
    run = changed(tiny_run, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    content = weights.read_bytes()
    if half:
        weights.write_bytes(content[: len(content) // 2])
    else:
        shutil.rmtree(run / "model")
        (run / "model").mkdir()
    page = report([run], "")
    assert page.count("Left out: ") == 3 and str(run / "model") in page and "What was trained" in page


def test_data_that_was_moved_leaves_out_its_part_alone(tiny_run: Path, tmp_path: Path) -> None:
    def moved(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        stages[0]["data"][0]["path"] = str(tmp_path / "gone.jsonl")
        return stages

    parts = model_parts(changed(tiny_run, tmp_path / "run", stages=moved), str)
    assert set(parts["left_out"]) == {"pairs"} and "gone.jsonl" in parts["left_out"]["pairs"]
    assert parts["hits"] and parts["map"]


def test_without_a_labelled_suite_the_map_is_of_training_data(tiny_run: Path, tmp_path: Path) -> None:
    scored = str(Path(tiny_run).parent / "suite" / "sts.jsonl")
    only = tmp_path / "only.yaml"
    only.write_text(yaml.safe_dump({"name": "only", "tasks": [{"name": "alike", "kind": "sts", "path": scored}]}))
    run = changed(tiny_run, tmp_path / "run", eval=lambda part: part | {"suites": [str(only)]})
    parts = model_parts(run, str)
    assert parts["map"]["task"] == "labels" and len(parts["map"]["points"]) == 55
    assert "retrieval" in parts["left_out"]["hits"]
    run = changed(run, tmp_path / "pairs", stages=lambda stages: stages[:1])
    assert "labelled file" in model_parts(run, str)["left_out"]["map"]


def test_training_data_is_read_with_the_instruction_of_the_file_of_tasks_beside_it(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = tmp_path / "labels.jsonl"
    shutil.copy(Path(tiny_run).parent / labels.name, labels)
    write_tasks(tasks_file(labels), [Task(name="labels", instruction="Name the kind", symmetric=True)])

    def own(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [stage | {"data": [{"path": str(labels)}]} for stage in stages[1:]]

    asked: list[str] = []
    monkeypatch.setattr(report_model, "text_map", lambda encoder, path, instruction: asked.append(instruction) or {})
    run = changed(tiny_run, tmp_path / "run", eval=lambda part: part | {"suites": []}, stages=own)
    assert model_parts(run, str)["map"] == {"task": "labels"} and asked == ["Name the kind"]


def test_suites_of_mteb_are_passed_over(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = SimpleNamespace(name="NanoBEIR", tasks=["whose data is not in local files"])
    monkeypatch.setattr(report_model, "open_suite", lambda name: chosen)  # mteb itself takes ten seconds
    parts = model_parts(tiny_run, str)
    assert "local files" in parts["left_out"]["hits"] and parts["map"]["task"] == "labels"


def test_a_suite_that_is_gone_is_said(tiny_run: Path, tmp_path: Path) -> None:
    run = changed(tiny_run, tmp_path / "run", eval=lambda part: part | {"suites": ["nowhere.yaml"]})
    parts = model_parts(run, str)
    assert "nowhere.yaml" in parts["left_out"]["hits"] and "nowhere.yaml" in parts["left_out"]["map"]
