"""Fingerprints the files that decide what a cell scores, so that a changed file makes another cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedwright.evaluation.suite import Suite
from embedwright.files import sha256_of
from embedwright.training.batches.blend import Source
from embedwright.training.batches.sources import data_fingerprint
from embedwright.training.recipe import Recipe
from embedwright.training.run.checks import open_suite
from embedwright.training.run.start import contents_of
from embedwright.training.stages import PREVIOUS, Stage


def stage_fingerprints(recipe: Recipe, sources: Sequence[list[Source]]) -> list[str]:
    """Fingerprints what each stage reads: its rows, its teachers, and suites whose scores decide the weights."""
    suites = []
    for name in recipe.eval.suites if recipe.eval.decides else ():
        suite = open_suite(name)
        if isinstance(suite, Suite):
            suites.append(suite_content(suite))
        else:
            suites.append([task.metadata.name for task in suite.tasks])
    return [
        _hash([data_fingerprint([own]), _teachers(stage), suites])
        for stage, own in zip(recipe.stages, sources, strict=True)
    ]


def suite_content(suite: Suite) -> list[Any]:
    """Returns what each task says, with the fingerprints of its files in place of their paths."""
    tasks = []
    for task in suite.tasks:
        said = {key: value for key, value in task if not isinstance(value, Path)}
        tasks.append(said | {key: _files(value) for key, value in task if isinstance(value, Path)})
    return tasks


def _teachers(stage: Stage) -> list[str]:
    """Fingerprints the teachers that are folders. A hub id is known by its name alone: the recipe has it."""
    names = [*([] if stage.mine is None else [stage.mine.teacher]), *stage.loss.teachers]
    return [found for name in names if name != PREVIOUS for found in contents_of([name]).values()]


def _files(path: Path) -> str:
    inside = (file for file in path.rglob("[!.]*") if file.is_file()) if path.is_dir() else [path]
    return _hash([[str(file.relative_to(path)), sha256_of(file)] for file in sorted(inside)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
