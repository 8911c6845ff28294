"""Pooling heads against the block as the notes on the checkpoints write it down, and against numpy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from embedwright.model import network as network_module
from embedwright.model.adapters.lora import add_lora
from embedwright.model.embedder import Embedder
from embedwright.model.pooling import (
    WEIGHTLESS,
    FoldedLatent,
    Kind,
    LatentPooling,
    MlpPooling,
    PoolingConfig,
    make_head,
    pool_tokens,
)
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

D = 24
D_TINY = 32  # of the tiny decoders
LENGTHS = [5, 5, 1, 9]
KINDS_WITH_WEIGHTS = [kind for kind in get_args(Kind) if kind not in WEIGHTLESS]


@pytest.fixture
def packed() -> PackedTexts:
    random = np.random.default_rng(0)
    pools = [random.random(n) < 0.6 for n in LENGTHS]
    for pool in pools:
        pool[-1] = True
    return pack([TokenizedText(np.zeros(len(p), np.int64), p) for p in pools])


@pytest.fixture
def states_TD() -> Tensor:
    return torch.randn(sum(LENGTHS), D, generator=torch.Generator().manual_seed(3))


def head_of(kind: Any, hidden: int = D, **sizes: Any) -> Any:
    torch.manual_seed(5)
    head = make_head(PoolingConfig(kind=kind, **{"latents": 7, "heads": 3, "multiple": 2, **sizes}), hidden)
    head.reset()
    return head


def with_random_weights(head: nn.Module) -> Any:
    torch.manual_seed(6)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


# ---- what the blocks compute


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def reference_block(x: Tensor, context: Tensor, w: dict[str, Tensor], heads: int, head_dim: int) -> Tensor:
    """`nv-embed-checkpoints.md`, "What the model computes", point 2; the context is not masked."""
    q = layer_norm(x, w, "attention.norm") @ w["attention.to_q.weight"].T
    k, v = (layer_norm(context, w, "attention.norm_context") @ w["attention.to_kv.weight"].T).chunk(2, -1)
    mixed = []
    for h in range(heads):
        part = slice(h * head_dim, (h + 1) * head_dim)
        weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(head_dim))
        mixed.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
    x = x + torch.cat(mixed, -1) @ w["attention.to_out.weight"].T
    wide = layer_norm(x, w, "feed_forward.norm") @ w["feed_forward.widen.weight"].T + w["feed_forward.widen.bias"]
    value, gate = wide.chunk(2, -1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return x + (value * gelu) @ w["feed_forward.narrow.weight"].T + w["feed_forward.narrow.bias"]


@pytest.mark.parametrize("head_dim", [None, 5])
def test_latent_is_the_released_block(packed: PackedTexts, states_TD: Tensor, head_dim: int | None) -> None:
    head = with_random_weights(head_of("latent", head_dim=head_dim)).double()
    w = dict(head.state_dict())
    expected = reference_block(states_TD.double(), w["latents"], w, heads=3, head_dim=head_dim or D // 3)
    torch.testing.assert_close(head(states_TD.double(), packed), expected)


def test_self_is_the_same_block_over_its_own_text(packed: PackedTexts, states_TD: Tensor) -> None:
    head = with_random_weights(head_of("self"))
    w = {name: weight.double() for name, weight in head.state_dict().items()}
    texts = states_TD.double().split(LENGTHS)
    expected = torch.cat([reference_block(text, text, w, heads=3, head_dim=D // 3) for text in texts])
    torch.testing.assert_close(head(states_TD, packed).double(), expected, rtol=1e-4, atol=1e-4)


def test_token_wise_heads_mix_no_tokens_and_the_others_those_of_a_text(packed: PackedTexts, states_TD: Tensor) -> None:
    changed_TD = states_TD.clone()
    changed_TD[7] *= -2  # third token of the second text, which has tokens 5 to 9
    for kind in KINDS_WITH_WEIGHTS:
        head = with_random_weights(head_of(kind))
        moved_T = (head(changed_TD, packed) - head(states_TD, packed)).norm(dim=-1)
        reached = set(torch.nonzero(moved_T > 1e-4).flatten().tolist())
        assert {7} <= reached <= ({7} if head.token_wise else {5, 6, 7, 8, 9}), kind
        assert kind != "self" or len(reached) == 5


def test_attention_weights_are_those_of_the_forward(packed: PackedTexts, states_TD: Tensor) -> None:
    head = with_random_weights(head_of("latent"))
    weights_HTR = head.attention_weights(states_TD)
    assert weights_HTR.shape == (3, sum(LENGTHS), 7)
    torch.testing.assert_close(weights_HTR.sum(-1), torch.ones(3, sum(LENGTHS)))
    _, values_HRd = head.attention.keys_values(head.latents)
    mixed_TD = (weights_HTR @ values_HRd).transpose(0, 1).flatten(1)
    expected = head.feed_forward(states_TD + head.attention.to_out(mixed_TD))
    torch.testing.assert_close(head(states_TD, packed), expected, rtol=1e-4, atol=1e-4)


# ---- folded


class LargestSeen(TorchDispatchMode):
    """Elements of the largest tensor of `dtype` that any operation gives, and the names of all operations."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.elements, self.names = dtype, 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == self.dtype and tensor._base is None:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("head_dim", [None, 5])
