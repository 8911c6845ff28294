"""Recipes as trees, for the tests of their keys."""

from __future__ import annotations

from typing import Any

import pytest

from embedwright.config import ConfigError
from embedwright.training.recipe import Recipe


def put(tree: Any, path: str, value: Any) -> Any:
    """`tree` with the value at a dotted path replaced or added."""
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    inner = tree
    for part in above:
        inner = inner[part]
    inner[last] = value
    return tree


def errors_of(tree: Any) -> list[str]:
    """The lines of the error with which a tree is refused."""
    with pytest.raises(ConfigError) as error:
        Recipe.parse(tree)
    return str(error.value).splitlines()
