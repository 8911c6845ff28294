"""Released NV-Embed, opened natively, gives what the published reference code gave for the same folder.

The folders under fixtures are tiny checkpoints with random weights in the released layout; expected.* were computed by
the unchanged reference code in float32 (their README says how).
"""

from __future__ import annotations

import json
import socket
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedwright.encoders.open import open_encoder
from embedwright.model.embedder import Embedder

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = {version: FIXTURES / f"nvembed-tiny-{version}" for version in ("v1", "v2")}
EXPECTED: dict[str, Any] = {v: json.loads((f / "expected.json").read_text()) for v, f in FOLDERS.items()}
CASES = [(version, case) for version in FOLDERS for case in EXPECTED[version]["cases"]]
COUNTED = [(version, case) for version, case in CASES if "instruction_tokens" in EXPECTED[version]["cases"][case]]
TRACES = [(version, case) for version, case in CASES if case.startswith("trace")]
TEXTS: list[str] = EXPECTED["v2"]["texts"]
TASK = "Given a question, retrieve passages that answer the question"


@cache
def opened(version: str, backend: Any = "packed") -> Embedder:
    return Embedder.load(FOLDERS[version], dtype="float32", backend=backend, device="cpu")


@cache
def arrays(version: str) -> dict[str, Any]:
    with np.load(FOLDERS[version] / "expected.npz") as stored:
        return dict(stored)


def case_of(version: str, case: str) -> tuple[list[str], dict[str, Any]]:
    """Its texts, and how to encode them."""
    described = EXPECTED[version]["cases"][case]
    texts = [EXPECTED[version]["texts"][i] for i in described["texts"]]
    return texts, {"prefix": described["instruction"], "max_tokens": described["max_length"]}


# ---- the reference's numbers


@pytest.mark.parametrize(("version", "case"), COUNTED)
def test_ids_and_masks_are_the_references(version: str, case: str) -> None:
    texts, how = case_of(version, case)
    packed = opened(version).tokenize(texts, **how)
    ids, attended, pooled = (arrays(version)[f"{case}/{w}"] for w in ("input_ids", "attention_mask", "pool_mask"))
    np.testing.assert_array_equal(packed.lengths_N.numpy(), attended.sum(1))
    np.testing.assert_array_equal(packed.ids_T.numpy(), ids[attended == 1])
    np.testing.assert_array_equal(packed.pool_mask_T.numpy(), pooled[attended == 1] == 1)
    assert int((pooled[0] != attended[0]).sum()) == EXPECTED[version]["cases"][case]["instruction_tokens"]


@pytest.mark.parametrize("backend", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize(("version", "case"), CASES)
def test_vectors_are_the_references(version: str, case: str, backend: str) -> None:
    texts, how = case_of(version, case)
    expected = arrays(version)[f"{case}/embeddings"]
    np.testing.assert_allclose(opened(version, backend).encode(texts, **how), expected, rtol=0, atol=1e-5)


@cache
def folded(version: str) -> Embedder:
    return Embedder.load(FOLDERS[version], dtype="float32", device="cpu").fold()


@pytest.mark.parametrize(("version", "case"), CASES)
def test_the_folded_block_gives_them_too(version: str, case: str) -> None:
    texts, how = case_of(version, case)
    expected = arrays(version)[f"{case}/embeddings"]
    np.testing.assert_allclose(folded(version).encode(texts, **how), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "lowest"), [("float16", 0.9999), ("bfloat16", 0.99)])
@pytest.mark.parametrize("version", FOLDERS)
def test_the_folded_block_in_16_bits(version: str, dtype: str, lowest: float) -> None:
    texts, how = case_of(version, "instruct")
    model = Embedder.load(FOLDERS[version], dtype=dtype, device="cpu").fold()
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, dtype)}
    cosines = (model.encode(texts, **how) * arrays(version)["instruct/embeddings"]).sum(1)
    assert cosines.min() > lowest


@pytest.mark.parametrize(("version", "case"), TRACES)
@torch.inference_mode()
def test_the_steps_are_the_references(version: str, case: str) -> None:
    texts, how = case_of(version, case)
    model, expected = opened(version), arrays(version)
    packed = model.tokenize(texts, **how)
    attended = expected[f"{case}/attention_mask"] == 1
    hidden_TD, tokens_TD = model.network.hidden(packed), model.network.token_states(packed)
    steps = {"last_hidden_state": hidden_TD, "token_output": tokens_TD}
    for name, got in steps.items():
        np.testing.assert_allclose(got.numpy(), expected[f"{case}/{name}"][attended], rtol=0, atol=1e-4)
    chunks, pools = (x.split(packed.lengths_N.tolist()) for x in (tokens_TD, packed.pool_mask_T))
    pooled = torch.stack([chunk[pool].mean(0) for chunk, pool in zip(chunks, pools, strict=True)])
    np.testing.assert_allclose(pooled.numpy(), expected[f"{case}/pooled"], rtol=0, atol=1e-4)


