"""What a step costs before it runs, from the decoder's config alone: parameters, bytes, FLOPs, seconds.

No weights are read: a model without memory (torch's `meta` device) has all shapes. Memory is a sum of what autograd
keeps for each token, tensor by tensor; time is FLOPs over what a device reaches of its peak. How far both are from
measured runs: `benchmarks/plan.py`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from embedwright.cpu import onednn
from embedwright.errors import InputError
from embedwright.model.pooling import GatedBlock, LatentPooling, SelfPooling, make_head
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import naming_the_model, shape_of

GB = 10**9
Precision = Literal["fp32", "bf16"]
Kind = Literal["cpu", "cuda"]

# ---- devices


@dataclass(frozen=True, slots=True)
class Device:
    """`peak` FLOP/s of dense matrix products and `efficiency`, the share of it that a step reaches, by precision."""

    name: str
    kind: Kind
    memory: int
    peak: dict[Precision, float]
    efficiency: dict[Precision, float]
    source: str
    measured: bool = False


# Of peak, by a training step of a few billion parameters with long enough batches; smaller models reach less.
_ASSUMED: dict[Precision, float] = {"bf16": 0.4, "fp32": 0.6}
# Memory as sold, in 10^9 bytes: the drivers of all of these show more.
# Peak: bf16 with float32 sums, without sparsity (half of what data sheets print with it), and plain float32 (no TF32).
GPUS = (
    Device("L4, 24 GB", "cuda", 24 * GB, {"bf16": 121e12, "fp32": 30.3e12}, _ASSUMED, "NVIDIA L4 data sheet"),
    Device(
        "RTX 4090, 24 GB", "cuda", 24 * GB, {"bf16": 165.2e12, "fp32": 82.6e12}, _ASSUMED, "NVIDIA Ada GPU architecture"
    ),
    Device("A100, 80 GB", "cuda", 80 * GB, {"bf16": 312e12, "fp32": 19.5e12}, _ASSUMED, "NVIDIA A100 data sheet"),
    Device("H100 SXM, 80 GB", "cuda", 80 * GB, {"bf16": 989e12, "fp32": 67e12}, _ASSUMED, "NVIDIA H100 data sheet"),
    Device("H200 SXM, 141 GB", "cuda", 141 * GB, {"bf16": 989e12, "fp32": 67e12}, _ASSUMED, "NVIDIA H200 data sheet"),
)
# Of the products' peak on a CPU, by a training step: what benchmarks/plan.py saw, rounded.
_ON_CPU: dict[Precision, float] = {"bf16": 0.56, "fp32": 0.72}


def this_cpu() -> Device:
    """This machine, its peak measured in place: about a second."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak: dict[Precision, float] = {"bf16": product_speed("bf16"), "fp32": product_speed("fp32")}
    return Device("this CPU", "cpu", memory, peak, _ON_CPU, "measured in place", measured=True)


def product_speed(precision: Precision, seconds: float = 0.6) -> float:
    """FLOP/s of the faster of the products that training may use here, on a matrix of a small decoder."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(1024, 1024, dtype=dtype), torch.randn(3072, 1024, dtype=dtype)
    kernels = [F.linear, onednn.linear] if onednn.available() else [F.linear]
    best = float("inf")
    with torch.inference_mode():
        for kernel in kernels:
            stop = time.perf_counter() + seconds / len(kernels)
            while (started := time.perf_counter()) < stop:
                kernel(x, weight, None)
                best = min(best, time.perf_counter() - started)
    return 2 * len(x) * weight.numel() / best


# ---- parameters


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters by part, and widths, in elements for each token.

    `decoder` counts all that is loaded (no LM head), `layer` one of its layers, `linear` the matrices that a token goes
    through, `adapters` the LoRA, `head` the pooling block. `attention` is heads times head dim, `keys` the same of the
    key heads, `wide` the gated block's width. In one layer: `inputs` sums the input widths of the linear layers,
    `linears` counts them, `norms` sums the widths of the norms.
    """

    decoder: int
    layer: int
    linear: int
    adapters: int
    head: int
    trained: int
    layers: int
    hidden: int
    attention: int
    keys: int
    heads: int
    wide: int
    inputs: int
    linears: int
    norms: int
    pooling: nn.Module
    causal: bool


class NoEstimate(InputError):  # noqa: N818 (it is no error of the caller's)
    """A decoder whose cost the formula does not cover."""


