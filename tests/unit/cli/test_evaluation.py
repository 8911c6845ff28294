from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from embedwright.cli.evaluation import _limit, _model_or_server, evaluate
from embedwright.cli.main import app
from embedwright.encoders import open as encoders
from embedwright.encoders.open import open_encoder
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.errors import InputError
from embedwright.evaluation.mteb import MtebEncoder
from embedwright.model.embedder import Embedder


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


@pytest.mark.parametrize("name", ["SciFact", "AIR-Bench/qa/en"])
def test_a_server_with_a_key_is_benchmarked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_KEY", "own-secret")
    [encoder] = _model_or_server("http://127.0.0.1:1/v1#m", {}, "OWN_KEY")
    assert encoder.endpoint.client["api_key"] == "own-secret"
    words = [name, "--out", str(tmp_path / "out"), "--api-key-env", "UNSET_KEY"]
    refused = CliRunner().invoke(app, ["bench", "http://127.0.0.1:1/v1#m", *words])
    assert "$UNSET_KEY, which is to hold its API key, is not set" in str(refused.exception)
    refused = CliRunner().invoke(app, ["bench", "minilm", *words])
    assert "--api-key-env: no server is asked here, only minilm" in str(refused.exception)


def test_a_benchmark_cuts_the_texts_of_any_model_that_is_opened_here(
    tmp_path: Path, family_folder: Callable[[str], Path], tiny_embedder: Callable[..., Embedder]
) -> None:
    tiny_embedder("mean").save(tmp_path / "ours")
    text, revisions = "the moon and the sea " * 60, []
    for folder in (tmp_path / "ours", family_folder("embeddinggemma")):
        for how in ({}, {"max_tokens": 100}):
            [opened] = _model_or_server(str(folder), how)
            encoder = MtebEncoder(opened, max_tokens=_limit(opened, how))
            task = {"task_metadata": SimpleNamespace(name="STS12", type="STS", prompt=None), "prompt_type": None}
            found = encoder.encode([{"text": [text]}], hf_split="test", hf_subset="default", **task)
            [wanted] = MtebEncoder(open_encoder(str(folder), **how)).encode(
                [{"text": [text]}], hf_split="test", hf_subset="default", **task
            )
            np.testing.assert_allclose(found[0], wanted, atol=1e-6)
            revisions.append(encoder.mteb_model_meta.revision)
    assert len(set(revisions)) == 4 and isinstance(opened, SentenceTransformerEncoder)