def test_a_task_is_put_into_the_released_template() -> None:
    model = opened("v2")
    assert (model.contract.mask_rule, model.contract.eos_id, model.contract.bos_ids) == ("count", 2, (1,))
    assert (model.max_tokens, opened("v1").max_tokens) == (32768, 4096)
    expected = arrays("v2")["instruct/embeddings"]
    np.testing.assert_allclose(model.encode(TEXTS, TASK, max_tokens=512), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", FOLDERS)
def test_the_padded_door_gives_the_same(version: str) -> None:
    stored = {w: torch.tensor(arrays(version)[f"instruct/{w}"]) for w in ("input_ids", "attention_mask", "pool_mask")}
    stored["input_ids"] = stored["input_ids"].long()
    with torch.inference_mode():
        got = opened(version).network(**stored).pooler_output
    np.testing.assert_allclose(got.numpy(), arrays(version)["instruct/embeddings"], rtol=0, atol=1e-5)


def test_an_instruction_that_fills_the_window_is_refused() -> None:
    """The reference returns NaN here."""
    for max_tokens in (17, 5):
        with pytest.raises(ValueError, match=r"texts\[0\].*leave no token to pool"):
            opened("v2").encode(TEXTS, TASK, max_tokens=max_tokens)
    assert np.isfinite(opened("v2").encode(TEXTS, TASK, max_tokens=18)).all()


# ---- opened


@pytest.mark.parametrize("version", FOLDERS)
def test_nothing_asks_the_hub(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the config and the tokenizer's config name a hub repository; the test suite's offline switch is off."""
    attempts = []

    def refuse(*args: Any, **_: Any) -> Any:
        attempts.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = Embedder.load(FOLDERS[version], dtype="float32")
    assert model.encode(["a text"]).shape == (1, 64) and attempts == []


def test_the_encoder_is_found_by_its_folder() -> None:
    model = open_encoder(str(FOLDERS["v1"]))
    assert isinstance(model, Embedder) and model.tokenizer.pad_token == "</s>"


@pytest.mark.parametrize(("asked", "given"), [(None, "float16"), ("float16",) * 2, ("bfloat16",) * 2, ("float32",) * 2])
def test_the_type_is_the_one_asked_for_or_stored(asked: str | None, given: str) -> None:
    model = Embedder.load(FOLDERS["v2"], dtype=asked)
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, given)}
    assert {b.dtype for b in model.network.buffers()} == {torch.float32}  # rotary frequencies stay exact
    texts, how = case_of("v2", "instruct")
    cosines = (model.encode(texts, **how) * arrays("v2")["instruct/embeddings"]).sum(1)
    assert cosines.min() > {"float32": 0.999999, "float16": 0.9999, "bfloat16": 0.99}[given]


@pytest.mark.parametrize("version", FOLDERS)
def test_the_weights_are_the_stored_bits(version: str) -> None:
    network = Embedder.load(FOLDERS[version]).network
    stored: dict[str, torch.Tensor] = {}
    for file in FOLDERS[version].glob("*.safetensors"):
        stored |= load_file(file)
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in stored.values())
    queries = stored["embedding_model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(network.backbone.layers[1].self_attn.q_proj.weight.cpu(), queries)


# ---- saved, tuned


@pytest.mark.parametrize("version", FOLDERS)
def test_it_survives_our_own_format(version: str, tmp_path: Path) -> None:
    model = opened(version)
    model.save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved")
    assert loaded.contract == model.contract and loaded.contract.mask_rule == "count"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "embedwright"
    before, after = model.network.state_dict(), loaded.network.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    for case in ("plain", "instruct", "truncated_instruct"):
        texts, how = case_of(version, case)
        a, b = loaded.tokenize(texts, **how), model.tokenize(texts, **how)
        assert torch.equal(a.ids_T, b.ids_T) and torch.equal(a.pool_mask_T, b.pool_mask_T)
        np.testing.assert_allclose(loaded.encode(texts, **how), model.encode(texts, **how), rtol=0, atol=1e-6)


def test_tuned_it_is_saved_as_an_adapter_and_merged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """LoRA on the backbone, and every tensor of the latent block, its latents and norms too."""
    model = Embedder.load(FOLDERS["v2"], dtype="float32", device="cpu")
    before = model.encode(TEXTS, TASK)
    model.add_lora(rank=2, alpha=4)
    np.testing.assert_allclose(model.encode(TEXTS, TASK), before, atol=1e-6)
    head = {name: p.detach().clone() for name, p in model.network.head.named_parameters()}
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    queries, passages = (model.tokenize(TEXTS[3:7], task, max_tokens=64) for task in (TASK, None))
    losses = []
    for _ in range(4):
        scores = model.embed(queries) @ model.embed(passages).T
        loss = torch.nn.functional.cross_entropy(scores * 20, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, p in model.network.head.named_parameters() if not torch.equal(p, head[name])}
    assert moved == head.keys() >= {"latents", "attention.norm.weight", "attention.norm_context.bias"}
    tuned = model.encode(TEXTS, TASK)
    assert np.abs(tuned - before).max() > 1e-2

    model.save(tmp_path / "adapter")
    loaded = Embedder.load(tmp_path / "adapter")
    np.testing.assert_allclose(loaded.encode(TEXTS, TASK), tuned, atol=1e-6)
    loaded.merge().save(tmp_path / "merged")
    np.testing.assert_allclose(Embedder.load(tmp_path / "merged").encode(TEXTS, TASK), tuned, atol=1e-5)
    assert not caplog.messages  # no adapter was left behind
