"""The parts of a report that need the model of a run. A part that cannot be made says why, in the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embedwright.data.files.folders import stem_of
from embedwright.data.files.kinds import detect_kind
from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder
from embedwright.errors import InputError
from embedwright.evaluation.suite import Suite
from embedwright.evaluation.tasks import SuiteTask
from embedwright.model.verify.probe import ProbeError
from embedwright.studies.report.hits import example_hits
from embedwright.studies.report.map import text_map
from embedwright.studies.report.pairs import mining_charts, pair_charts
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import open_suite
from embedwright.training.run.save import saved_model

Say = Callable[[str], None]


def model_parts(folder: Path, say: Say) -> dict[str, Any]:
    """Returns `pairs` and `mined`, charts of scores; `hits`, example queries; `map`; and `left_out`: part -> why.

    A part that is left out is empty. Every part is a sample: `say` gets a line before each.
    """
    recipe = Recipe.load(folder / "recipe.yaml")
    parts: dict[str, Any] = {"pairs": [], "mined": mining_charts(folder), "hits": None, "map": None}
    left_out: dict[str, str] = {}
    saved = saved_model(folder)
    if not saved.is_dir():
        reason = f"{saved} is not there: the run has not ended, or its model was moved"
        return parts | {"left_out": dict.fromkeys(("pairs", "hits", "map"), reason)}
    try:
        encoder = open_encoder(str(saved))
    except (InputError, ProbeError) as error:  # such as a folder that was copied in part
        return parts | {"left_out": dict.fromkeys(("pairs", "hits", "map"), str(error))}

    def part(name: str, make: Callable[[], Any], doing: str) -> None:
        say(doing)
        try:
            parts[name] = make()
        except InputError as error:  # such as data that was moved
            left_out[name] = str(error)

    part("pairs", lambda: pair_charts(encoder, recipe, folder), "scores of a sample of the training pairs")
    if not parts["pairs"]:
        left_out.setdefault("pairs", "no training row has hard negatives")
    part("hits", lambda: _hits(encoder, recipe), "example queries")
    part("map", lambda: _map(encoder, recipe), "map of embeddings")
    return parts | {"left_out": left_out}


def _hits(encoder: Encoder, recipe: Recipe) -> dict[str, Any]:
    for task in _tasks(recipe):
        if task.kind == "retrieval":
            return example_hits(encoder, task)
    raise InputError("no suite in local files has a retrieval task")


def _map(encoder: Encoder, recipe: Recipe) -> dict[str, Any]:
    """Draws the first labelled file of a suite, else of the training data."""
    for task in _tasks(recipe):
        if task.kind in ("clustering", "classification"):
            return {"task": task.name} | text_map(encoder, task.path, task.instruction)
    for source in (source for sources in open_sources(recipe) for source in sources):
        path = source.table.path
        if path.is_file() and detect_kind(path) == "labelled":
            return {"task": stem_of(path)} | text_map(encoder, path, source.task.instruction)
    raise InputError("neither a suite in local files nor the training data has a labelled file")


def _tasks(recipe: Recipe) -> Iterator[SuiteTask]:
    """Yields the tasks of the recipe's suites, but for those of mteb, whose data is not in local files."""
    for suite in map(open_suite, recipe.eval.suites):
        if isinstance(suite, Suite):
            yield from suite.tasks
