"""Where a GPU's time goes in encode, and what compiled layers would bring. `gpu_smoke.py` runs both. Not run yet."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.profiler
from common import rounds, timed
from encode import least_cosine
from numpy.typing import NDArray

from embedwright.model.embedder import Embedder

LARGEST = 8  # kernels that a profile names


def profile(run: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """Which share of these seconds the GPU computes, the rest being the host's, and what takes most of that share."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    took = {event.key: event.self_device_time_total / 1e6 for event in found.key_averages()}
    largest = sorted(took, key=lambda name: -took[name])[:LARGEST]
    return {"busy": sum(took.values()) / seconds, "largest": {name[:80]: took[name] / seconds for name in largest}}


def compiled(
    model: Embedder, run: Callable[[], Any], reference: NDArray[np.float32], count: int, tokens: int
) -> dict[str, Any]:
    """The same with each layer compiled by torch, for all lengths at once. Says why, where that fails: the figures
    before it are kept."""
    layers = model.network.backbone.layers
    try:
        for layer in layers:
            layer.compile(dynamic=True)
        first = timed(run)
        seconds = rounds({"compiled": run}, count)["compiled"]
        rate = tokens / statistics.median(seconds)
        return {"first_seconds": first, "tokens_per_second": rate, "cosine": least_cosine(reference, run())}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
