"""The parameters of a recipe's model and the memory of a step, from the decoder's config alone.

No weights are read: a model without memory (torch's `meta` device) has all shapes. Memory is a sum of what autograd
keeps for each token, tensor by tensor. How far it is from measured runs: `benchmarks/plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModel

from embedwright.errors import InputError
from embedwright.model.pooling import GatedBlock, LatentPooling, SelfPooling, make_head
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import model_error_prefix, rank_of, shape_of

GB = 10**9
Kind = Literal["cpu", "cuda"]

# ---- parameters


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters by part, and widths in elements per token.

    `decoder` counts all that is loaded (no LM head), `layer` one of its layers, `linear` all weights of linear layers,
    `adapters` the LoRA, `head` the pooling block, `trained` what trains. `attention` is heads times head dim, `keys`
    the same for the key heads, `wide` the width of the gated block. In one layer, `inputs` sums the input widths of the
    linear layers, `linears` counts them, and `norms` sums the widths of the norms.
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
    vocabulary: int
    pooling: nn.Module


class NoEstimate(InputError):  # noqa: N818 (it is not the caller's mistake)
    """The sum does not cover this decoder."""


def sizes_of(recipe: Recipe) -> Sizes:
    """Counts the model that this recipe trains. Raises OSError if its config cannot be loaded."""
    spec, tune = recipe.model, recipe.tune
    with model_error_prefix(recipe):
        config, pooling = shape_of(spec)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, trust_remote_code=False)
        head = make_head(pooling, config.hidden_size)
    layer, matrices = backbone.layers[-1], _linears(backbone)
    if any(parameter.ndim > 2 for parameter in layer.parameters()) or len(matrices) % config.num_hidden_layers:
        raise NoEstimate(f"{spec.name} has layers of several kinds, or experts, which this count does not know")
    full = tune.method == "full"
    adapters = 0 if full else sum(rank_of(recipe) * (m.in_features + m.out_features) for m in matrices)
    decoder, in_head = _count(backbone), _count(head)
    frozen = head.latents.numel() if tune.freeze and isinstance(head, LatentPooling) else 0
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
        trained=(decoder if full else adapters) + in_head - frozen,
        layers=config.num_hidden_layers,
        wide=max(m.in_features for m in _linears(layer)),
        inputs=sum(m.in_features for m in _linears(layer)),
        linears=len(_linears(layer)),
        norms=sum(of_norms.get(name, widths["hidden"]) for name in norms),
        vocabulary=config.vocab_size,
        pooling=head,
        **widths,
    )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the peak of a step.

    `work` is transient memory on top of the kept activations. `reserve` is overhead: a GPU's context, gaps between
    blocks.
    """

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
_GPU_GAPS = 0.05  # share of all else that is lost between blocks: assumed
_CPU_GAPS = 1 / 3  # kept by malloc between steps, with what torch prepares for each shape: what benchmarks/plan.py saw
_FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: itself, a byte for 64, a float32 for 256 of those


