from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwright.model.adapters.lora import add_lora
from embedwright.model.embedder import Embedder
from embedwright.model.pooling import WEIGHTLESS


@pytest.fixture
def make(tiny_decoder: Callable[..., Path]) -> Callable[..., Embedder]:
    def make(pooling: Any = "latent", *, dropout: float = 0.0, shaken: bool = False) -> Embedder:
        sizes = {} if pooling in WEIGHTLESS else {"latents": 8, "heads": 4, "multiple": 1}
        model = Embedder.from_decoder(tiny_decoder("qwen3"), pooling=pooling, **sizes)
        torch.manual_seed(0)
        add_lora(model.network.backbone, rank=4, alpha=8, dropout=dropout)
        for parameter in model.network.parameters():
            if shaken and parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.network.train()
        return model

    return make
