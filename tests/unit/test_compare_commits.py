"""The comparison of two commits finds what differs: a bit of a float, a byte, a key, a file, a failed part."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("compare_commits")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same results of every kind."""
    both = tmp_path / "old", tmp_path / "new"
    for folder in both:
        (folder / "model").mkdir(parents=True)
        np.save(folder / "vectors.npy", np.ones((3, 4), dtype=np.float32))
        save_file({"a": torch.zeros(2), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "model" / "w.safetensors")
        (folder / "loss.json").write_text(json.dumps([0.5, 0.25, None]))
        (folder / "mined.jsonl").write_text('{"id": "q0", "negatives": ["x", "y"]}\n{"id": "q1", "negatives": []}\n')
        (folder / "printed").write_text("kept 3\ndropped 4\n")
    return both


def found(script: Any, folders: tuple[Path, Path]) -> dict[str, str]:
    return {name: how for name, how in script.compare(*folders) if how is not None}


def test_equal_results_have_no_difference(script: Any, folders: tuple[Path, Path]) -> None:
    assert [how for _, how in script.compare(*folders)] == [None] * 5


def test_the_last_bit_of_one_number_is_found(script: Any, folders: tuple[Path, Path]) -> None:
    vectors = np.ones((3, 4), dtype=np.float32)
    vectors[2, 1] = np.nextafter(np.float32(1), np.float32(2))
    np.save(folders[1] / "vectors.npy", vectors)
    (folders[1] / "loss.json").write_text(json.dumps([0.5, float(np.nextafter(0.25, 1)), None]))
    weights = {"a": torch.zeros(2), "b": torch.tensor([1, 1, 1.0078125], dtype=torch.bfloat16)}
    save_file(weights, folders[1] / "model" / "w.safetensors")
    assert found(script, folders) == {
        "vectors.npy": "1 of 1 values, largest difference 1.192e-07 ",
        "loss.json": "1 of 3 values, largest difference 5.551e-17 at 1",
        "model/w.safetensors": "1 of 2 values, largest difference 7.812e-03 at b",
    }


@pytest.mark.parametrize("value", [np.nan, -0.0])
def test_a_zero_is_no_nan_and_no_negative_zero(script: Any, folders: tuple[Path, Path], value: float) -> None:
    np.save(folders[0] / "vectors.npy", np.zeros(3))
    np.save(folders[1] / "vectors.npy", np.array([0, value, 0]))
    assert list(found(script, folders)) == ["vectors.npy"]


def test_another_text_key_shape_or_file_is_found(script: Any, folders: tuple[Path, Path]) -> None:
    old, new = folders
    (new / "printed").write_text("kept 3\ndropped 5\n")
    (new / "mined.jsonl").write_text('{"id": "q0", "negatives": ["x", "y"]}\n{"negatives": []}\n')
    (new / "loss.json").write_text(json.dumps([0.5, 0.25, None]) + "\n")
    np.save(new / "vectors.npy", np.ones((3, 5), dtype=np.float32))
    (old / "model" / "w.safetensors").unlink()
    assert found(script, folders) == {
        "printed": "1 of 2 values, first line 2: 'dropped 4' -> 'dropped 5'",
        "mined.jsonl": "1 values are missing in NEW, first 1.id",
        "loss.json": "other bytes, though all values are equal",
        "vectors.npy": "1 of 1 values, first : shape (3, 4) -> shape (3, 5)",
        "model/w.safetensors": "missing in OLD",
    }


def test_a_part_that_fails_is_named_with_its_error(script: Any, tmp_path: Path) -> None:
    (tmp_path / "src" / "embedwright").mkdir(parents=True)
    (tmp_path / "src" / "embedwright" / "__init__.py").write_text("")
    (tmp_path / "work").mkdir()
    assert "cannot import name 'Embedder'" in script.run_part("smollm2", tmp_path / "src", tmp_path / "work", None)


@pytest.mark.long
def test_this_commit_equals_itself(smollm2_folder: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "compare_commits.py"), "HEAD", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("all equal\n"), done.stdout + done.stderr
    for name in ("smollm2/SmolLM2 bfloat16 latent query.npy", "two_stages/loss.json", "mining/best.jsonl"):
        assert f"{name}: equal" in done.stdout
