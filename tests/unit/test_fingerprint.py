"""Two models have one fingerprint exactly when they give the same vectors; what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.encoders.open import open_encoder
from embedwright.fingerprint import Digest, differences, fingerprint_of
from embedwright.model.embedder import Embedder

TEXTS = ["how do tides work?", "the moon", "a longer text that a short limit cuts"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pooling", ["latent", "mean", "last"])
def test_a_model_saved_elsewhere_is_the_same(
    pooling: Any, bos: bool, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, bos=bos)
    model.save(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "other")
    loaded = Embedder.load(tmp_path / "other")
    assert differences(model.fingerprint(), loaded.fingerprint()) == ""
    assert model.fingerprint() == loaded.fingerprint() == open_encoder(str(tmp_path / "other")).fingerprint()  # folded
    model.tokenizer.backend_tokenizer.enable_truncation(7)  # as other libraries leave it
    assert model.fingerprint() == loaded.fingerprint()


def test_what_differs_is_named(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    def change(name: str, act: Callable[[Embedder], object]) -> None:
        other = tiny_embedder("latent")
        act(other)
        now = other.fingerprint()
        assert differences(before, now).startswith(name) and now != before

    def train(model: Embedder) -> None:
        optimizer = torch.optim.SGD(model.network.backbone.parameters(), lr=1e-3)
        model.embed(model.tokenize(TEXTS)).sum().backward()
        optimizer.step()

    def shorter(model: Embedder) -> None:
        model.contract = model.contract.model_copy(update={"max_tokens": 8})

    model = tiny_embedder("latent")
    before = model.fingerprint()
    change("contract.max_tokens (512, now 8)", shorter)
    change("dtype (float32, now bfloat16), pooling.dtype", lambda model: model.network.to(torch.bfloat16))
    change("weights", train)
    change("pooling.weights", lambda model: model.network.head.reset())
    change("weights", lambda model: model.add_lora(rank=2))
    change("dtype (float32, now float32, mixed)", lambda model: setattr(model.network, "mixed", True))
    change("backbone.is_causal", lambda model: setattr(model.network.backbone.config, "is_causal", True))
    change("tokenizer", lambda model: model.text_tokenizer.plain.add_tokens(["tides"]))
    assert model.fingerprint() == before == tiny_embedder("latent").fingerprint()
    assert differences(before, {}).count(",") >= 5 and " more" in differences(before, {})


def test_a_folded_model_that_is_changed_is_another(tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder("latent")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.head.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    before = model.fingerprint()
    assert model.fold().fingerprint() == before
    model.network.head.to_out.weight.data[0, 0] += 1
    assert differences(before, model.fingerprint()) == "pooling.weights"


def test_every_change_of_a_tensor_is_seen() -> None:
    tensors = {
        "a": torch.nn.Parameter(torch.arange(40.0).reshape(10, 4)),
        "b": torch.arange(7, dtype=torch.bfloat16)[1:4],
        "c": torch.tensor(3.0),
        "d": torch.empty(0),
    }
    digest, seen = Digest(), set[str]()

    def check() -> None:
        now = digest.of(tensors)
        assert now not in seen and now == Digest().of(tensors) == digest.of(tensors)
        seen.add(now)

    check()
    tensors["a"].data[0, 0] = 7  # torch does not count it
    check()
    with torch.no_grad():
        tensors["a"][[1, 2]] = tensors["a"][[2, 1]]  # the sum stays
    check()
    optimizer = torch.optim.AdamW([tensors["a"]], fused=True)
    tensors["a"].grad = torch.ones(10, 4)
    optimizer.step()
    check()
    tensors["b"][2] = 9
    check()
    tensors["c"].fill_(4)
    check()
    tensors["a"] = torch.nn.Parameter(tensors["a"].detach().reshape(4, 10))
    check()
    tensors["e"] = tensors.pop("d")
    check()
    with torch.inference_mode():
        tensors["e"] = torch.ones(2)
    check()


def test_weights_are_hashed_once(tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch) -> None:
    from embedwright import fingerprint

    model = tiny_embedder("latent")
    before = model.fingerprint()
    monkeypatch.setattr(fingerprint, "tensor_digest", lambda tensor: pytest.fail("hashed again"))
    model.encode(TEXTS)
    assert model.fingerprint() == before


@pytest.fixture(scope="module")
def minilm() -> Any:
    try:
        return open_encoder("minilm")
    except FileNotFoundError:
        pytest.skip("the packaged MiniLM is not installed")


def test_a_sentence_transformer_has_one(minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = minilm.fingerprint()
    assert before == open_encoder("minilm").fingerprint()
    minilm.encode(TEXTS)
    assert minilm.fingerprint() == before
    with monkeypatch.context() as patch:
        patch.setattr(minilm.model, "max_seq_length", 8)
        assert differences(before, minilm.fingerprint()) == "settings.max_seq_length (256, now 8)"
    with monkeypatch.context() as patch:
        patch.setitem(minilm.model.prompts, "query", "query: ")
        assert differences(before, minilm.fingerprint()).startswith("settings.prompts")
    weight = next(minilm.model.parameters())
    weight.data[0, 0] += 1
    assert differences(before, minilm.fingerprint()) == "weights"
    weight.data[0, 0] -= 1


def test_an_object_of_a_users_own_may_have_none() -> None:
    class Bare:
        def encode(self, texts: Any, task: str | None = None) -> np.ndarray:
            return np.ones((len(texts), 2), np.float32)

    assert fingerprint_of(Bare()) is None
