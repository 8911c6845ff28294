"""Modules that a trainer keeps in evaluation stay there, whatever encodes, probes, adds adapters or merges."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import nn

from embedwright.model.embedder import Embedder
from embedwright.model.verify import selftest
from embedwright.model.verify.modes import evaluating
from embedwright.model.verify.probe import probe


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in network.named_modules()}


@pytest.fixture
def model(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    """In training, but for one layer and a part of the head."""
    made = tiny_embedder("latent")
    made.network.train()
    made.network.backbone.layers[1].eval()
    made.network.head.feed_forward.eval()
    return made


def _in_evaluation(model: Embedder, _: Path) -> None:
    """The network as a whole is in evaluation, and one layer trains."""
    model.network.training = False
    model.encode(["tides"])


DONE: dict[str, Callable[[Embedder, Path], Any]] = {
    "encode": lambda model, _: model.encode(["tides"]),
    "encode, the root in evaluation": _in_evaluation,
    "probe": lambda model, _: probe(model.network),
    "selftest": lambda model, folder: selftest.write(model.network, model.text_tokenizer, folder),
    "save": lambda model, folder: model.save(folder / "model"),
}


@pytest.mark.parametrize("what", DONE)
def test_each_module_is_in_its_own_mode_again(what: str, model: Embedder, tmp_path: Path) -> None:
    before = modes(model.network) | {"": what != "encode, the root in evaluation"}
    DONE[what](model, tmp_path)
    assert modes(model.network) == before and set(before.values()) == {True, False}


def test_adapters_take_the_mode_of_their_layers(model: Embedder) -> None:
    before = modes(model.network)
    model.add_lora(rank=2, alpha=4, dropout=0.5)
    after = modes(model.network)
    assert {name: after[name] for name in before} == before
    dropouts = {name: training for name, training in after.items() if name.endswith("lora_dropout.default")}
    assert {name for name, training in dropouts.items() if not training} == {n for n in dropouts if ".layers.1." in n}
    for name, parameter in model.network.backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.merge()
    assert modes(model.network) == before


def test_a_folded_head_takes_over_parts_as_they_are(model: Embedder) -> None:
    model.network.head.attention.norm.eval()
    before = modes(model.network.head)
    after = modes(model.fold().network.head)
    assert after[""] and after["to_scores"] and not after["norm"]
    assert after["feed_forward"] == before["feed_forward"]


def test_an_error_inside_puts_them_back(model: Embedder) -> None:
    before = modes(model.network)
    with pytest.raises(RuntimeError), evaluating(model.network):
        assert not any(modes(model.network).values())
        raise RuntimeError
    assert modes(model.network) == before


def test_the_last_thread_that_leaves_puts_them_back(model: Embedder) -> None:
    before = modes(model.network)
    both_in, one_out = Barrier(2, timeout=20), Barrier(2, timeout=20)

    def first() -> None:
        with evaluating(model.network):
            both_in.wait()
        one_out.wait()

    def second() -> bool:
        with evaluating(model.network):
            both_in.wait()
            one_out.wait()
            return any(modes(model.network).values())

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(first), pool.submit(second)]
        assert [future.result() for future in running] == [None, False]
    assert modes(model.network) == before


def test_dropout_is_off_in_every_thread(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("mean").add_lora(rank=2, alpha=4, dropout=0.5)
    for name, parameter in model.network.backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = model.encode(["tides"])
    model.network.train()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: model.encode(["tides"]), range(200)))
    assert all(torch.equal(torch.tensor(vectors), torch.tensor(expected)) for vectors in found)
