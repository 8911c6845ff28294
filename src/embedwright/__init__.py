"""Embedwright: decoder-only LLMs as generalist text-embedding models.

from embedwright import Embedder, Recipe, train, mine, evaluate
"""

from embedwright import threads

threads.bind_for_command()
threads.load_runtimes()

from embedwright.data.example import Example, Task  # noqa: E402
from embedwright.data.mine import mine  # noqa: E402
from embedwright.evaluation.suite import evaluate  # noqa: E402
from embedwright.model.embedder import Embedder  # noqa: E402
from embedwright.training.loop import train  # noqa: E402
from embedwright.training.recipe import Recipe  # noqa: E402

__version__ = "0.1.0"
__all__ = ["Embedder", "Example", "Recipe", "Task", "evaluate", "mine", "train"]
