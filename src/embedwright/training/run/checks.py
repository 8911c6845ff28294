"""Finds, before the first step, what would stop a run at a later one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from embedwright.config import ConfigError
from embedwright.errors import InputError, NotFoundError, error_prefix
from embedwright.evaluation.suite import Suite, is_suite, load_suite
from embedwright.locate import local, packaged
from embedwright.model.adapters import fourbit
from embedwright.model.embedder import Embedder
from embedwright.model.formats.families import split_family
from embedwright.training.batches.blend import Source
from embedwright.training.batches.sources import open_sources
from embedwright.training.losses.total import check_widths
from embedwright.training.recipe import Recipe, expand

if TYPE_CHECKING:
    from embedwright.evaluation.bench.names import Chosen


def is_suite_file(name: str) -> bool:
    """Returns whether a suite of a recipe can only be one of files: else the name may be mteb's. It opens nothing."""
    return "/" in name or "$" in name or Path(name).suffix in (".yaml", ".yml") or is_suite(name)


def open_suite(name: str) -> Suite | Chosen:
    """Opens a suite of a recipe: a packaged name, a path with variables, or else a benchmark or task of mteb.

    Raises NotFoundError with the nearest names, InputError for a suite with mistakes. No data of mteb are looked for.
    """
    if is_suite_file(name):
        return load_suite(name if is_suite(name) else expand(name))
    try:
        return load_suite(name)
    except NotFoundError as lacking:
        if find_spec("mteb") is None:
            raise
        from embedwright.evaluation.bench.names import choose

        try:
            return choose(name)
        except InputError as unknown:
            raise NotFoundError(f"{lacking}; {unknown}") from None


def open_checked(recipe: Recipe) -> list[list[Source]]:
    """Opens the sources of each stage. Raises InputError if something that the run needs is missing or wrong."""
    if recipe.tune.method == "qlora" and (lacks := fourbit.missing()):
        raise ConfigError(f"recipe {recipe.name}: tune.method is qlora, and {lacks}")
    sources = open_sources(recipe)
    check_names(recipe)
    return sources


def check_names(recipe: Recipe) -> None:
    """Raises InputError, with the key, for a suite or teacher that is missing. Hub ids are not looked up."""
    for number, suite in enumerate(recipe.eval.suites):
        with error_prefix(f"recipe {recipe.name}: eval.suites.{number}"):
            open_suite(suite)
    for key, name in teachers(recipe):
        with error_prefix(f"recipe {recipe.name}: {key}"):
            _check_encoder(name)


def teachers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields the name of each model that is not trained and whose vectors decide what is trained, with its key."""
    for stage in recipe.stages:
        yield from ((f"stages.{stage.name}.mine.teacher", name) for name in (stage.mine.teachers if stage.mine else ()))
        yield from ((f"stages.{stage.name}.loss.distill.teacher", name) for name in stage.loss.teachers)


def check_fits_model(recipe: Recipe, stages: Sequence[Sequence[Source]], model: Embedder) -> None:
    """Raises InputError if a loss's width exceeds the model's, or an instruction leaves no room for text."""
    for stage, sources in zip(recipe.stages, stages, strict=True):
        check_widths(stage, model.embedding_dim)
        for source in sources:
            for task in (source.task, *source.tasks.values()):
                with error_prefix(f"recipe {recipe.name}: stages.{stage.name}: task {task.name!r}"):
                    model.tokenize(["a"], task=task.instruction or model.contract.default_task or None)


def _check_encoder(name: str) -> None:
    where = split_family(name)[1]
    path = packaged(where) or local(where)
    if path is not None and not path.is_dir():
        raise InputError(f"{name} is a file of weights, not an embedder")
