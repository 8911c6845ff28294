from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from embedwright.model.adapters.lora import add_lora
from embedwright.model.embedder import Embedder
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText
from embedwright.training.engine import gradcache

Grads = dict[str, Tensor]
SEED = 1234


@pytest.fixture
def make(tiny_decoder: Callable[..., Path]) -> Callable[[float], Embedder]:
    def make(dropout: float) -> Embedder:
        model = Embedder.from_decoder(tiny_decoder("llama"), pooling="latent", latents=8, heads=4, multiple=1)
        torch.manual_seed(0)
        add_lora(model.network.backbone, rank=4, alpha=8, dropout=dropout)
        for parameter in model.network.parameters():  # nothing stays at the zero that it starts from
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.network.train()
        return model

    return make


@pytest.fixture
def micro_batches(random_texts: Callable[..., list[TokenizedText]]) -> list[PackedTexts]:
    texts = random_texts([30, 12, 12, 9, 7, 21, 5, 5, 5, 17, 2])
    return [pack(texts[a:b]) for a, b in ((0, 1), (1, 4), (4, 6), (6, 10), (10, 11))]


def loss_of(embedded_NE: Tensor) -> Tensor:
    """Any loss in which all texts meet."""
    scores_NN = embedded_NE @ embedded_NE.roll(1, 0).T / 0.05
    return torch.nn.functional.cross_entropy(scores_NN, torch.arange(len(embedded_NE)).flip(0))


def grads(model: Embedder) -> Grads:
    found = {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}
    model.network.zero_grad(set_to_none=True)
    return found


def difference(a: Grads, b: Grads) -> float:
    """Relative, of the parameter that differs most."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


def test_equals_the_gradient_of_the_whole_batch(
    make: Callable[[float], Embedder],
    micro_batches: list[PackedTexts],
    random_texts: Callable[..., list[TokenizedText]],
) -> None:
    model = make(0.0)
    whole = pack(random_texts([30, 12, 12, 9, 7, 21, 5, 5, 5, 17, 2]))
    expected = loss_of(model.embed(whole))
    expected.backward()
    plain = grads(model)
    assert len(micro_batches) > 3
    loss = gradcache.backward(model.embed, micro_batches, loss_of, SEED)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert {n for n, p in model.network.named_parameters() if p.requires_grad} == plain.keys()
    assert difference(grads(model), plain) < 1e-5


def test_with_dropout_it_repeats_the_masks_of_the_first_pass(
    make: Callable[[float], Embedder], micro_batches: list[PackedTexts]
) -> None:
    model = make(0.3)

    def plain(seed: int) -> tuple[float, Grads]:
        parts = []
        for i, packed in enumerate(micro_batches):
            torch.manual_seed(seed + i)
            parts.append(model.embed(packed))
        loss = loss_of(torch.cat(parts))
        loss.backward()
        return loss.item(), grads(model)

    expected, expected_grads = plain(SEED)
    loss = gradcache.backward(model.embed, micro_batches, loss_of, SEED)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert difference(grads(model), expected_grads) < 1e-5
    assert difference(plain(SEED + 50)[1], expected_grads) > 0.1  # other masks would show


def test_one_micro_batch_is_a_plain_backward(
    make: Callable[[float], Embedder], micro_batches: list[PackedTexts]
) -> None:
    model = make(0.3)
    torch.manual_seed(SEED)
    expected = loss_of(model.embed(micro_batches[3]))
    expected.backward()
    plain = grads(model)
    assert gradcache.backward(model.embed, [micro_batches[3]], loss_of, SEED) == expected.item()
    assert difference(grads(model), plain) == 0


def test_gradients_are_added_and_all_but_the_first_micro_batch_are_embedded_twice(
    make: Callable[[float], Embedder], micro_batches: list[PackedTexts]
) -> None:
    model = make(0.0)
    gradcache.backward(model.embed, micro_batches, loss_of, SEED)
    once = grads(model)
    with_graph: list[bool] = []

    def embed(packed: PackedTexts) -> Tensor:
        embedded = model.embed(packed)
        with_graph.append(embedded.requires_grad)
        return embedded

    for _ in range(2):
        gradcache.backward(embed, micro_batches, loss_of, SEED)
    twice = grads(model)
    assert with_graph == ([False] * 4 + [True] * 5) * 2  # the first one keeps its graph
    assert difference({n: g / 2 for n, g in twice.items()}, once) < 1e-6