def memory_of(recipe: Recipe, sizes: Sizes, tokens: int, kind: Kind, *, scores: int = 0, processes: int = 1) -> Memory:
    """Sums the memory of a step whose largest micro-batch has `tokens` tokens, and whose batch has `scores` scores.

    With `run.parallel: fsdp`, each process holds its shard of weights, gradients and optimizer state. It also holds in
    full the parameters outside the layers, two gathered layers, and for a moment one layer's gradient twice: as
    computed and as sent. At the start it holds the whole model, before sharding. On a CPU, libraries take about half a
    GB more.
    """
    low, full = recipe.run.precision == "bf16", recipe.tune.method == "full"
    width = 2 if low else 4  # bytes of an element of the decoder's states
    spread = processes if recipe.run.parallel == "fsdp" else 1
    stored = 4 if full else width  # bytes of a weight of the decoder
    four_bit = recipe.tune.method == "qlora"
    saved = int((stored - _FOUR_BITS) * sizes.linear) if four_bit else 0
    weights = stored * sizes.decoder - saved + 4 * (sizes.adapters + sizes.head)
    trained = 4 * sizes.trained // spread  # bytes; the optimizer has two of them

    layer, head = kept_by_layer(recipe, sizes, kind), kept_by_head(sizes.pooling, sizes.hidden, low)
    gated = max((block.narrow.in_features for block in _gated_blocks(sizes.pooling)), default=0)
    # gradients at the widest place of each, while what they are made from is still there
    layer_work, head_work = width * (2 * sizes.wide + sizes.hidden), 2 * width * gated + 4 * sizes.hidden
    ends = 8 * sizes.hidden  # the final norm
    if recipe.tune.gradient_checkpointing:  # each layer keeps its input; one at a time is computed again
        states = 4 if full and low else width  # autocast leaves the sums between layers in float32
        kept = sizes.layers * states * sizes.hidden + ends + max(head, layer)
        peak = kept - max(head, layer) + max(head + head_work, layer + layer_work)
    else:
        kept = sizes.layers * layer + ends + head
        peak = kept + max(head_work, layer_work - head)
    copies = 2 * sizes.linear if full and low and spread == 1 else 0  # autocast's, of weights not gathered in bfloat16
    if recipe.tune.gradient_checkpointing:
        copies //= sizes.layers
    if low:
        copies += 2 * sum(linear.weight.numel() for linear in _linears(sizes.pooling))
    activations = tokens * kept + copies
    work = tokens * (peak - kept) + 16 * scores
    if full and spread == 1:  # the gradient of a matrix, before it is added to what is there
        work += 4 * sizes.wide * sizes.hidden
    if four_bit:  # a matrix as it is multiplied with
        work += width * sizes.wide * sizes.hidden

    static = weights // spread
    if spread > 1:
        outside = sizes.decoder - sizes.layers * sizes.layer
        static += stored * outside + 4 * sizes.head + 2 * (width * sizes.layer + 4 * sizes.adapters // sizes.layers)
        work += max(8 * sizes.head, (width + 4) * sizes.layer, 8 * outside) if full else 8 * sizes.head
        work = max(work, weights - static - 3 * trained - activations)  # each process opens the whole model at first
    used = static + 3 * trained + activations + work
    reserve = _GPU_RESERVE + int(_GPU_GAPS * used) if kind == "cuda" else int(_CPU_GAPS * used)
    return Memory(static, trained, 2 * trained, activations, work, reserve)


def kept_by_layer(recipe: Recipe, sizes: Sizes, kind: Kind) -> int:
    """Counts the bytes that autograd keeps per token in one decoder layer."""
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
    narrow = 0 if full else s.linears * rank_of(recipe) * width
    norms = 4 * s.norms * (2 if full else 1)  # in float32; where its weight is trained, the normed states too
    attention = 2 * (s.attention + s.keys) * width + 4 * s.heads  # queries, keys, values, output; log-sums
    gated = 3 * s.wide * width  # gate, its activation, and what it is multiplied with
    return inputs + narrow + norms + attention + gated


def kept_by_head(head: nn.Module, hidden: int, low: bool = False) -> int:
    """Counts the bytes that autograd keeps per token in the pooling block. `low`: its products are in bf16."""
    width, states = 2 if low else 4, 4 * hidden  # what norms read is in float32
    kept = sum(states + width * (hidden + 4 * block.narrow.in_features) for block in _gated_blocks(head))
    if isinstance(head, LatentPooling):
        softmax = head.attention.heads * len(head.latents)
        kept += states + width * (hidden + 2 * head.attention.to_q.out_features) + (6 if low else 4) * softmax
    elif isinstance(head, SelfPooling):
        kept += states + width * (2 * hidden + 5 * head.attention.to_q.out_features)
    return kept


def _gated_blocks(head: nn.Module) -> list[GatedBlock]:
    return [block for block in head.modules() if isinstance(block, GatedBlock)]
