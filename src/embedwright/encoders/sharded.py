"""One teacher in several processes: each encodes a part of the texts, and all get all vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from embedwright.encoders.protocol import Encoder
from embedwright.processes import Processes


class ShardedEncoder:
    """An encoder that every process asks for the same texts: each encodes its part, and has all.

    A model that is itself cut over the processes needs all of them in every forward: there each encodes all texts.
    """

    def __init__(self, encoder: Encoder, processes: Processes) -> None:
        self.encoder, self.processes = encoder, processes
        network = getattr(encoder, "network", None)
        self.alone = processes.count == 1 or bool(getattr(network, "sharded", False))

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        if self.alone:
            return self.encoder.encode(texts, task=task)
        parts = self.processes.split([len(text) for text in texts])
        own = parts[self.processes.rank]
        # a process without a text still has to know how wide a vector is
        vectors_NE = self.encoder.encode([texts[i] for i in own] or list(texts[:1]), task=task)[: len(own)]
        own_NE = torch.from_numpy(np.ascontiguousarray(vectors_NE)).to(self.processes.device)
        gathered_NE = self.processes.gather(own_NE, [len(part) for part in parts]).cpu().numpy()
        return np.ascontiguousarray(gathered_NE[np.argsort([i for part in parts for i in part])])
