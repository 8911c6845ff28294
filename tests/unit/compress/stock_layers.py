"""Texts, and what transformers' own model computes of them: the reference of the tests of pruning. No line of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

TEXTS = ["How do tides work?", "The moon pulls the sea, twice a day.", "x", "Numbers such as 3.14 stand in many texts."]


def stock(folder: Path) -> tuple[Any, Any]:
    """Opens the model and the tokenizer of a saved folder."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).float().eval()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def stock_states(folder: Path, text: str) -> list[torch.Tensor]:
    """Returns the input of each layer and the output of the last, for one text."""
    (model, tokenizer), seen = stock(folder), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    model.layers[-1].register_forward_hook(lambda _, __, out: seen.append((out if torch.is_tensor(out) else out[0])[0]))
    with torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"))
    return seen
