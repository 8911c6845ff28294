"""Runs any encoder in `mteb.evaluate`: every MTEB task gets its instruction, symmetric tasks on all texts.

    mteb.evaluate(MtebEncoder(Embedder.load("my-embedder")), mteb.get_tasks(["SciFact", "STS12"]))

`instructions.yaml` holds the instructions. N texts, E embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from embedwright.config import load_yaml
from embedwright.encoders.options import WithOptions
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.encoders.sharded import itself
from embedwright.errors import InputError
from embedwright.fingerprint import Facts, fingerprint_of
from embedwright.model.embedder import Embedder
from embedwright.vectors.store import encode_texts

TABLE = Path(__file__).with_name("instructions.yaml")
LARGE = 5_000  # documents of one call from which their vectors are kept in `vectors`, if it is given
_PROBES = ("how do tides work?", "The moon pulls the sea, and twice a day the water rises and falls.")


class MtebEncoder(AbsEncoder):
    """Anything that encodes, as mteb's EncoderProtocol.

    `instructions` (task name -> instruction, "" for none) override the packaged ones. `max_tokens` and `batch_tokens`
    are those of `Embedder.encode`. mteb files the results under `name`.

    With `vectors` set to a folder, the vectors of many documents are written there in shards, and a call that was
    stopped goes on with the shard it was at. `watch()` makes a listener for each such call, which is told how many
    documents are done, and of how many.
    """

    def __init__(
        self,
        model: Any,
        instructions: Mapping[str, str] | None = None,
        *,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        name: str = "embedwright/model",
    ) -> None:
        own = itself(model)
        if max_tokens is not None and not isinstance(own, Embedder):
            raise InputError(f"max_tokens={max_tokens}: a {type(own).__name__} cuts texts where it wants: leave it out")
        self.model, self.instructions = as_encoder(model), dict(instructions or {})
        given = {"max_tokens": max_tokens, "batch_tokens": batch_tokens}
        self.options = {key: value for key, value in given.items() if value is not None}
        self.vectors: Path | None = None
        self.watch: Callable[[], Callable[[int, int], None]] = lambda: lambda done, total: None
        # mteb caches results by name and revision: with a fixed revision it would return those of another model
        decides = [_identity(self.model), self.instructions, max_tokens, TABLE.read_text(encoding="utf-8")]
        decides.append(version("mteb"))  # which also pins the data sets: other versions give other scores
        known: dict[str, Any] = {}
        if isinstance(own, Embedder):
            known = {
                "n_parameters": sum(p.numel() for p in own.network.parameters()),
                "max_tokens": max_tokens or own.max_tokens,
                "embed_dim": own.embedding_dim,
                "framework": ["PyTorch"],
            }
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                **known,
            }
        )

    def instruction(self, task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """Returns the instruction for a text of this task; None for a document. Without one, a query stays a query."""
        if prompt_type == PromptType.document:
            return None
        stated = self.instructions.get(task.name, instruction_of(task))
        return stated or ("" if prompt_type == PromptType.query else None)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> NDArray[Any]:
        """Encodes the texts in `inputs` to (N, E). `options` are further ones of the model's own `encode`, such as
        `precision`. `batch_size` is ignored, since batches are counted in tokens.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        task = self.instruction(task_metadata, prompt_type)
        if show_progress_bar:
            options["progress"] = True
        model = WithOptions(self.model, self.options | options)
        if self.vectors is None or prompt_type != PromptType.document or len(texts) < LARGE or options:
            return model.encode(texts, task=task)
        tell, done = self.watch(), 0

        def advance(documents: int) -> None:
            nonlocal done
            done += documents
            tell(done, len(texts))

        found = encode_texts(model, lambda: texts, len(texts), folder=self.vectors, advance=advance)
        return next(found.tiles(len(texts)))[1]


def _identity(model: Encoder) -> Facts | str:
    """Returns the model's fingerprint; where it has none, its vectors of two texts, to two decimals."""
    return fingerprint_of(model) or hashlib.sha256(np.round(model.encode(_PROBES), 2).tobytes()).hexdigest()


def instruction_of(task: TaskMetadata) -> str:
    """Returns the packaged instruction of a task, else its own prompt in mteb, else the instruction of its type.

    Raises ValueError if the type has none, since such tasks are not about text.
    """
    table = _table()
    for pattern, instruction in table["tasks"].items():
        if fnmatchcase(task.name, pattern):
            return instruction
    own = task.prompt.get(PromptType.query.value) if isinstance(task.prompt, dict) else task.prompt
    if own:
        return str(own)
    if task.type not in table["types"]:
        raise InputError(f"MTEB task {task.name} is of type {task.type}, which is not one of texts")
    return table["types"][task.type]


@cache
def _table() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = load_yaml(TABLE)
    return table
