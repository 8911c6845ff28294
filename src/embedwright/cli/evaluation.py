"""The command `eval`, and the tables of scores that other commands show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from embedwright.cli import options
from embedwright.cli.display import say
from embedwright.cli.options import arg, opt
from embedwright.files import write_text

if TYPE_CHECKING:
    from embedwright.evaluation.results import Results


def evaluate(
    model: options.Model,
    suite: Annotated[str, arg("Suite: a YAML file, a folder of data sets, or `dev`.")],
    out: Annotated[Path | None, opt("File for the results (JSON).", callback=options.file_to_write)] = None,
) -> None:
    """Score a model on a suite of local data sets."""
    results = score([model], suite)[model]
    if out is not None:
        write_text(out, results.to_json() + "\n")


def score(models: Sequence[str], suite: str) -> dict[str, Results]:
    """Scores models on a suite, and prints the scores side by side."""
    from embedwright.encoders.open import open_encoder
    from embedwright.evaluation.results import render, table
    from embedwright.evaluation.suite import evaluate as run

    columns = {model: run(open_encoder(model), suite, progress=say) for model in models}
    say(render(table(columns)))
    return columns


def show_run(out: Path) -> None:
    """Prints all scores of a run side by side, if it has any."""
    from embedwright.evaluation.results import Results, render, table
    from embedwright.training.run.scores import read_evaluations

    columns: dict[str, Results] = {}
    for record in read_evaluations(out):  # one a suite
        name, found = f"{record['stage']} {record['step']}", Results.from_json(json.dumps(record["results"]))
        before = columns.get(name)
        columns[name] = replace(found, rows=before.rows + found.rows) if before else found
    if columns:
        say("\nscores on what was held out, before training and after so many steps of each stage (higher is better):")
        say(render(table(columns)))
