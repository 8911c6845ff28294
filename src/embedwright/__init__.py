"""Embedwright: decoder-only LLMs as generalist text-embedding models.

from embedwright import Embedder, Index, Recipe, train, mine, evaluate

Each name is loaded when it is first used, so that the import itself takes no time. The import also makes our model type
known to transformers, once that is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from embedwright import threads
from embedwright.registration import register_with_transformers

if TYPE_CHECKING:
    from embedwright.data.schema import Example, Task
    from embedwright.evaluation.suite import evaluate
    from embedwright.index.index import Index
    from embedwright.mining.mine import mine
    from embedwright.model.embedder import Embedder
    from embedwright.training.recipe import Recipe
    from embedwright.training.train import train

__version__ = "0.1.0"
__all__ = ["Embedder", "Example", "Index", "Recipe", "Task", "evaluate", "mine", "train"]

_HOMES = {
    "Embedder": "model.embedder",
    "Example": "data.schema",
    "Index": "index.index",
    "Recipe": "training.recipe",
    "Task": "data.schema",
    "evaluate": "evaluation.suite",
    "mine": "mining.mine",
    "train": "training.train",
}

threads.prepare_command()
register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
