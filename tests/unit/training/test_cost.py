from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MixtralConfig

from embedwright.model.embedder import Embedder
from embedwright.model.pooling import WEIGHTLESS, Kind
from embedwright.packing import PackedTexts, pack
from embedwright.training.cost import (
    GB,
    Memory,
    NoEstimate,
    Sizes,
    kept_by_head,
    memory_of,
    sizes_of,
)
from embedwright.training.recipe import Recipe
from embedwright.vectors import search

POOLINGS = get_args(Kind)
TEXTS, LENGTH = 16, 64
TOKENS = TEXTS * LENGTH
Made = tuple[Recipe, Embedder]


@pytest.fixture
def made(tiny_decoder: Callable[..., Path]) -> Callable[..., Made]:
    """`made(family, pooling, method, precision, **)`: a recipe, and the model that it trains, as training makes it."""

    def make(
        family: str = "llama",
        pooling: str = "mean",
        method: str = "lora",
        precision: str = "fp32",
        *,
        checkpointing: bool = False,
        dropout: float = 0.0,
        layers: int = 3,
        rank: int = 4,
        **model: Any,
    ) -> Made:
        spec = {"base": str(tiny_decoder(family)), "pooling": pooling, "layers": layers, "latents": 6, "heads": 2}
        content = {
            "name": "tiny",
            "model": spec | {"multiple": 2} | model,
            "tune": {"method": method, "rank": rank, "alpha": 8, "dropout": dropout}
            | {"gradient_checkpointing": checkpointing},
            "stages": [
                {
                    "name": "one",
                    "data": [{"path": "pairs.jsonl"}],
                    "in_batch_negatives": "all",
                    "hard_negatives": 1,
                    "optim": {"lr": 1e-3, "steps": 2, "batch_queries": 4},
                }
            ],
            "run": {"out": "runs/tiny", "precision": precision},
        }
        recipe = Recipe.parse(content)
        sizes = recipe.model.model_dump(include={"latents", "heads", "head_dim", "multiple"})
        low, lora = precision == "bf16", method != "full"
        embedder = Embedder.from_decoder(
            recipe.model.base,
            pooling=recipe.model.pooling,
            attention=recipe.model.attention,
            layers=layers,
            dtype="bfloat16" if low and lora else "float32",
            four_bit=method == "qlora",
            **sizes,
        )
        network = embedder.network
        network.mixed = low
        if lora:
            embedder.add_lora(rank, 8, dropout)
        if checkpointing:
            network.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        network.train()
        return recipe, embedder

    return make


@pytest.fixture
def packed(random_texts: Callable[..., Any]) -> PackedTexts:
    return pack(random_texts([LENGTH] * TEXTS))


# ---- parameters


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_parameters_are_those_of_the_model_that_is_built(made: Any, pooling: str, method: str) -> None:
    recipe, model = made(pooling=pooling, method=method, head_dim=12)
    _same_parameters(sizes_of(recipe), model, method)


def test_parameters_of_every_family(made: Any, family: str) -> None:
    recipe, model = made(family, "latent", layers=2)
    _same_parameters(sizes_of(recipe), model, "lora")


def _same_parameters(sizes: Sizes, model: Embedder, method: str) -> None:
    named = list(model.network.named_parameters())
    counted = lambda kept: sum(p.numel() for name, p in named if kept(name, p))  # noqa: E731
    assert sizes.trained == counted(lambda name, p: p.requires_grad)
    assert sizes.adapters == counted(lambda name, p: "lora_" in name)
    assert sizes.head == counted(lambda name, p: name.startswith("head."))
    assert sizes.decoder + sizes.adapters + sizes.head == counted(lambda name, p: True)
    assert (sizes.adapters > 0) == (method == "lora")


def test_a_mixture_of_experts_is_refused(made: Any, tmp_path: Path) -> None:
    recipe, _ = made()
    MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=50).save_pretrained(tmp_path)
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(tmp_path)})})
    with pytest.raises(NoEstimate, match="experts"):
        sizes_of(other)


# ---- memory


