"""Proof, by running it, that a model attends as it says and that texts in a batch do not meet.

Cheap enough to run whenever a model is made, loaded with an adapter, merged or exported: four texts of a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from embedwright.model.network import EmbedwrightModel
from embedwright.packing import pack
from embedwright.text import TokenizedText

LENGTH = 24


class ProbeError(RuntimeError):
    """The model does not do what its config says; nothing it computes can be trusted."""


@dataclass(frozen=True)
class Probe:
    """Relative changes of hidden states, largest over the tokens looked at."""

    later_token: float  # of earlier tokens, when the last token changes: 0 if causal
    batch_mates: float  # of a text, when other texts stand beside it: 0 up to rounding
    tolerance: float

    def check(self, bidirectional: bool) -> None:
        """Raises ProbeError, naming what is wrong."""
        if bidirectional and not self.later_token > self.tolerance:
            raise ProbeError(
                f"attention is causal: a changed last token leaves earlier states as they were ({self.later_token:.1e})"
            )
        if not bidirectional and self.later_token > self.tolerance:
            raise ProbeError(f"attention is not causal: a later token changes earlier states ({self.later_token:.1e})")
        if not self.batch_mates <= self.tolerance:
            raise ProbeError(f"texts in one batch leak into each other: states change by {self.batch_mates:.1e}")


@torch.no_grad()
def probe(network: EmbedwrightModel) -> Probe:
    """Runs the network as it stands (adapters included) on random tokens; the mode (train, eval) is put back."""
    training = network.training
    network.eval()
    try:
        vocabulary = network.backbone.config.vocab_size
        random = np.random.default_rng(0)
        text = random.integers(0, vocabulary, LENGTH)
        changed = text.copy()
        changed[-1] = (changed[-1] + 1 + random.integers(0, vocabulary - 1)) % vocabulary
        mates = [random.integers(0, vocabulary, n) for n in (LENGTH, 7)]
        alone_LD = _states(network, [text])
        later = _change(_states(network, [changed])[:-1], alone_LD[:-1])
        mixed_LD = _states(network, [mates[0], text, mates[1]])[LENGTH : 2 * LENGTH]
        tolerance = 1e-4 if alone_LD.dtype == torch.float32 else 3e-2
        return Probe(later, _change(mixed_LD, alone_LD), tolerance)
    finally:
        network.train(training)


def check(network: EmbedwrightModel) -> Probe:
    """The probe, and ProbeError if the network is not what its config says."""
    result = probe(network)
    result.check(bidirectional=not network.backbone.config.is_causal)
    return result


def _states(network: EmbedwrightModel, texts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tensor:
    packed = pack([TokenizedText(ids, np.ones(len(ids), dtype=bool)) for ids in texts])
    return network.hidden(packed.to(next(network.parameters()).device))


def _change(a: Tensor, b: Tensor) -> float:
    return float((a - b).float().norm(dim=-1).max() / b.float().norm(dim=-1).mean())
