"""The padded door of the saved model, for other libraries, against `Embedder.encode`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from embedwright.cpu.accelerate import stock
from embedwright.model.embedder import Embedder
from embedwright.model.network import EmbedwrightModel
from embedwright.model.pooling import Kind, pool_tokens

TEXTS = ["how do tides work?", "a", "", "the moon and the sun " * 9, "漢字 🙂"]
TASK = "Given a question, retrieve passages"


def padded(model: Embedder, side: str, task: str | None = None) -> dict[str, Tensor]:
    """What a data collator makes of the texts: (N, L) ids, attention mask and pool mask, padded on this side."""
    packed = model.tokenize(TEXTS, task)
    shape = (len(packed), packed.longest)
    rows = {"input_ids": torch.full(shape, 3), "attention_mask": torch.zeros(shape), "pool_mask": torch.zeros(shape)}
    rows = {name: values.long() for name, values in rows.items()}
    lengths = packed.lengths_N.tolist()
    for i, (ids, pool) in enumerate(zip(packed.ids_T.split(lengths), packed.pool_mask_T.split(lengths), strict=True)):
        place = slice(0, len(ids)) if side == "right" else slice(packed.longest - len(ids), packed.longest)
        rows["input_ids"][i, place] = ids
        rows["attention_mask"][i, place] = 1
        rows["pool_mask"][i, place] = pool.long()
    return rows


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", get_args(Kind))
def test_automodel_on_a_saved_folder_gives_the_vectors_of_encode(
    pooling: Any, side: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, bos=True)
    model.save(tmp_path / "saved")
    opened = AutoModel.from_pretrained(tmp_path / "saved")
    assert isinstance(opened, EmbedwrightModel)
    for task in (None, TASK):
        rows = padded(model, side, task)
        output = opened(**rows)
        np.testing.assert_allclose(output.pooler_output.numpy(), model.encode(TEXTS, task), atol=1e-5)

        # what sentence-transformers' own mean pooling makes of the tokens, which does not know the pool mask
        tokens_NLD, attended_NL1 = output.last_hidden_state, rows["attention_mask"][..., None]
        assert tokens_NLD.shape == (*rows["input_ids"].shape, model.embedding_dim)
        mean_ND = (tokens_NLD * attended_NL1).sum(1) / attended_NL1.sum(1)
        packed = model.tokenize(TEXTS, task)
        pooled_ND = pool_tokens(model.network.token_states(packed), packed, pooling)
        torch.testing.assert_close(mean_ND, pooled_ND, rtol=1e-5, atol=1e-5)
        assert not tokens_NLD[rows["pool_mask"] == 0].any()
        scaled = {"last": len(TEXTS)}.get(pooling, int(rows["pool_mask"].sum()))
        assert int(tokens_NLD.any(-1).sum()) == scaled


@torch.no_grad()
def test_token_states_of_half_precision_are_scaled_in_float32(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean", bos=True, dtype="bfloat16")
    assert next(model.network.parameters()).dtype == torch.bfloat16
    rows = padded(model, "right", TASK)
    output = model.network(**rows)
    assert output.last_hidden_state.dtype == output.pooler_output.dtype == torch.float32
    mean_ND = output.last_hidden_state.sum(1) / rows["attention_mask"].sum(1, keepdim=True)
    torch.testing.assert_close(F.normalize(mean_ND), output.pooler_output, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_row_of_nothing_is_an_error(tiny_embedder: Callable[..., Embedder]) -> None:
    network = tiny_embedder("latent").network
    ids, one, two = torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 1], [1, 0]])
    with pytest.raises(ValueError, match="attention_mask: row 1 has no token to attend to"):
        network(ids, attention_mask=one)
    with pytest.raises(ValueError, match="pool_mask: row 1 has no token to pool"):
        network(ids, pool_mask=one)
    # a pool mask that is set on padding pools no padding
    with pytest.raises(ValueError, match="pool_mask: row 1 has no token to pool"):
        network(ids, attention_mask=two, pool_mask=torch.tensor([[1, 1], [0, 1]]))
    told = network(ids, attention_mask=two, pool_mask=torch.ones_like(two))
    assert torch.equal(told.pooler_output, network(ids, attention_mask=two).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", [False, True])
def test_without_a_pool_mask_all_but_bos_is_pooled(
    side: str, bos: bool, tiny_embedder: Callable[..., Embedder]
) -> None:
    model = tiny_embedder("latent", bos=bos)
    rows = padded(model, side)
    assert (rows["pool_mask"].sum() < rows["attention_mask"].sum()) == bos
    pool_mask = rows.pop("pool_mask")
    by_default, told = model.network(**rows), model.network(**rows, pool_mask=pool_mask)
    assert torch.equal(by_default.pooler_output, told.pooler_output)
    np.testing.assert_allclose(by_default.pooler_output.numpy(), model.encode(TEXTS), atol=1e-5)


@torch.no_grad()
def test_a_bos_inside_a_text_is_a_token_like_others(tiny_embedder: Callable[..., Embedder]) -> None:
    network = tiny_embedder("mean", bos=True).network
    ids = torch.tensor([[0, 9, 0, 7]])
    expected = network(ids, pool_mask=torch.tensor([[0, 1, 1, 1]])).pooler_output
    assert torch.equal(network(ids).pooler_output, expected)  # neither mask given: nothing is padding


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stock_attention_gives_the_same_states(
    implementation: str, family: str, tiny_embedder: Callable[..., Embedder]
) -> None:
    model = tiny_embedder("mean", family)
    packed = model.tokenize(TEXTS)
    expected = model.network.hidden(packed)
    with stock(model.network) as twin:
        twin.attend_by(implementation)
        torch.testing.assert_close(twin.hidden(packed), expected, rtol=1e-5, atol=1e-5)
    model.network.attend_by(implementation)
    torch.testing.assert_close(model.network.hidden(packed), expected, rtol=1e-5, atol=1e-5)


def test_embed_has_unit_length_and_a_gradient(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("latent")
    vectors = model.embed(model.tokenize(TEXTS))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(TEXTS)))
    (vectors * torch.randn_like(vectors)).sum().backward()
    assert [name for name, p in model.network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_head_may_be_more_precise_than_its_backbone(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("latent", dtype="bfloat16")
    assert next(model.network.head.parameters()).dtype == torch.float32
    packed = model.tokenize(TEXTS)
    assert model.network.hidden(packed).dtype == torch.bfloat16
    assert model.network.token_states(packed).dtype == model.network.embed(packed).dtype == torch.float32