def kept_bytes(network: nn.Module, run: Callable[[], Any]) -> int:
    """Of all tensors that autograd keeps for a backward, parameters and buffers aside."""
    own = {x.untyped_storage()._cdata for x in [*network.parameters(), *network.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = run()
    del made
    return sum(storage.nbytes() for storage in kept.values())


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those made meanwhile."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.seen = {x.untyped_storage()._cdata for x in [*network.parameters(), *network.buffers()]}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(key)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, key, storage.nbytes())
        return made

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def most_bytes(model: Embedder, packed: PackedTexts) -> int:
    """At the peak of forward and backward, beside weights and gradients."""
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Live(model.network) as live:
        model.network.embed(packed).square().sum().backward()
    return live.most


def memory(recipe: Recipe, kind: Any = "cpu", **options: Any) -> Memory:
    return memory_of(recipe, sizes_of(recipe), TOKENS, kind, **options)


CASES = [
    (family, pooling, method, precision)
    for family, pooling in [
        *(("llama", kind) for kind in POOLINGS if kind != "last"),
        ("qwen3", "mean"),
        ("gemma3", "mean"),
        ("phi3", "mean"),
    ]
    for method in ("lora", "full")
    for precision in ("fp32", "bf16")
]


@pytest.mark.parametrize(("family", "pooling", "method", "precision"), CASES)
def test_activations_are_what_autograd_keeps(
    made: Any, packed: PackedTexts, family: str, pooling: str, method: str, precision: str
) -> None:
    recipe, model = made(family, pooling, method, precision)
    assert memory(recipe).activations == pytest.approx(
        kept_bytes(model.network, lambda: model.network.embed(packed)), rel=0.15
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "latent"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_forward_and_backward(
    made: Any, packed: PackedTexts, pooling: str, method: str, precision: str, checkpointing: bool
) -> None:
    recipe, model = made("llama", pooling, method, precision, checkpointing=checkpointing, layers=3)
    found = memory(recipe)
    assert found.activations + found.work == pytest.approx(most_bytes(model, packed), rel=0.2)


def test_dropout_costs_a_cpu_nothing_and_a_gpu_a_mask_and_a_copy(made: Any, packed: PackedTexts) -> None:
    recipe, model = made(dropout=0.25)
    plain = memory(made()[0]).activations
    assert (
        memory(recipe).activations
        == plain
        == pytest.approx(kept_bytes(model.network, lambda: model.network.embed(packed)), rel=0.15)
    )
    inputs = 0
    for module in model.network.modules():  # a GPU goes peft's own way
        if isinstance(module, PeftLinear):
            module.__class__ = PeftLinear
            inputs += module.in_features
    mask_in_floats = 3 * TOKENS * inputs  # what a CPU keeps beyond the byte that a GPU needs for an element
    on_gpu = memory(recipe, "cuda").activations
    assert on_gpu > 1.2 * plain
    assert on_gpu == pytest.approx(
        kept_bytes(model.network, lambda: model.network.embed(packed)) - mask_in_floats, rel=0.15
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer_are_those_of_a_step(
    made: Any, packed: PackedTexts, method: str, precision: str
) -> None:
    recipe, model = made("llama", "latent", method, precision)
    network = model.network
    optimizer = torch.optim.AdamW(p for p in network.parameters() if p.requires_grad)
    network.embed(packed).square().sum().backward()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    found = memory(recipe)
    assert found.weights == size(network.parameters())
    for parameter in network.parameters():  # what had no part in this loss has one in others
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    assert found.gradients == size(p.grad for p in network.parameters() if p.grad is not None)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert found.optimizer == size(states)
    assert found.total == sum(
        (found.weights, found.gradients, found.optimizer, found.activations, found.work, found.reserve)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_4_bit_weights_are_counted_with_their_constants(made: Any, precision: str) -> None:
    recipe, model = made("llama", "latent", "lora", precision)
    four_bit = recipe.model_copy(update={"tune": recipe.tune.model_copy(update={"method": "qlora"})})
    weights = [
        part.weight
        for name, part in model.network.backbone.named_modules()
        if isinstance(part, nn.Linear) and "lora_" not in name
    ]
    plain = sum(weight.numel() * weight.element_size() for weight in weights)
    blocks = [math.ceil(weight.numel() / 64) for weight in weights]
    packed = sum(weight.numel() // 2 for weight in weights) + sum(n + 4 * math.ceil(n / 256) for n in blocks)
    assert memory(recipe).weights - memory(four_bit).weights == pytest.approx(plain - packed, rel=0.01)
    assert sizes_of(four_bit).trained == sizes_of(recipe).trained
    assert memory(four_bit).activations == memory(recipe).activations


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_qlora_is_what_bitsandbytes_and_peft_keep(
    made: Any, packed: PackedTexts, precision: str, dropout: float
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="package bitsandbytes is missing (the extra [qlora])")
    recipe, model = made("llama", "latent", "qlora", precision, dropout=dropout)
    kept = kept_bytes(model.network, lambda: model.network.embed(packed))
    assert memory(recipe).activations == pytest.approx(kept, rel=0.15)
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    states = [p.weight.quant_state for p in model.network.modules() if isinstance(p, bnb.nn.Linear4bit)]
    constants = [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]
    assert len(states) == 3 * 7
    assert memory(recipe).weights == pytest.approx(size([*model.network.parameters(), *constants]), rel=0.01)
    recipe, model = made("llama", "latent", "qlora", precision, dropout=dropout)
    found = memory(recipe)
    assert found.activations + found.work == pytest.approx(most_bytes(model, packed), rel=0.2)


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_fsdp_cuts_what_ddp_repeats(made: Any, precision: str, width: int) -> None:
    recipe, model = made("llama", "latent", "full", precision)
    one = memory(recipe)
    assert memory(recipe, processes=4) == one  # ddp
    cut = memory(recipe.model_copy(update={"run": recipe.run.model_copy(update={"parallel": "fsdp"})}), processes=4)
    network = model.network
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layer, head, every = count(network.backbone.layers[0]), count(network.head), count(network)
    outside = every - 3 * layer
    assert cut.weights == 4 * every // 4 + 4 * outside + 2 * width * layer  # layers are gathered in the run's type
    assert (cut.gradients, cut.optimizer) == (4 * every // 4, 2 * (4 * every // 4))
    linears = [m for m in network.backbone.modules() if isinstance(m, nn.Linear)]
    copies = sum(2 * m.weight.numel() for m in linears) if precision == "bf16" else 0
    assert cut.activations == one.activations - copies  # and autocast needs no copies of them
    widest, hidden = linears[-1].in_features, linears[-1].out_features
    whole = max(8 * head, (width + 4) * layer, 8 * (outside - head))
    assert cut.work == one.work - 4 * widest * hidden + whole


def test_at_the_start_each_process_of_fsdp_holds_the_whole_model(made: Any) -> None:
    recipe, model = made("llama", "latent", "full", checkpointing=True)
    cut = recipe.model_copy(update={"run": recipe.run.model_copy(update={"parallel": "fsdp"})})
    sizes = sizes_of(recipe)
    deep = replace(sizes, layers=sizes.layers + 500, decoder=sizes.decoder + 500 * sizes.layer)
    found = memory_of(cut, deep, 1, "cuda", processes=10**6)
    assert found.total - found.reserve == 4 * (sum(p.numel() for p in model.network.parameters()) + 500 * sizes.layer)


def test_a_search_holds_what_is_counted_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for a GPU, on the CPU."""
    monkeypatch.setattr(search, "_on_cpu", lambda x: False)
    for name, size in {"QUERIES": 64, "DOCUMENTS": 512, "ROWS": 4096, "NUMBERS": 4096}.items():
        monkeypatch.setattr(search, f"_GPU_{name}", size)
    random = np.random.default_rng(0)
    queries, documents = (random.standard_normal((count, 64)).astype(np.float32) for count in (256, 2000))
    with Live(nn.Module()) as live:
        search.top_k(queries, documents, 30)
    assert live.most == pytest.approx(search.gpu_bytes(256, 64), rel=0.1)


def test_tokens_scores_and_a_gpus_own_part(made: Any) -> None:
    recipe, _ = made()
    sizes = sizes_of(recipe)
    small, large = (memory_of(recipe, sizes, tokens, "cpu") for tokens in (TOKENS, 3 * TOKENS))
    assert (large.activations, large.work) == (3 * small.activations, 3 * small.work)
    assert memory(recipe, scores=1000).work == small.work + 16_000  # scores, masked, their softmax, the gradient
    assert small.reserve == (small.total - small.reserve) // 3 and memory(recipe, "cuda").reserve > GB
    few = memory_of(recipe, sizes, 1, "cuda")  # the fused AdamW takes nothing beside what it updates
    assert few.activations + few.work < few.gradients


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pooling", [kind for kind in POOLINGS if kind not in WEIGHTLESS])
def test_what_the_pooling_block_keeps(made: Any, packed: PackedTexts, pooling: str, low: bool) -> None:
    recipe, model = made("llama", pooling, heads=4, latents=64)  # attention is a good part of it
    hidden_TD = torch.randn(TOKENS, 32, requires_grad=True)
    model.network.hidden = lambda _: hidden_TD
    model.network.mixed = low
    kept = kept_bytes(model.network, lambda: model.network.token_states(packed))
    if low:  # copies of the weights
        kept -= sum(2 * m.weight.numel() for m in model.network.head.modules() if isinstance(m, nn.Linear))
    assert kept_by_head(sizes_of(recipe).pooling, 32, low) * TOKENS == pytest.approx(kept, rel=0.05)
    assert kept_by_head(nn.Identity(), 32, low) == 0


def test_norms_within_attention_count_by_their_width(made: Any) -> None:
    assert sizes_of(made("llama")[0]).norms == 2 * 32
    assert sizes_of(made("qwen3")[0]).norms == 2 * 32 + 4 * 8 + 2 * 8
    assert sizes_of(made("gemma3")[0]).norms == 4 * 32 + 4 * 8 + 2 * 8
