"""Measures a model in a process of its own: parameters, seconds to encode texts, and the most memory that it took.

In a shared process, memory that was given back stays with the process, and the next model would be measured with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embedwright import threads
from embedwright.files import write_json

PASSES = 3  # over all texts; the fastest counts, since others share the machine


def measured(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Returns `parameters`, `seconds` of each pass over the texts, and `peak_memory` in bytes (None: not counted).

    Raises RuntimeError, with the last line that it said, if the process fails.
    """
    with TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "asked.json", Path(scratch) / "answer.json"
        write_json(asked, {"model": model, "texts": list(texts)})
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", "-m", __name__, str(asked), str(answer)]
        with threads.unbound():  # else it has the one core of a bound thread
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise RuntimeError(f"the process that measured {model} failed: {said}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _measure(asked: Path, answer: Path) -> None:
    from embedwright.encoders.open import open_model
    from embedwright.model.embedder import Embedder
    from embedwright.training.run.memory import peak

    said = json.loads(asked.read_text(encoding="utf-8"))
    encoder = open_model(said["model"])
    parameters = count(encoder)
    if isinstance(encoder, Embedder):
        encoder.fold()
    encoder.encode(said["texts"][:8])
    seconds = []
    for _ in range(PASSES):
        began = time.perf_counter()
        encoder.encode(said["texts"])
        seconds.append(round(time.perf_counter() - began, 4))
    write_json(answer, {"parameters": parameters, "seconds": seconds, "peak_memory": peak(encoder.device)})


def count(encoder: Any) -> int:
    """Returns the number of weights of a model, also of those that share a byte."""
    from embedwright.model.quantized import QuantizedLinear

    network = encoder.model if hasattr(encoder, "model") else encoder.network
    own: int = sum(parameter.numel() for parameter in network.parameters())
    for layer in network.modules():
        if isinstance(layer, QuantizedLinear):
            own += layer.in_features * layer.out_features + (0 if layer.bias is None else len(layer.bias))
    return own


if __name__ == "__main__":
    threads.set_up_process()
    _measure(Path(sys.argv[1]), Path(sys.argv[2]))
