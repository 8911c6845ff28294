from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.cli.evaluation import evaluate
from embedwright.encoders import open as encoders
from embedwright.errors import InputError


class Letters:
    """An encoder with weights of a name."""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def fingerprint(self) -> dict[str, str]:
        return {"weights": self.weights}

    def encode(self, texts: list[str], task: str | None = None) -> np.ndarray[Any, Any]:
        return np.array([[1.0, text.count("a"), len(text)] for text in texts], dtype=np.float32)


def test_a_folder_of_results_keeps_those_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, out = tmp_path / "own", tmp_path / "results"
    suite.mkdir()
    pairs = [{"text1": "a" * (i + 1), "text2": "a" * (i * i % 7) + "b", "score": i % 5} for i in range(12)]
    (suite / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.setattr(encoders, "open_encoder", lambda name: Letters("new" if ".." in name else "old"))
    evaluate(models=["a/model"], suite=str(suite), out=out)
    evaluate(models=["a/model"], suite=str(suite), out=out)  # the same model, scored again
    (file,) = out.rglob("own.json")
    before = file.read_bytes()
    with pytest.raises(InputError, match=r"own\.json has the results of another model, a/model, .*another --out"):
        evaluate(models=["../a/model"], suite=str(suite), out=out)
    assert file.read_bytes() == before
    evaluate(models=["../a/model"], suite=str(suite), out=tmp_path / "named.json")
    evaluate(models=["a/model"], suite=str(suite), out=tmp_path / "named.json")  # a file that is named is written anew
    assert json.loads((tmp_path / "named.json").read_text())["about"]["model"] == "a/model"
