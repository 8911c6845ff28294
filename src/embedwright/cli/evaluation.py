"""The commands `eval` and `compare`, and the tables of scores that other commands show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from embedwright.cli import options
from embedwright.cli.display import say
from embedwright.cli.options import arg, opt
from embedwright.errors import InputError
from embedwright.files import file_name, write_text

if TYPE_CHECKING:
    from embedwright.evaluation.results import Results
    from embedwright.evaluation.suite import Suite


def evaluate(
    models: Annotated[list[str], arg("Models: folders, hub ids, `minilm`, or `bm25`.", metavar="MODEL...")],
    suite: Annotated[str, arg("Suite: a YAML file, a folder of data sets, `dev` or `dev-mini`.")],
    out: Annotated[
        Path | None,
        opt(
            "Where results and their items go: a .json file for one model, or a folder, which gets "
            "<model>/<suite>.json.",
            callback=options.results_to_write,
        ),
    ] = None,
) -> None:
    """Score models on a suite of local data sets, side by side."""
    from embedwright.evaluation.suite import load_suite

    opened = load_suite(suite)
    score(models, opened, {} if out is None else _result_files(models, opened.name, out))


def _result_files(models: Sequence[str], suite: str, out: Path) -> dict[str, Path]:
    """Returns the result file of each model."""
    if out.suffix == ".json":
        if len(set(models)) > 1:
            raise InputError(f"--out {out} is one file, and these are {len(models)} models: name a folder")
        return {models[0]: out}
    files = {model: out / file_name(model) / f"{file_name(suite)}.json" for model in models}
    if len(set(files.values())) < len(files):
        raise InputError(f"two of {', '.join(files)} have one name in {out}: score one of them into another folder")
    return files


def compare(
    results: Annotated[
        list[str],
        arg(
            "What is compared, the baseline first: result files or folders of `eval` or `bench`, runs (those of one "
            "recipe with several seeds are one), studies, or models, which need --suite.",
            metavar="BASELINE OTHER...",
        ),
    ],
    suite: Annotated[str | None, opt("Suite to score models on, as in `eval`.")] = None,
    equivalent: Annotated[
        float | None, opt("Test also whether differences are within so many points: two one-sided tests.")
    ] = None,
    picture: Annotated[
        Path | None, opt("File for a picture of the differences (.svg).", callback=options.file_to_write)
    ] = None,
    out: Annotated[Path | None, opt("File for the comparison (.json).", callback=options.file_to_write)] = None,
) -> None:
    """Compare results with a baseline, task by task and in the mean, with 95 % intervals.

    A difference is claimed only if it is significant after correction for all comparisons shown.
    """
    from embedwright.evaluation.about import about
    from embedwright.evaluation.compare import compare as run
    from embedwright.evaluation.compare_table import picture as draw
    from embedwright.evaluation.compare_table import text
    from embedwright.evaluation.read import read_candidates

    if picture is not None and picture.suffix != ".svg":
        raise InputError(f"--picture {picture}: name a file that ends in .svg")
    comparison = run(read_candidates(results, suite, say), equivalent=equivalent)
    say(text(comparison))
    if picture is not None:
        write_text(picture, draw(comparison))
    if out is not None:
        write_text(out, replace(comparison, about=about(comparison.baseline)).to_json() + "\n")


def score(models: Sequence[str], suite: Suite | str, files: Mapping[str, Path] | None = None) -> None:
    """Scores models on a suite, writes each one's results to its file, and prints the scores side by side."""
    from embedwright.encoders.open import open_encoder
    from embedwright.evaluation.results import render, table, write_results
    from embedwright.evaluation.suite import BM25
    from embedwright.evaluation.suite import evaluate as run

    columns: dict[str, Results] = {}
    for model in dict.fromkeys(models):
        if len(models) > 1:
            say(model)
        columns[model] = run(model if model == BM25 else open_encoder(model), suite, name=model, progress=say)
        if files:  # now, so that the scores of this one outlive a failure of the next
            write_results(files[model], columns[model])
    say(render(table(columns)))


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