def sizes_of(recipe: Recipe) -> Sizes:
    """Of the model that this recipe trains. OSError where its config cannot be had."""
    spec, tune = recipe.model, recipe.tune
    with naming_the_model(recipe):
        config, pooling = shape_of(spec)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, trust_remote_code=False)
        head = make_head(pooling, config.hidden_size)
    layer, matrices = backbone.layers[-1], _linears(backbone)
    if any(parameter.ndim > 2 for parameter in layer.parameters()) or len(matrices) % config.num_hidden_layers:
        raise NoEstimate(f"{spec.name} has layers of several kinds, or experts, which this count does not know")
    full = tune.method == "full"
    adapters = 0 if full else sum(tune.rank * (m.in_features + m.out_features) for m in matrices)
    decoder, in_head = _count(backbone), _count(head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = {
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "attention": config.num_attention_heads * head_dim,
        "keys": (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_dim,
    }
    of_norms = {"q_norm": widths["attention"], "k_norm": widths["keys"]}
    norms = [
        name.rpartition(".")[2] for name, module in layer.named_modules() if type(module).__name__.endswith("Norm")
    ]
    return Sizes(
        decoder=decoder,
        layer=_count(layer),
        linear=sum(m.weight.numel() for m in matrices),
        adapters=adapters,
        head=in_head,
        trained=(decoder if full else adapters) + in_head,
        layers=config.num_hidden_layers,
        wide=max(m.in_features for m in _linears(layer)),
        inputs=sum(m.in_features for m in _linears(layer)),
        linears=len(_linears(layer)),
        norms=sum(of_norms.get(name, widths["hidden"]) for name in norms),
        pooling=head,
        causal=bool(config.is_causal),
        **widths,
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the peak of a step. `work` is what stands beside the kept activations for a moment, or
    what the optimizer takes after them; `reserve` is what nobody asked for (a GPU's context, gaps between blocks)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    reserve: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.work + self.reserve


_GPU_RESERVE = 1 * GB  # CUDA's context and cuBLAS's work space: assumed
_GPU_GAPS = 0.05  # of all else, lost between blocks: assumed
_CPU_GAPS = 1 / 3  # kept by malloc between steps, with what torch prepares for each shape: what benchmarks/plan.py saw
_FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: itself, a byte for 64, a float32 for 256 of those


def memory_of(recipe: Recipe, sizes: Sizes, tokens: int, kind: Kind, *, scores: int = 0, processes: int = 1) -> Memory:
    """Of a step whose largest micro-batch has so many tokens, and whose queries and candidates give so many `scores`.

    Of many processes with `run.parallel: fsdp` each has its part of weights, gradients and optimizer, and whole what
    lies outside the layers and two layers at a time. On a CPU the libraries, about half a GB, come on top.
    """
    low, full = recipe.run.precision == "bf16", recipe.tune.method == "full"
    width = 2 if low else 4  # bytes of an element of the decoder's states
    spread = processes if recipe.run.parallel == "fsdp" else 1
    stored = 4 if full else width  # bytes of a weight of the decoder
    four_bit = recipe.tune.method == "qlora"
    saved = int((stored - _FOUR_BITS) * sizes.linear) if four_bit else 0
    weights = stored * sizes.decoder - saved + 4 * (sizes.adapters + sizes.head)
    trained = 4 * sizes.trained // spread  # bytes; the optimizer has two of them

    layer, head = kept_by_layer(recipe, sizes, kind), kept_by_head(sizes.pooling, sizes.hidden)
    gated = max((block.narrow.in_features for block in _gated_blocks(sizes.pooling)), default=0)
    # gradients at the widest place of each, while what they are made from is still there
    layer_work, head_work = width * (2 * sizes.wide + sizes.hidden), 8 * gated + 4 * sizes.hidden
    ends = 8 * sizes.hidden  # the final norm
    if recipe.tune.gradient_checkpointing:  # each layer keeps its input; one at a time is computed again
        states = 4 if full and low else width  # autocast leaves the sums between layers in float32
        kept = sizes.layers * states * sizes.hidden + ends + max(head, layer)
        peak = kept - max(head, layer) + max(head + head_work, layer + layer_work)
    else:
        kept = sizes.layers * layer + ends + head
        peak = kept + max(head_work, layer_work - head)
    copies = 2 * sizes.linear if full and low else 0  # autocast's, of the weights
    if recipe.tune.gradient_checkpointing:
        copies //= sizes.layers
    activations = tokens * kept + copies
    work = tokens * (peak - kept) + 16 * scores
    if full:  # the gradient of a matrix, before it is added to what is there
        work += 4 * sizes.wide * sizes.hidden
    if four_bit:  # a matrix as it is multiplied with
        work += width * sizes.wide * sizes.hidden
    if kind == "cuda":  # there AdamW takes all tensors at once, when the activations are gone
        work = max(work, trained - activations)

    static = weights // spread
    if spread > 1:
        outside = stored * (sizes.decoder - sizes.layers * sizes.layer) + 4 * sizes.head
        static += outside + 2 * (stored * sizes.layer + 4 * sizes.adapters // sizes.layers)
    used = static + 3 * trained + activations + work
    reserve = _GPU_RESERVE + int(_GPU_GAPS * used) if kind == "cuda" else int(_CPU_GAPS * used)
    return Memory(static, trained, 2 * trained, activations, work, reserve)


def kept_by_layer(recipe: Recipe, sizes: Sizes, kind: Kind) -> int:
    """Bytes that autograd keeps of one token in one decoder layer."""
    tune, s = recipe.tune, sizes
    full, low = tune.method == "full", recipe.run.precision == "bf16"
    width = 2 if low else 4
    if not full and tune.dropout and (kind == "cuda" or tune.method == "qlora"):
        mask = 1 if kind == "cuda" else width
        inputs = s.inputs * (width + mask)  # peft's own forward: of each linear layer the dropped input, and its mask
    elif full and low:
        inputs = s.inputs * width  # autocast makes each linear layer a copy
    else:
        inputs = (2 * s.hidden + s.attention + s.wide) * width  # layers that read the same states share them
    narrow = 0 if full else s.linears * tune.rank * width
    norms = 4 * s.norms * (2 if full else 1)  # in float32; where its weight is trained, the normed states too
    attention = 2 * (s.attention + s.keys) * width + 4 * s.heads  # queries, keys, values, output; log-sums
    gated = 3 * s.wide * width  # gate, its activation, and what it is multiplied with
    return inputs + narrow + norms + attention + gated


def kept_by_head(head: nn.Module, hidden: int) -> int:
    """Bytes that autograd keeps of one token in the pooling block, which computes in float32."""
    kept = sum(2 * hidden + 4 * block.narrow.in_features for block in _gated_blocks(head))
    if isinstance(head, LatentPooling):
        inner = head.attention.to_q.out_features
        kept += 2 * hidden + 2 * inner + head.attention.heads * len(head.latents)
    elif isinstance(head, SelfPooling):
        kept += 3 * hidden + 5 * head.attention.to_q.out_features
    return 4 * kept


def _gated_blocks(head: nn.Module) -> list[GatedBlock]:
    return [block for block in head.modules() if isinstance(block, GatedBlock)]


# ---- time


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one step; the pooling block's are counted apart, since it computes in float32 whatever the precision."""

    decoder: float
    head: float


def flops_of(recipe: Recipe, sizes: Sizes, tokens: float, squares: float, *, again: float) -> Flops:
    """Of one step over so many tokens, the squared lengths of whose texts sum to `squares`.

    A matrix costs two for each weight and token, forward; as much again for the gradient of its input, and of itself
    where it is trained. `again`: the share of the tokens that GradCache encodes twice, the first time without a graph.
    """
    tune, head = recipe.tune, sizes.pooling
    linear = 2 * sizes.linear * tokens
    adapters = 2 * sizes.adapters * tokens
    attention = 4 * sizes.layers * sizes.attention * (squares / 2 if sizes.causal else squares)
    pooling = 2 * sum(m.weight.numel() for m in _linears(head)) * tokens
    if isinstance(head, LatentPooling):  # its keys and values come from the latents: once, not for each token
        pooling -= 2 * head.attention.to_kv.weight.numel() * tokens
        pooling += 4 * head.attention.to_q.out_features * len(head.latents) * tokens
    elif isinstance(head, SelfPooling):
        pooling += 4 * head.attention.to_q.out_features * squares
    forwards = 1 + again + tune.gradient_checkpointing
    backward = linear * (2 if tune.method == "full" else 1) + 2 * adapters + 2.5 * attention  # five products for two
    return Flops(forwards * (linear + adapters + attention) + backward, (3 + again) * pooling)


def seconds_of(flops: Flops, device: Device, precision: Precision, processes: int = 1) -> float:
    """Of a step of so many FLOPs. What processes send each other is not counted."""
    parts: list[tuple[float, Precision]] = [(flops.decoder, precision), (flops.head, "fp32")]
    return sum(amount / (device.peak[kind] * device.efficiency[kind]) for amount, kind in parts) / processes
