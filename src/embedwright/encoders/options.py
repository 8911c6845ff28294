"""A model whose `encode` is always called with the same further options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from embedwright.fingerprint import Facts, fingerprint_of


class WithOptions:
    """Calls a model's `encode` with further options, such as `max_tokens`. They count as a part of the model."""

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        self.model, self.options = model, options

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[Any]:
        vectors: NDArray[Any] = self.model.encode(texts, task=task, **self.options)
        return vectors

    def fingerprint(self) -> Facts | None:
        known = fingerprint_of(self.model)
        return known and known | {f"option.{key}": json.dumps(value) for key, value in self.options.items()}
