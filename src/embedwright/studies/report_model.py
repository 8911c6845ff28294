"""The parts of a report that need the model of a run. A part that cannot be made says why, in the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder
from embedwright.errors import InputError
from embedwright.evaluation.suite import Suite
from embedwright.evaluation.tasks import SuiteTask
from embedwright.studies.report_hits import example_hits
from embedwright.studies.report_map import text_map
from embedwright.studies.report_pairs import mining_charts, pair_charts
from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import open_suite

Say = Callable[[str], None]


def model_parts(folder: Path, say: Say) -> dict[str, Any]:
    """Returns `pairs` and `mined`, charts of scores; `hits`, example queries; `map`; and `left_out`: part -> why.

    A part that is left out is empty. Every part is a sample: `say` gets a line before each.
    """
    recipe = Recipe.load(folder / "recipe.yaml")
    parts: dict[str, Any] = {"pairs": [], "mined": mining_charts(folder), "hits": None, "map": None}
    left_out: dict[str, str] = {}
    if not (folder / "model").is_dir():
        reason = f"{folder / 'model'} is not there: the run has not ended, or its model was moved"
        return parts | {"left_out": dict.fromkeys(("pairs", "hits", "map"), reason)}
    encoder = open_encoder(str(folder / "model"))

    def part(name: str, make: Callable[[], Any], doing: str) -> None:
        say(doing)
        try:
            parts[name] = make()
        except InputError as error:  # such as data that was moved
            left_out[name] = str(error)

    part("pairs", lambda: pair_charts(encoder, recipe, folder), "scores of a sample of the training pairs")
    if not parts["pairs"]:
        left_out.setdefault("pairs", "no training row has hard negatives")
    tasks = _tasks(recipe, left_out)
    searched = next((task for task in tasks if task.kind == "retrieval"), None)
    labelled = next((task for task in tasks if task.kind in ("clustering", "classification")), None)
    if searched is None:
        left_out.setdefault("hits", "no suite of the recipe has a retrieval task")
    else:
        part("hits", lambda: example_hits(encoder, searched), f"example queries of {searched.name}")
    if labelled is None:
        left_out.setdefault("map", "no suite of the recipe has a labelled file")
    else:
        part("map", lambda: _map(encoder, labelled), f"map of {labelled.name}")
    return parts | {"left_out": left_out}


def _map(encoder: Encoder, task: SuiteTask) -> dict[str, Any]:
    return {"task": task.name} | text_map(encoder, task.path, task.instruction)


def _tasks(recipe: Recipe, left_out: dict[str, str]) -> list[SuiteTask]:
    """Returns the tasks of the recipe's suites. Notes why a suite cannot be opened."""
    tasks: list[SuiteTask] = []
    for suite in recipe.eval.suites:
        try:
            opened = open_suite(suite)
            tasks += opened.tasks if isinstance(opened, Suite) else ()  # mteb's have no files here
        except InputError as error:
            left_out.update(dict.fromkeys(("hits", "map"), str(error)))
    return tasks
