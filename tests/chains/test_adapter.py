"""A small folder that a run leaves, elsewhere: opened, indexed, searched, scored, examined, merged, trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.locate import PACKAGED
from embedwright.model.embedder import Embedder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    return result.output


def test_an_adapter_folder_on_a_packaged_base_serves_everywhere(
    tmp_path: Path, tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "tiny_weights"
    shutil.copytree(tiny_decoder("llama"), package / "decoder")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setitem(PACKAGED, "tiny-135m", ("tiny_weights", "decoder"))
    lab, elsewhere = tmp_path / "lab", tmp_path / "elsewhere"
    for folder in (lab, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(lab)
    texts = [f"p{i} the moon pulls the sea {i}" for i in range(12)]
    pairs = [{"query": f"q{i} tide", "positives": [text]} for i, text in enumerate(texts)]
    (lab / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tides = {"name": "tides", "licence": "CC-BY-NC-4.0", "source": "someone/tides"}
    stage = {"name": "S1", "data": [{"path": "pairs.jsonl", "task": tides}], "in_batch_negatives": "all"}
    stage["hard_negatives"] = 0
    stage |= {"optim": {"lr": 1e-2, "steps": 2, "batch_queries": 4}}
    first = {
        "name": "first",
        "model": {"base": "tiny-135m", "layers": 2, "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8},
        "stages": [stage | {"save": True}],
        "run": {"out": "run", "tracker": "none", "save": "adapter", "dtype": "bfloat16", "precision": "bf16"},
    }
    (lab / "first.yaml").write_text(yaml.safe_dump(first))
    run("train", "first.yaml")
    shutil.copytree(lab / "run/stages/S1/adapter", elsewhere / "results/flagship")
    monkeypatch.chdir(elsewhere)
    config = json.loads(Path("results/flagship/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-135m" and not list(Path("results").rglob("tokenizer*"))

    Path("docs.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts)))
    run("index", "results/flagship", "docs.jsonl", "index")
    model = Embedder.load("results/flagship")
    best = int(np.argmax(model.encode(texts) @ model.encode(["the moon and p3"])[0]))
    found = run("search", "results/flagship", "index", "the moon and p3", "--k", 1)
    assert found.split()[5] == f"d{best}", found
    scored = [{"text1": f"a tide {i}", "text2": f"moon {i * i}", "score": i % 5} for i in range(10)]
    (elsewhere / "suite").mkdir()
    (elsewhere / "suite/alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    assert "alike" in run("eval", "results/flagship", "./suite")
    assert "BAD" not in run("doctor", "results/flagship")
    run("merge", "results/flagship", "merged")
    np.testing.assert_allclose(Embedder.load("merged").encode(texts), model.encode(texts), atol=5e-2)

    shutil.copyfile(lab / "pairs.jsonl", "pairs.jsonl")
    second = first | {"name": "second", "model": {"from": "results/flagship"}, "tune": {"adapters": "continue"}}
    stage["data"] = [{"path": "pairs.jsonl", "task": {"name": "moons", "licence": "MIT", "source": "an/other"}}]
    Path("second.yaml").write_text(yaml.safe_dump(second | {"stages": [stage]}))
    run("train", "second.yaml")
    assert "BAD" not in run("doctor", "run/adapter")
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("tiny-135m", 4)
    third = {"name": "third", "model": {"from": "merged"}, "run": {"out": "third", "tracker": "none"}}
    Path("third.yaml").write_text(yaml.safe_dump(second | third | {"stages": [stage], "tune": first["tune"]}))
    run("train", "third.yaml")
    cards = [Path(folder, "README.md").read_text() for folder in ("results/flagship", "run/adapter", "third/model")]
    assert all("made from tiny-135m" in card for card in cards[:2])
    for card in cards:  # a stage's, and those of the runs that went on from it: what it learned from
        assert "CC-BY-NC-4.0" in card
    datasets = [["someone/tides"], *[["an/other", "someone/tides"]] * 2]
    assert [ModelCard(card).data.datasets for card in cards] == datasets
    assert all("## Data of flagship" in card and "| MIT |" in card for card in cards[1:])
