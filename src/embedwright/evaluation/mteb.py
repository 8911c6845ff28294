"""Runs an embedder in `mteb.evaluate`: every MTEB task gets its instruction, symmetric tasks on all texts.

    mteb.evaluate(MtebEncoder(Embedder.load("my-embedder")), mteb.get_tasks(["SciFact", "STS12"]))

`instructions.yaml` holds the instructions. N texts, E embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from embedwright.config import load_yaml
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder

TABLE = Path(__file__).with_name("instructions.yaml")


class MtebEncoder(AbsEncoder):
    """An `Embedder` as mteb's EncoderProtocol.

    `instructions` (task name -> instruction, "" for none) override the packaged ones. `max_tokens` cuts texts as in
    `Embedder.encode`. mteb files the results under `name`.
    """

    def __init__(
        self,
        model: Embedder,
        instructions: Mapping[str, str] | None = None,
        *,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        name: str = "embedwright/model",
    ) -> None:
        self.model, self.instructions = model, dict(instructions or {})
        self.max_tokens, self.batch_tokens = max_tokens, batch_tokens
        # mteb caches results by name and revision: with a fixed revision it would return those of another model
        decides = [model.fingerprint(), self.instructions, max_tokens, TABLE.read_text(encoding="utf-8")]
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16],
                "n_parameters": sum(p.numel() for p in model.network.parameters()),
                "max_tokens": max_tokens or model.max_tokens,
                "embed_dim": model.embedding_dim,
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": True,
                "framework": ["PyTorch"],
            }
        )

    def instruction(self, task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """Returns the instruction for a text of this task; None for a document."""
        if prompt_type == PromptType.document:
            return None
        return self.instructions.get(task.name, instruction_of(task)) or None

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        show_progress_bar: bool = False,
        precision: Any = "float32",
        batch_size: int | None = None,
    ) -> NDArray[Any]:
        """Encodes the texts in `inputs` to (N, E). `batch_size` is ignored, since batches are counted in tokens."""
        vectors: NDArray[Any] = self.model.encode(
            [text for batch in inputs for text in batch["text"]],
            task=self.instruction(task_metadata, prompt_type),
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            precision=precision,
            progress=show_progress_bar,
        )
        return vectors


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
