"""What is collected between the layers, against transformers' own model, which runs one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_layers import TEXTS, stock_states

from embedwright.compress import states
from embedwright.compress.states import inputs_of, layer_states, layers_of
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_states_are_those_of_the_stock_model(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "BATCH_TOKENS", 30)  # several batches
    model = tiny_embedder(pooling, "qwen3")
    model.save(tmp_path / "model")
    parts = list(layer_states(model, TEXTS))
    assert len(parts) > 1
    found = [torch.cat(each) for each in zip(*parts, strict=True)]
    expected = [stock_states(tmp_path / "model", text) for text in TEXTS]
    for layer, rows in enumerate(found):
        own = torch.cat([each[layer][-1:] if pooling == "last" else each[layer] for each in expected])
        assert rows.shape == own.shape
        # batches are in another order: the longest text comes first
        torch.testing.assert_close(rows[rows[:, 0].argsort()], own[own[:, 0].argsort()], rtol=1e-4, atol=1e-5)


def test_bos_and_other_tokens_that_are_not_pooled_are_left_out(tiny_embedder: Callable[..., Embedder]) -> None:
    for bos in (False, True):
        model = tiny_embedder("mean", "llama", bos)
        (collected,) = layer_states(model, ["a tide"])
        ids = model.tokenize(["a tide"]).ids_T
        assert len(collected[0]) == len(ids) - bos and (int(ids[0]) == 0) == bos


def test_hooks_are_gone_afterwards_and_strange_models_are_refused(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean")
    backbone: Any = model.network.backbone
    with inputs_of([backbone.layers[0]]), pytest.raises(InputError, match="no calibration texts"):
        next(layer_states(model, []))
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    backbone.config.num_hidden_layers = 7
    with pytest.raises(InputError, match=r"cannot prune a 'llama' model"):
        layers_of(backbone)