def test_a_folded_block_is_the_block(packed: PackedTexts, states_TD: Tensor, head_dim: int | None) -> None:
    head = with_random_weights(head_of("latent", head_dim=head_dim)).double()
    expected = head(states_TD.double(), packed).detach()
    folded = FoldedLatent(head)
    torch.testing.assert_close(folded(states_TD.double(), packed), expected)
    left = {name: tuple(p.shape) for name, p in folded.named_parameters() if not name.startswith("feed_forward")}
    assert left == {"norm.weight": (D,), "norm.bias": (D,), "to_scores.weight": (21, D), "to_out.weight": (D, 21)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_folded_in_float64_and_kept_in_the_type_of_the_block(dtype: torch.dtype) -> None:
    head = with_random_weights(head_of("latent", latents=11, head_dim=40)).to(dtype)
    exact, folded = FoldedLatent(copy.deepcopy(head).double()), FoldedLatent(head)
    for name in ("to_scores", "to_out"):
        weight = getattr(folded, name).weight
        assert weight.dtype == dtype and torch.equal(weight, getattr(exact, name).weight.to(dtype))


def test_folding_has_never_more_than_one_head_in_float64() -> None:
    head = head_of("latent", heads=8, head_dim=D)
    with LargestSeen(torch.float64) as seen:
        FoldedLatent(head)
    assert seen.elements == D * D  # one head's part of a projection; a whole one has eight times as many


def test_folded_weights_that_overflow_are_refused() -> None:
    head = with_random_weights(head_of("latent")).half()
    with torch.no_grad():
        head.attention.to_q.weight *= 1e4
        head.attention.to_kv.weight *= 1e2
    with pytest.raises(ValueError, match=r"overflows torch\.float16: load the model in another dtype"):
        FoldedLatent(head)
    assert FoldedLatent(head.float()).to_scores.weight.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 3e-3), ("bfloat16", 3e-2)])
def test_a_folded_model_gives_the_same_vectors(
    tiny_embedder: Callable[..., Embedder], dtype: str, tolerance: float
) -> None:
    texts = ["tides", "a longer text, " * 9, ""]
    model = tiny_embedder("latent")
    model.network.to(getattr(torch, dtype))
    expected = model.encode(texts, "a task")
    head = model.network.head
    assert model.fold() is model and model.network.head is not head
    np.testing.assert_allclose(model.encode(texts, "a task"), expected, rtol=0, atol=tolerance)
    folded = model.network.head
    assert model.fold().network.head is folded and not folded.training
    assert {p.dtype for p in folded.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind != "latent"])
def test_heads_without_latents_stay(kind: str, tiny_embedder: Callable[..., Embedder]) -> None:
    model = tiny_embedder(kind)
    head = model.network.head
    assert model.fold().network.head is head and next(model.network.parameters()).requires_grad


