"""`tune.method: qlora`: refused where it cannot run; else trained on 4 bits, finished on the base as it was."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from embedwright.config import ConfigError
from embedwright.model.adapters.fourbit import in_four_bits
from embedwright.model.adapters.lora import has_lora
from embedwright.model.embedder import Embedder
from embedwright.training.recipe import Recipe
from embedwright.training.run.checkpoint import newest
from embedwright.training.run.start import load_trained, merged, start_model
from embedwright.training.train import train

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]
WORDS = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox", "lazy", "quick", "brown"]


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="package bitsandbytes is missing (the extra [qlora])")


def tree(base: str, pairs: list[tuple[str, str]], folder: Path) -> dict[str, Any]:
    rows = [json.dumps({"query": query, "positive": positive}) + "\n" for query, positive in pairs]
    (folder / "pairs.jsonl").write_text("".join(rows))
    return {
        "name": "small",
        "model": {"base": base, "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 60},
        "tune": {"method": "qlora", "rank": 4, "alpha": 8, "dropout": 0.1},
        "stages": [
            {
                "name": "retrieval",
                "data": [{"path": "${EMBEDWRIGHT_TEST_DATA}/pairs.jsonl"}],
                "in_batch_negatives": "all",
                "hard_negatives": 0,
                "temperature": 0.1,
                "optim": {"lr": 5e-3, "steps": 12, "batch_queries": 8},
            }
        ],
        "run": {"out": "unset", "checkpoint_every": 5, "tracker": "none"},
    }


def changed(content: dict[str, Any], out: Path, tune: dict[str, Any] | None = None, **run: Any) -> Recipe:
    content = copy.deepcopy(content)
    content["tune"] |= tune or {}
    content["run"] |= {"out": str(out), **run}
    return Recipe.parse(content)


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """40 pairs that share a word of their own; the order of rows follows the path as it is written."""
    monkeypatch.setenv("EMBEDWRIGHT_TEST_DATA", str(tmp_path))
    random = np.random.default_rng(0)
    sentence = lambda name: " ".join(random.permutation([name, *random.choice(WORDS, 4)]))  # noqa: E731
    names = [f"{a}{b}" for a in "abcdefgh" for b in "vwxyz"]
    return tree(str(tiny_decoder("llama")), [(sentence(n), sentence(n)) for n in names], tmp_path)


def losses(recipe: Recipe) -> tuple[list[float], Embedder]:
    records: list[dict[str, Any]] = []
    model = train(recipe, on_step=records.append)
    return [record["loss"] for record in records], model


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a * b).sum(axis=1))


def _trained(out: Path) -> dict[str, Tensor]:
    kept = newest(out / "checkpoints")
    assert kept is not None
    return load_file(kept / "weights.safetensors")


# ---- refused


def test_without_bitsandbytes_it_is_refused_before_anything_is_read(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    content["model"]["base"] = content["stages"][0]["data"][0]["path"] = "/nowhere"
    with pytest.raises(ConfigError, match=r"tune\.method is qlora, and the package bitsandbytes is missing"):
        train(changed(content, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        train(changed(content, tmp_path / "out", {"method": "lora"}))


def test_it_is_not_cut_into_parts(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fsdp cannot shard the 4-bit weights of tune.method: qlora; use ddp"):
        changed(content, tmp_path, parallel="fsdp")
    changed(content, tmp_path, {"method": "lora"}, parallel="fsdp")


# ---- run, with bitsandbytes


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_ends_as_the_base_in_float32_with_what_was_trained(
    content: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    recipe = changed(content, tmp_path / "out", precision=precision)
    found, model = losses(recipe)
    assert np.mean(found[-3:]) < 0.7 * np.mean(found[:3])
    network = model.network
    assert not in_four_bits(network.backbone) and not has_lora(network.backbone) and not network.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())

    trained = _trained(tmp_path / "out")
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    plain_recipe = changed(content, tmp_path, {"method": "lora"})
    plain = start_model(plain_recipe)
    load_trained(plain, trained)
    vectors = model.encode(TEXTS)
    np.testing.assert_array_equal(vectors, merged(plain).encode(TEXTS))

    four_bit = start_model(recipe)
    assert in_four_bits(four_bit.network.backbone)
    before = cosines(start_model(plain_recipe).encode(TEXTS), four_bit.encode(TEXTS))
    load_trained(four_bit, trained)
    after = cosines(vectors, four_bit.encode(TEXTS))
    # no further from what was trained than 4 bits take the base from itself
    assert (1 - after).mean() < 1.5 * (1 - before).mean() and after.max() < 0.999

    model.save(tmp_path / "saved")
    np.testing.assert_allclose(Embedder.load(tmp_path / "saved").encode(TEXTS), vectors, atol=1e-6)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_run_in_two_pieces_and_one_with_checkpointing_are_the_same_run(
    content: dict[str, Any], tmp_path: Path
) -> None:
    whole, model = losses(changed(content, tmp_path / "whole"))
    assert losses(changed(content, tmp_path / "again", {"gradient_checkpointing": True}))[0] == pytest.approx(whole)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 7:
            raise KeyboardInterrupt

    pieces = changed(content, tmp_path / "pieces")
    with pytest.raises(KeyboardInterrupt):
        train(pieces, on_step=stop)
    rest, resumed = losses(pieces)
    assert rest == whole[5:]
    np.testing.assert_array_equal(resumed.encode(TEXTS), model.encode(TEXTS))


@pytest.mark.long
@pytest.mark.usefixtures("bitsandbytes")
def test_layers_of_smollm2_learn_on_4_bits(smollm2_folder: Path, content: dict[str, Any], tmp_path: Path) -> None:
    """numpy's functions: the first line of each docstring is to find the text behind it."""
    pairs = []
    for name in sorted(vars(np)):
        first, _, rest = (inspect.getdoc(getattr(np, name)) or "").partition("\n\n")
        if inspect.isroutine(getattr(np, name)) and len(rest) > 120:
            pairs.append((first, rest[:120]))
    assert len(pairs) > 100
    real = tree(str(smollm2_folder), pairs[:72], tmp_path)
    real["model"] |= {"layers": 4}
    real["tune"] |= {"rank": 8, "alpha": 16, "dropout": 0.0, "gradient_checkpointing": True}
    real["stages"][0]["optim"] |= {"lr": 2e-3, "steps": 24, "batch_queries": 12}
    recipe = changed(real, tmp_path / "out", precision="bf16")
    found, model = losses(recipe)
    real["stages"][0]["optim"] |= {"steps": 1}
    [on_16_bits], _ = losses(changed(real, tmp_path / "lora", {"method": "lora"}, precision="bf16"))
    four_bit = start_model(recipe)
    load_trained(four_bit, _trained(tmp_path / "out"))
    texts = [text for pair in pairs[:20] for text in pair]
    near = cosines(model.encode(texts), four_bit.encode(texts))
    first, last = np.mean(found[:5]), np.mean(found[-5:])
    print(
        f"loss {first:.3f} to {last:.3f}; first {found[0]:.3f}, {on_16_bits:.3f} on 16 bits; cosines {near.min():.3f}"
    )
    assert found[0] == pytest.approx(on_16_bits, rel=0.05) and last < 0.6 * first
    assert near.min() > 0.9
