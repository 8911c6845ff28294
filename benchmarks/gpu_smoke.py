"""One GPU: packed = one text at a time, gradients, throughput against sentence-transformers. Writes results/gpu.json.

Nobody has run this yet: no GPU has been at hand. Exits 1 where a check fails, 2 where there is no CUDA.

    python benchmarks/gpu_smoke.py
"""

from __future__ import annotations

from common import MB, bind_main_thread, bind_threads, ratio, record, rounds

bind_threads()

import argparse  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from encode import least_cosine  # noqa: E402
from texts import counter, source, text_set  # noqa: E402
from torch import Tensor  # noqa: E402

from embedwright.model.embedder import Embedder  # noqa: E402

MODEL = "smollm2-135m"
TOLERANCE = 1e-4  # float32: of unit vectors; of gradients, relative to the largest of their tensor
SMALLEST_COSINE = 0.999  # bfloat16 to float32
CHECK_TOKENS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="of the timed texts")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-smoke: torch sees no CUDA device, nothing was measured", file=sys.stderr)
        sys.exit(2)
    bind_main_thread()
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        models.make_folders(MODEL, Path(folder))
        exact = models.ours(MODEL, Path(folder), "float32", "cuda")
        checks = {"packed_to_single": packed_to_single(exact), "gradients": gradients(exact)}
        print(json.dumps(checks))
        speed = throughput(Path(folder), exact, options.tokens, options.rounds)
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "model": models.described(MODEL),
        "texts": source(),
        "checks": checks,
        "throughput": speed,
    }
    print(json.dumps(speed, indent=1))
    record("gpu", figures, {})
    wrong = [name for name, difference in checks.items() if not difference <= TOLERANCE]
    wrong += ["bfloat16 vectors"] if not speed["ours"]["cosine"] > SMALLEST_COSINE else []
    if wrong:
        sys.exit(f"gpu-smoke: {', '.join(wrong)} out of tolerance")


def packed_to_single(model: Embedder) -> float:
    """Largest difference between vectors of texts that were encoded together and each alone."""
    texts, _ = text_set("mixed", CHECK_TOKENS, counter(model))
    alone = np.concatenate([model.encode([text]) for text in texts])
    return float(np.abs(model.encode(texts) - alone).max())


def gradients(model: Embedder) -> float:
    """Largest difference to the stock sdpa path's gradients, relative to the largest gradient of each weight.

    Infinite where a gradient is not finite.
    """
    texts, _ = text_set("mixed", CHECK_TOKENS, counter(model))
    implementation = model.network.implementation
    ours = _gradients(model, texts)
    model.network.implementation = "sdpa"
    stock = _gradients(model, texts)
    model.network.implementation = implementation
    if not all(gradient.isfinite().all() for gradient in ours):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, stock, strict=True) if b.any())


def _gradients(model: Embedder, texts: list[str]) -> list[Tensor]:
    weights = list(model.network.backbone.parameters())
    vectors_NE = model.embed(model.tokenize(texts))
    wanted_NE = torch.randn(vectors_NE.shape, generator=torch.Generator().manual_seed(0)).to(vectors_NE.device)
    return list(torch.autograd.grad((vectors_NE * wanted_NE).sum(), weights))


def throughput(folder: Path, exact: Embedder, tokens: int, count: int) -> dict[str, Any]:
    """bfloat16, mixed texts: us, sentence-transformers with sdpa, and with flash attention where that is installed."""
    texts, _ = text_set("mixed", tokens, counter(exact))
    total = len(exact.tokenize(texts).ids_T)
    reference = exact.encode(texts)
    ours = models.ours(MODEL, folder, "bfloat16", "cuda")
    ours.encode(texts)
    runs: dict[str, Any] = {"ours": lambda: ours.encode(texts)}
    kinds = ["sdpa"] + (["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])
    batches = {}
    for kind in kinds:
        peer = models.peer(folder, "bfloat16", "cuda", kind)
        peer[0].unpad_inputs = kind != "sdpa"  # its own unpadding, which needs flash attention
        batches[kind], _ = models.best_batch(peer, texts, None)
        runs[kind] = lambda peer=peer, kind=kind: models.encode_peer(peer, texts, None, batches[kind])
    seconds = rounds(runs, count)
    found: dict[str, Any] = {}
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        vectors = run()
        found[name] = {
            "batch": batches.get(name),
            "tokens_per_second": total / statistics.median(seconds[name]),
            "ours_is_faster": ratio(seconds[name], seconds["ours"]),
            "cosine": least_cosine(reference, vectors),
            "peak_mb": torch.cuda.max_memory_allocated() / MB,
        }
    return found


if __name__ == "__main__":
    main()
