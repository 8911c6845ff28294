"""What `embedwright doctor` says: the environment, and proofs on the model at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from embedwright import threads
from embedwright.model.embedder import Embedder
from embedwright.model.probe import probe


@dataclass(frozen=True)
class Finding:
    """One proof: what was looked at, whether it holds, and the number behind it."""

    name: str
    ok: bool
    detail: str


def environment() -> dict[str, str]:
    """Versions, device and threads, by name."""
    packages = ("torch", "transformers", "tokenizers", "peft", "sentence-transformers", "faiss-cpu")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        **{name: _version(name) for name in packages},
        "gpu": gpu,
        "cores / torch threads": f"{os.cpu_count()} / {torch.get_num_threads()}",
        "threads": threads.described(),
    }


def examine(path: str) -> list[Finding]:
    """The probe and the text contract of a saved model, each as a finding."""
    model = Embedder.load(path)
    result = probe(model.network)
    bidirectional = not model.network.backbone.config.is_causal
    word = "bidirectional" if bidirectional else "causal"
    sees_later = result.later_token > result.tolerance
    texts = ["tides", "why is the sky blue?", "a longer text, " * 12]
    task = "Given a question, retrieve passages that answer it"
    batched = model.encode(texts, task=task)
    alone = np.concatenate([model.encode([text], task=task) for text in texts])
    difference = float(np.abs(batched - alone).max())
    packed = model.tokenize(texts, task=task)
    pooled_text = model.tokenizer.decode(packed.ids_T[packed.pool_mask_T])
    last = packed.ids_T[packed.cu_seqlens[1:].long() - 1]
    return [
        Finding(f"attention is {word}", sees_later == bidirectional, f"change {result.later_token:.1e}"),
        Finding("texts in a batch do not meet", result.batch_mates <= result.tolerance, f"{result.batch_mates:.1e}"),
        Finding("packed equals one at a time", difference < 1e-4, f"largest difference {difference:.1e}"),
        Finding(
            "instruction is left out of pooling",
            "retrieve" not in pooled_text and "tides" in pooled_text,
            f"{int((~packed.pool_mask_T).sum())} of {len(packed.ids_T)} tokens",
        ),
        Finding(
            "EOS ends every text",
            bool((last == model.tokenizer.eos_token_id).all()),
            f"id {sorted(set(last.tolist()))}",
        ),
        Finding("vectors have unit length", bool(np.allclose(np.linalg.norm(batched, axis=1), 1, atol=1e-4)), ""),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
