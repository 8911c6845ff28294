"""The commands `eval`, `bench` and `compare`, and the tables of scores that other commands show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedwright.cli import options
from embedwright.cli.display import counter, note, say
from embedwright.cli.options import arg, opt
from embedwright.errors import InputError
from embedwright.files import file_name, write_text

if TYPE_CHECKING:
    from embedwright.evaluation.results import Results
    from embedwright.evaluation.suite import Suite


@options.opens_models
def evaluate(
    how: options.How,
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
    """Score models on a suite of local data sets, side by side. Under torchrun, all processes encode."""
    from embedwright.evaluation.suite import load_suite

    opened = load_suite(suite)
    options.check_opened(models, how)
    score(models, opened, {} if out is None else _result_files(models, opened.name, out), how)


@options.opens_models
def bench(
    how: options.How,
    model: Annotated[str, arg("Model: a folder, a hub id, `minilm`, or http://HOST/v1#MODEL.")],
    names: Annotated[
        list[str],
        arg(
            "MTEB benchmarks or tasks (`MTEB(eng, v2)`, NanoBEIR, SciFact, ...), or AIR-Bench, all of it or some "
            "(AIR-Bench/qa/en).",
            metavar="NAME...",
        ),
    ],
    out: Annotated[Path, opt("Folder of all results, in mteb's layout.", "--out", callback=options.folder_to_write)],
    api_key_env: options.KeyVariable = None,
) -> None:
    """Score a model on MTEB or AIR-Bench.

    Run it again to go on after a stop. Under torchrun, all processes encode, each a part of the texts.
    """
    options.check_asked([model], {"api_key_env": api_key_env})
    air = [name for name in names if name.lower().startswith("air-bench")]
    if air and len(air) < len(names):
        raise InputError(f"{air[0]} and {next(name for name in names if name not in air)}: run AIR-Bench by itself")
    opened = partial(_model_or_server, model, how, api_key_env)
    (run_airbench if air else run_mteb)(model, names, out, how, opened)


def run_mteb(model: str, names: Sequence[str], out: Path, how: options.How, opened: Callable[[], list[Any]]) -> None:
    """Runs MTEB benchmarks or tasks, prints their tables, and exits with 1 if a task failed."""
    from embedwright.encoders.sharded import shared
    from embedwright.evaluation.bench.names import choose, name_of
    from embedwright.evaluation.bench.run import Bench
    from embedwright.evaluation.bench.table import lines, released_as
    from embedwright.evaluation.mteb import MtebEncoder
    from embedwright.processes import joined

    chosen = [choose(name) for name in names]  # before anything is loaded

    def work(encoders: list[Any]) -> dict[str, str]:
        wrapped = MtebEncoder(encoders[0], max_tokens=_limit(encoders[0], how), name=name_of(model))
        wrapped.watch = lambda: counter("documents")
        bench = Bench(wrapped, out)
        note(f"{bench.meta.name}, revision {bench.meta.revision}: results in {bench.folder}")
        for revision, tasks in bench.others().items():
            note(f"left as it is, another model, instructions or mteb: revision {revision}, {len(tasks)} results")
        failed = bench.run([task for each in chosen for task in each.tasks], note)
        for each in chosen:
            say("\n" + "\n".join(lines(each, bench, released_as(model))))
        return failed

    with joined() as processes:
        failed = shared(opened, processes, work)
    if failed:
        note(f"\nfailed: {len(failed)}. The others are kept. Run the same command again for these alone:")
        for name, reason in failed.items():
            note(f"  {name}: {reason}")
        raise typer.Exit(1)


def _model_or_server(model: str, how: options.How, api_key_env: str | None = None) -> list[Any]:
    """Opens the model that `bench` scores. `max_tokens` is left to the benchmarks (`_limit`), whose results name it."""
    from embedwright.encoders.http import HttpEncoder
    from embedwright.encoders.open import open_encoder, shorten
    from embedwright.model.embedder import Embedder

    given = {name: value for name, value in how.items() if name != "max_tokens"}
    options.check_opened([model], given)
    if "://" in model:
        return [HttpEncoder.from_url(model, api_key_env=api_key_env)]
    opened = open_encoder(model, **given)
    if "max_tokens" in how and not isinstance(opened, Embedder):
        shorten(opened, model, how["max_tokens"])
    return [opened]


def _limit(encoder: Any, how: options.How) -> int | None:
    """Returns the `max_tokens` that a benchmark gives the model. One of sentence-transformers was opened with it."""
    from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
    from embedwright.encoders.sharded import itself

    return None if isinstance(itself(encoder), SentenceTransformerEncoder) else how.get("max_tokens")


def run_airbench(
    model: str, names: Sequence[str], out: Path, how: options.How, opened: Callable[[], list[Any]]
) -> None:
    """Runs sets of AIR-Bench, prints scores and where a submission lies, and exits with 1 if a set failed."""
    from embedwright.encoders.sharded import shared
    from embedwright.evaluation.bench import airbench
    from embedwright.evaluation.bench.airbench_sets import choose, sets_file
    from embedwright.evaluation.results import render
    from embedwright.processes import joined

    sets = choose(*names)  # before anything is loaded
    home = out / "air-bench" / file_name(model.rpartition("#")[2] if "://" in model else model)

    def work(encoders: list[Any]) -> dict[str, str]:
        advance = counter("documents")
        given: dict[str, Any] = {"max_tokens": _limit(encoders[0], how), "progress": note, "advance": advance}
        failed = airbench.bench(encoders[0], model, sets, home, **given)
        if rows := airbench.table(home, sets):
            say("\n" + render(rows))
            say("published scores are those of version 24.04: other questions, and some other corpora")
        if packed := airbench.pack(home):
            say(f"\nsearch results of the test splits: {packed}")
            say(f"to submit them, upload that file at {airbench.LEADERBOARD} for version {sets_file()['version']}")
        return failed

    with joined() as processes:
        failed = shared(opened, processes, work)
    if failed:
        note(f"\n{len(failed)} of {len(sets)} sets failed. Run the same command again for these alone:")
        for name, reason in failed.items():
            note(f"  {name}: {reason}")
        raise typer.Exit(1)


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


def _refuse_to_replace(file: Path, model: str, encoder: Any) -> None:
    """Raises InputError if a folder of results has those of another model under the file name of this one."""
    from embedwright.encoders.protocol import as_encoder
    from embedwright.evaluation.results import read_without_items
    from embedwright.fingerprint import fingerprint_of

    if file.parent.name != file_name(model) or not file.is_file():  # a file that the user named is written anew
        return
    about = read_without_items(file).about
    if "fingerprint" in about and about["fingerprint"] != fingerprint_of(as_encoder(encoder)):
        raise InputError(
            f"{file} has the results of another model, {about['model']}, or of this one with other weights: "
            "name another --out, or remove that file first"
        )


@options.opens_models
def compare(
    how: options.How,
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
        float | None, opt("Test also whether differences are within this many points: two one-sided tests.")
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
    from embedwright.evaluation.compare.compare import compare as run
    from embedwright.evaluation.compare.read import read_candidates
    from embedwright.evaluation.compare.table import picture as draw
    from embedwright.evaluation.compare.table import text

    if picture is not None and picture.suffix != ".svg":
        raise InputError(f"--picture {picture}: name a file that ends in .svg")
    comparison = run(read_candidates(results, suite, note, how), equivalent=equivalent)
    say(text(comparison))
    if picture is not None:
        write_text(picture, draw(comparison))
    if out is not None:
        write_text(out, replace(comparison, about=about(comparison.baseline)).to_json() + "\n")


def score(
    models: Sequence[str],
    suite: Suite | str,
    files: Mapping[str, Path] | None = None,
    how: options.How | None = None,
) -> None:
    """Scores models on a suite, writes each one's results to its file, and prints the scores side by side."""
    from embedwright.encoders.open import open_encoder
    from embedwright.encoders.sharded import shared
    from embedwright.evaluation.results import render, table, write_results
    from embedwright.evaluation.suite import BM25
    from embedwright.evaluation.suite import evaluate as run
    from embedwright.processes import joined

    columns: dict[str, Results] = {}

    def opened(model: str) -> list[Any]:
        return [model if model == BM25 else open_encoder(model, **(how or {}))]

    def work(model: str, encoders: list[Any]) -> None:
        if len(models) > 1:
            note(model)
        if files and model != BM25:
            _refuse_to_replace(files[model], model, encoders[0])
        columns[model] = run(encoders[0], suite, name=model, progress=note)
        if files:  # now, so that the scores of this one outlive a failure of the next
            write_results(files[model], columns[model])

    with joined() as processes:
        for model in dict.fromkeys(models):
            shared(partial(opened, model), processes, partial(work, model))
        if processes.is_rank_0:
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
        say("\nscores on what was held out, before training and during each stage (higher is better):")
        say(render(table(columns)))
