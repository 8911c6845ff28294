"""A backbone whose linear layers hold their weights in 4 bits, for adapters to be trained on (QLoRA, arXiv 2305.14314).

bitsandbytes has the layers, transformers puts them in while it loads, peft has LoRA layers of its own for them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from embedwright.errors import MissingPackageError

ONLY_TRAINED = "the weights of this model are in 4 bits, for training adapters; they belong on the base as it was"


def missing() -> str | None:
    """Says what 4-bit weights lack here, as a clause; None if they can be loaded. bitsandbytes has code for CPUs
    too.
    """
    if find_spec("bitsandbytes") is None:
        return "the package bitsandbytes is missing (pip install 'embedwright[qlora]')"
    return None


def config(dtype: torch.dtype) -> Any:
    """Returns transformers' config: every linear layer in NF4, its constants quantised too, products computed in
    `dtype`.

    Raises ImportError if 4-bit weights cannot be loaded.
    """
    if lacks := missing():
        raise MissingPackageError(f"4-bit weights: {lacks}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[],  # else it skips the last layer, taking it for the LM head, which a backbone lacks
    )


def keep_trainable(backbone: nn.Module) -> None:
    """Keeps bitsandbytes from packing weights anew, in place and for good, in the first forward without a gradient.

    It does so on CPUs with AVX512-BF16. From then on no gradient goes through such a layer, without an error, and
    layers whose outputs are not a multiple of 32 fail.
    """
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def in_four_bits(backbone: nn.Module) -> bool:
    return bool(getattr(backbone, "is_loaded_in_4bit", False))
