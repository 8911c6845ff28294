"""The teacher whose vectors a stage follows. N texts, E embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite
from embedwright.text import Contract
from embedwright.training.batches.batch import Text
from embedwright.training.batches.blend import Source
from embedwright.training.losses.total import check_widths
from embedwright.training.stages import Stage


class Teacher:
    """Encodes the texts of a batch under its own text contract: it gets each text's instruction, not our prefix."""

    def __init__(self, encoder: Encoder, instructions: Mapping[str, str | None]) -> None:
        """`instructions` maps each prefix of the trained model's contract to the instruction that it stands for."""
        self.encoder, self.instructions = encoder, instructions

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """Returns (N, E) float32. Raises ValueError, with the text, for a vector that is not finite."""
        by_prefix: dict[str, list[int]] = {}
        for i, (prefix, _) in enumerate(texts):
            by_prefix.setdefault(prefix, []).append(i)
        parts = {
            prefix: encode_finite(self.encoder, [texts[i][1] for i in rows], self.instructions[prefix])
            for prefix, rows in by_prefix.items()
        }
        back = np.argsort(np.concatenate([by_prefix[prefix] for prefix in parts]))
        return torch.from_numpy(np.concatenate(list(parts.values()))[back])


def teacher_of(stage: Stage, sources: Sequence[Source], contract: Contract, width: int) -> Teacher | None:
    """Opens the teacher of a stage that distils vectors, else returns None. Raises ConfigError if its width is not
    `width`.
    """
    distill = stage.loss.distill
    if distill is None or distill.teacher is None:
        return None
    tasks = [task for source in sources for task in (source.task, *source.tasks.values())]
    instructions = {contract.prefix(asked): asked for asked in [None, *(task.instruction or None for task in tasks)]}
    encoder = as_encoder(open_encoder(distill.teacher))
    check_widths(stage, width, encode_finite(encoder, ["a text"]).shape[1])
    return Teacher(encoder, instructions)
