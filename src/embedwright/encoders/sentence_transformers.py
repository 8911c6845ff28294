"""A sentence-transformers model as one that encodes queries and documents, under its own prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedwright.errors import InputError
from embedwright.fingerprint import Digest, Facts, config_facts, dtypes, facts, tokenizer_fact
from embedwright.text import check_texts

# A model that names no prompt of a side has none there.
_SETTINGS = ("prompts", "default_prompt_name", "max_seq_length", "truncate_dim")
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")


class SentenceTransformerEncoder:
    """An `Encoder` of a sentence-transformers model.

    The model was not trained on our instructions: `task` only says which side the texts are on, documents where it is
    None, else queries. Suites and data give every model theirs; `encode_query` refuses one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._digest = Digest()

    @property
    def device(self) -> Any:
        """The device of the model."""
        return self.model.device

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        """Encodes to float32 (N, E) of unit length, in the order given. Raises as `Embedder.encode` for bad texts."""
        texts = check_texts(texts)
        encode = self.model.encode_document if task is None else self.model.encode_query
        if not texts:
            return np.empty((0, self.model.get_embedding_dimension()), dtype=np.float32)
        vectors = encode(texts, prompt_name=self.prompt_name(task), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    def encode_query(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        """Encodes queries, under the model's own prompt. Raises as `check_task`."""
        self.check_task(task)
        return self.encode(texts, "")

    def check_task(self, task: str | None) -> None:
        """Raises InputError for an instruction that a user gave this model by name, which it would not read."""
        if task:
            raise InputError(
                f"task={task!r}: sentence-transformers opens this model, under its own prompts and without an "
                "instruction: leave the task out, or give an empty one for queries"
            )

    def encode_document(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encodes documents, under the model's own prompt."""
        return self.encode(texts)

    def prompt_name(self, task: str | None) -> str | None:
        """Returns the name of the prompt that these texts get; None if the model has none for their side."""
        # by name: sentence-transformers itself stops at its own empty `document` and never sees a `passage`
        names = _DOCUMENT if task is None else _QUERY
        return next((name for name in names if self.model.prompts.get(name)), None)

    @property
    def backend_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer of the package `tokenizers`, which static models have as it is."""
        own = self.model.tokenizer
        return own if isinstance(own, Tokenizer) else getattr(own, "backend_tokenizer", None)

    def fingerprint(self) -> Facts:
        """Returns the facts as in `Embedder.fingerprint`, of sentence-transformers' weights, modules, prompts and
        lengths.
        """
        model, tensors = self.model, self.model.state_dict(keep_vars=True)
        settings = {name: getattr(model, name, None) for name in _SETTINGS}
        modules = [[type(module).__name__, _config(module)] for module in model]
        inner = [module.auto_model for module in model if hasattr(module, "auto_model")]
        backend = self.backend_tokenizer
        return {
            "kind": "sentence-transformers",
            "weights": self._digest.of(tensors),
            "dtype": dtypes(tensors),
            **facts("settings", settings | {"modules": modules}),
            **({} if backend is None else {"tokenizer": tokenizer_fact(backend, with_specials=True)}),
            **{key: value for module in inner for key, value in config_facts(module.config).items()},
        }


def _config(module: Any) -> Any:
    known = getattr(module, "get_config_dict", None)
    return known() if callable(known) else None
