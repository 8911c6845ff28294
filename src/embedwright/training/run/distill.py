"""The models that a stage follows. N texts, E embedding."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedwright.cache import cache_folder
from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder, encode_finite
from embedwright.model.embedder import Embedder
from embedwright.processes import Processes
from embedwright.text import Contract
from embedwright.training.batches.batch import Batch, Text
from embedwright.training.batches.blend import Source
from embedwright.training.recipe import Recipe
from embedwright.training.stages import Stage
from embedwright.vectors.kept import Asked, KeptVectors, encode_asked

logger = logging.getLogger(__name__)

_CHUNK = 2048  # texts of a process that are encoded and written together: a killed run loses no more


class Teacher:
    """Gives texts the vectors of the models that a stage follows, under each text's instruction, not our prefix.

    Several models count as one, whose vector is theirs one after the other, each at length 1 / sqrt(their number). So
    its cosine is the mean of their cosines.
    """

    def __init__(self, encoders: Sequence[Encoder], instructions: Mapping[str, str | None]) -> None:
        """`instructions` maps each prefix of the trained model's contract to the instruction that it stands for."""
        self.encoders, self.instructions = encoders, instructions
        self.width = sum(encode_finite(encoder, ["a text"]).shape[1] for encoder in encoders)
        self._kept: list[KeptVectors] = []

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """Returns the vectors (N, E) float32 of texts that `prepare` was given. Threads may call it at a time."""
        asked = self._asked(texts)
        return _joined([torch.from_numpy(kept.of(asked)) for kept in self._kept])

    def encode(self, texts: Sequence[Text]) -> Tensor:
        """Encodes texts (N, E) float32 and keeps nothing. Raises ValueError, with the text, for one not finite."""
        asked = self._asked(texts)
        return _joined([torch.from_numpy(encode_asked(encoder, asked)) for encoder in self.encoders])

    def prepare(self, batches: Iterable[Batch], processes: Processes, pause: Callable[[], object]) -> None:
        """Encodes the texts of `batches` whose vectors the cache folder lacks. The log says how many.

        Each process encodes a part, and all must call it. `pause` is called before each chunk. Chunks depend on
        `batches` alone and are kept whole, so a run that was killed on the way gets the vectors of an unbroken one.
        """
        with processes.together():  # all have looked before the first one writes
            self._kept = [KeptVectors(encoder, cache_folder("teachers")) for encoder in self.encoders]
        texts, encoded, seconds, minutes = 0, 0, 0.0, 1
        for chunk in _chunks(batches, _CHUNK * processes.count):
            pause()
            own = self._asked([chunk[i] for i in processes.split([len(text) for _, text in chunk])[processes.rank]])
            started = time.perf_counter()
            with processes.together():
                encoded += sum(kept.fill(own) for kept in self._kept)
            seconds += time.perf_counter() - started
            texts += len(chunk)
            if processes.is_rank_0 and seconds > 60 * minutes:
                minutes += 1
                logger.info("the teacher has vectors of %d texts so far", texts)
        for kept in self._kept:
            kept.refresh()
        total = int(processes.all_sum(encoded))
        if processes.is_rank_0:
            logger.info(
                "the teacher encoded %d texts in %.1f s; vectors of %d texts were kept from before",
                total,
                seconds,
                texts * len(self._kept) - total,
            )

    def _asked(self, texts: Sequence[Text]) -> list[Asked]:
        return [(self.instructions[prefix], text) for prefix, text in texts]


def teacher_of(stage: Stage, sources: Sequence[Source], contract: Contract) -> Teacher | None:
    """Opens the teachers of a stage that follows vectors or similarities, else returns None."""
    distill = stage.loss.distill
    if distill is None or not distill.teacher:
        return None
    tasks = [task for source in sources for task in (source.task, *source.tasks.values())]
    # for equal prefixes the last entry wins: a query without an instruction is read as a document. Rows that state none
    # are read under the model's own, and have the teacher's own there
    own = {contract.prefix(contract.default_task): ""}
    asked = ["", None, *(task.instruction or None for task in tasks)]
    instructions = own | {contract.prefix(instruction): instruction for instruction in asked}
    return Teacher([as_encoder(open_encoder(name)) for name in distill.teacher], instructions)


def projection_to(teacher: Teacher | None, recipe: Recipe, number: int, model: Embedder) -> nn.Parameter | None:
    """Draws what maps the model's vectors to the teacher's width, if stage `number` follows vectors of another one."""
    distill, width = recipe.stages[number].loss.distill, model.embedding_dim
    if teacher is None or distill is None or not distill.vector_weight or teacher.width == width:
        return None
    # steps draw with [seed, number, step], and 1 and 2 after it
    drawn = np.random.default_rng([recipe.seed, number, 0, 3]).standard_normal((teacher.width, width)) / width**0.5
    return nn.Parameter(torch.tensor(drawn, dtype=torch.float32, device=model.device))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=1) / math.sqrt(len(parts))


def _chunks(batches: Iterable[Batch], size: int) -> Iterator[list[Text]]:
    """Yields the distinct texts of all batches in the order in which they first come, at least `size` at a time."""
    seen, chunk = set[Text](), list[Text]()
    for batch in batches:
        fresh = [text for text in dict.fromkeys([*batch.queries, *batch.candidates]) if text not in seen]
        seen.update(fresh)
        chunk += fresh
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