def test_a_folded_model_is_for_inference_alone(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="folded for inference: load the model again")
    model = tiny_embedder("latent").fold()
    packed = model.tokenize(["a text", "another"])
    assert not model.embed(packed).requires_grad
    with refused:
        model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with refused:
        model.network.save_pretrained(tmp_path / "network")
    with refused:
        model.network.state_dict()
    with refused:
        model.network.head.reset()
    model.network.head.feed_forward.requires_grad_(True)
    with refused:
        model.embed(packed)
    model.network.head.requires_grad_(False)
    model.embed(packed)
    add_lora(model.network.backbone, rank=2, alpha=4, dropout=0.0)
    with refused:
        model.embed(packed)
    assert np.isfinite(model.encode(["a text"])).all()  # without gradients adapters may stand in front of it


# ---- long texts


@pytest.mark.parametrize("kind", ["latent", "folded", "mlp"])
def test_without_gradients_token_wise_heads_run_in_slices(
    kind: str, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that memory for their wide intermediates does not grow with a text."""
    model = tiny_embedder("latent" if kind == "folded" else kind, multiple=4)
    if kind == "folded":
        model.fold()
    head, packed = model.network.head, model.tokenize(["a longer text, " * 60, "a short one"])
    hidden_TD = model.network.hidden(packed).detach()
    monkeypatch.setattr(model.network, "hidden", lambda _: hidden_TD)
    calls: list[int] = []
    head.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    total = len(hidden_TD)
    with torch.no_grad(), LargestSeen(torch.float32) as whole:
        expected_TD = model.network.token_states(packed)
    monkeypatch.setattr(network_module, "HEAD_SLICE", 8)
    with torch.no_grad(), LargestSeen(torch.float32) as sliced:
        got_TD = model.network.token_states(packed)
    assert total > 400 and calls == [total, *[8] * (total // 8), *([total % 8] if total % 8 else [])]
    torch.testing.assert_close(got_TD, expected_TD, rtol=1e-6, atol=1e-6)
    # what is left is the output itself
    assert whole.elements >= total * 8 * D_TINY and sliced.elements == total * D_TINY
    if kind != "folded":
        assert model.network.token_states(packed).requires_grad and calls[-1] == total


def test_self_attention_sees_whole_texts_always(
    tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_embedder("self")
    expected = model.encode(["a longer text, " * 9])
    monkeypatch.setattr(network_module, "HEAD_SLICE", 8)
    np.testing.assert_allclose(model.encode(["a longer text, " * 9]), expected, rtol=0, atol=1e-6)


# ---- training in bf16


class TypesSeen(TorchDispatchMode):
    """The types of the tensors that each operation takes, and of those that a softmax gives."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        given = [out] if name == "_softmax" else [x for x in args if isinstance(x, Tensor)]
        self.types.setdefault(name, set()).update(x.dtype for x in given if x.dtype.is_floating_point)
        return out


@pytest.mark.parametrize("kind", KINDS_WITH_WEIGHTS)
def test_in_bf16_a_head_multiplies_in_bfloat16_and_norms_and_sums_in_float32(
    kind: str, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head alone, over the same states. The loss and its gradient stay near those of float32."""
    network = tiny_embedder(kind).network.train()
    with_random_weights(network.head).requires_grad_()
    for parameter in network.head.parameters():
        parameter.data *= 0.5
    packed = tiny_embedder(kind).tokenize([f"{word} and " * n for n, word in enumerate(("moon", "tide", "sea") * 4, 2)])
    states_TD = network.hidden(packed).detach()
    monkeypatch.setattr(network, "hidden", lambda _: states_TD)
    products = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
    found = []
    for network.mixed in (False, True):
        network.zero_grad(set_to_none=True)
        with TypesSeen() as seen:
            vectors_NE = network.embed(packed)
        used = {name: types for name, types in seen.types.items() if name in products}
        assert used and set().union(*used.values()) == {torch.bfloat16 if network.mixed else torch.float32}
        for name in ("native_layer_norm", "_softmax", "_embedding_bag", "div"):
            assert seen.types.get(name, {torch.float32}) == {torch.float32}, name
        assert network.mixed or set().union(*seen.types.values()) == {torch.float32}
        scores_NN = vectors_NE[:6] @ vectors_NE[6:].T / 0.02
        loss = torch.nn.functional.cross_entropy(scores_NN, torch.arange(6))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in network.head.parameters() if p.grad is not None])
        found.append((loss.item(), vectors_NE.detach(), gradient))
    (loss, exact_NE, exact), (near, near_NE, approximate) = found
    assert near_NE.dtype == torch.float32 and 0 < (near_NE - exact_NE).norm(dim=-1).max() < 0.01
    assert loss > 0.5 and near == pytest.approx(loss, rel=0.01)
    assert torch.nn.functional.cosine_similarity(exact, approximate, dim=0) > 0.999


# ---- how they start


@pytest.mark.parametrize("kind", KINDS_WITH_WEIGHTS)
def test_a_fresh_head_is_the_identity(kind: Any, packed: PackedTexts, states_TD: Tensor) -> None:
    head = head_of(kind)
    assert torch.equal(head(states_TD, packed), states_TD)
    assert torch.equal(pool_tokens(head(states_TD, packed), packed, kind), pool_tokens(states_TD, packed, "mean"))


@pytest.mark.parametrize("kind", KINDS_WITH_WEIGHTS)
def test_a_fresh_head_is_not_stuck_there(kind: Any, packed: PackedTexts, states_TD: Tensor) -> None:
    """Zero output projections get a gradient at once, and everything else does after one step."""
    head = head_of(kind)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        pool_tokens(head(states_TD, packed), packed, kind).square().sum().backward()
        optimizer.step()
    without = [name for name, p in head.named_parameters() if p.grad is None or not torch.count_nonzero(p.grad)]
    assert without == []


@pytest.mark.parametrize(("hidden", "heads", "head_dim"), [(64, 4, None), (96, 2, 96), (256, 8, None)])
def test_attention_over_fresh_latents_is_neither_flat_nor_hard(hidden: int, heads: int, head_dim: int | None) -> None:
    head = head_of("latent", hidden, latents=128, heads=heads, head_dim=head_dim)
    x_TD = torch.randn(200, hidden)
    keys, _ = head.attention.keys_values(head.latents)
    scores = head.attention.queries(x_TD) @ keys.transpose(1, 2) * head.attention.head_dim**-0.5
    assert 0.7 < float(scores.detach().std()) < 1.3
    torch.testing.assert_close(scores.softmax(-1), head.attention_weights(x_TD))


def test_reset_depends_on_the_seed_alone() -> None:
    first, again = head_of("latent"), head_of("latent")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


# ---- sizes


@pytest.mark.parametrize(
    ("hidden", "sizes"),
    [
        (576, {"latents": 128, "heads": 8}),
        (1024, {"latents": 512, "heads": 8}),
        (256, {"latents": 512, "heads": 4, "head_dim": 256, "multiple": 2}),
    ],
)
def test_the_control_has_the_parameters_of_latent_attention(hidden: int, sizes: dict[str, int]) -> None:
    with torch.device("meta"):
        latent, mlp = (make_head(PoolingConfig(kind=k, **sizes), hidden) for k in ("latent", "mlp"))
    assert isinstance(latent, LatentPooling) and isinstance(mlp, MlpPooling)
    counts = [sum(p.numel() for p in head.parameters()) for head in (latent, mlp)]
    assert abs(counts[0] / counts[1] - 1) < 0.01


def test_the_released_sizes_make_740_million_parameters() -> None:
    config = PoolingConfig(kind="latent", latents=512, heads=8, head_dim=4096, multiple=4)
    with torch.device("meta"):
        head = make_head(config, 4096)
    inner = 8 * 4096
    expected = 512 * 4096 + 4 * inner * 4096 + 3 * 16384 * 4096 + 2 * 16384 + 4096 + 3 * 2 * 4096
    assert sum(p.numel() for p in head.parameters()) == expected and 7.3e8 < expected < 7.5e8


def test_heads_that_do_not_divide_need_a_head_dim() -> None:
    for kind in KINDS_WITH_WEIGHTS:
        with pytest.raises(ValueError, match="heads=5 do not divide hidden size 24: set head_dim"):
            head_of(kind, heads=5)
        head_of(kind, heads=5, head_dim=4)
    for kind in WEIGHTLESS:
        assert list(head_of(kind, heads=5).parameters()) == []


# ---- reduce


def test_mean_is_over_the_pooled_tokens_alone(packed: PackedTexts, states_TD: Tensor) -> None:
    x, pool, at = states_TD.numpy(), packed.pool_mask_T.numpy(), 0
    expected = []
    for length in LENGTHS:
        rows = x[at : at + length][pool[at : at + length]]
        expected.append(rows.mean(0))
        at += length
    for kind in ("mean", *KINDS_WITH_WEIGHTS):
        np.testing.assert_allclose(pool_tokens(states_TD, packed, kind).numpy(), expected, rtol=1e-5, atol=1e-6)

    left_out_TD = torch.where(packed.pool_mask_T[:, None], states_TD, states_TD + 100)
    assert torch.equal(pool_tokens(left_out_TD, packed, "mean"), pool_tokens(states_TD, packed, "mean"))


def test_the_mean_adds_tokens_in_their_order_and_knows_no_atomics() -> None:
    """Numbers of which another order has another sum."""
    packed = pack([TokenizedText(np.zeros(n, np.int64), np.arange(n) % 3 != 1) for n in LENGTHS])
    exponents = torch.arange(sum(LENGTHS)) * 7919 % 13 * 4 - 24
    states_TD = ((-2.0) ** exponents[:, None] * torch.arange(1.1, 3)).requires_grad_()
    with LargestSeen(torch.float32) as seen:
        got_ND = pool_tokens(states_TD, packed, "mean")
        got_ND.sum().backward()
    assert not {"index_add", "scatter_add", "index_put", "cumsum"} & seen.names and "_embedding_bag" in seen.names
    sums, texts = [], zip(states_TD.split(LENGTHS), packed.pool_mask_T.split(LENGTHS), strict=True)
    for text_TD, pool_T in texts:
        kept = text_TD.detach().numpy()[pool_T.numpy()]
        sums.append([sum(rows, np.zeros(2, np.float32)) / np.float32(len(kept)) for rows in (kept, kept[::-1])])
    np.testing.assert_array_equal(got_ND.detach().numpy(), [forward for forward, _ in sums])
    assert any((forward != back).any() for forward, back in sums)
    shares = [pool_T / pool_T.sum() for pool_T in packed.pool_mask_T.split(LENGTHS)]
    torch.testing.assert_close(states_TD.grad, torch.cat(shares)[:, None].expand(-1, 2))


def test_last_is_the_last_token_of_each_text(packed: PackedTexts, states_TD: Tensor) -> None:
    ends = np.cumsum(LENGTHS) - 1
    np.testing.assert_array_equal(pool_tokens(states_TD, packed, "last").numpy(), states_TD.numpy()[ends])


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_sums_are_float32_whatever_comes_in(kind: Any, packed: PackedTexts, states_TD: Tensor) -> None:
    halved_TD = states_TD.bfloat16()
    reduced = pool_tokens(halved_TD, packed, kind)
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(reduced, pool_tokens(halved_TD.float(), packed, kind))


def test_a_fold_that_moves_vectors_is_taken_back(
    tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_embedder("latent")
    with torch.no_grad():
        for parameter in model.network.head.parameters():
            parameter.normal_(std=0.3)
    head, before = model.network.head, model.encode(["how do tides work?"])
    made = FoldedLatent.__init__

    def faulty(self: FoldedLatent, latent: LatentPooling) -> None:
        made(self, latent)
        self.to_out.weight[:, 0] *= 4

    monkeypatch.setattr(FoldedLatent, "__init__", faulty)
    with pytest.raises(RuntimeError, match="folding"):
        model.fold()
    assert model.network.head is head
    np.testing.assert_array_equal(model.encode(["how do tides work?"]), before)
    monkeypatch.undo()
    np.testing.assert_allclose(model.fold().encode(["how do tides work?"]), before, atol=1e-5)
