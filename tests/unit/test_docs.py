"""Numbers of the docs that can be computed, computed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, MistralConfig

from embedwright.model.pooling import FoldedLatent, LatentPooling, PoolingConfig

DOCS = Path(__file__).parents[2] / "docs"


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_memory_table_of_nv_embed() -> None:
    with torch.device("meta"):
        decoder = AutoModel.from_config(MistralConfig())  # transformers' defaults are Mistral-7B-v0.1's sizes
        head = LatentPooling(PoolingConfig(latents=512, heads=8, head_dim=4096, multiple=4), 4096)
    backbone, latent = count(decoder), count(head)
    tiny = LatentPooling(PoolingConfig(latents=3, heads=2, head_dim=8, multiple=4), 8)
    tiny.reset()  # a block is folded by its values, and new parameters are whatever lay in memory
    assert count(FoldedLatent(tiny)) == 2 * 8 * 2 * 3 + count(tiny.attention.norm) + count(tiny.feed_forward)
    small = 2 * 4096 * 8 * 512 + count(head.attention.norm) + count(head.feed_forward)
    assert (backbone, latent) == (7_110_660_096, 740_356_096)  # as released: nv-embed-checkpoints, "Weights"
    table = (DOCS / "nv-embed.md").read_text()
    assert re.search(rf"pooling block alone, parameters \| {latent:,} \| {small:,} \|", table)
    for name, width in (("float32", 4), ("float16, bfloat16", 2)):
        loaded, lean = ((backbone + block) * width / 1e9 for block in (latent, small))
        assert f"| {name} | {loaded:.2f} GB | {lean:.2f} GB |" in table
