"""The `embedwright` command: one verb, one function. Parses, prints, and maps errors to exit codes; nothing else."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from embedwright.cli.data import TaskOption, data_app, mine, synth, to_write
from embedwright.cli.display import counter, say, training
from embedwright.errors import InputError
from embedwright.files import check_file, check_folder, check_new_folder, write_text

if TYPE_CHECKING:
    from embedwright.model.embedder import Embedder
    from embedwright.training.recipe import Recipe

app = typer.Typer(
    help="Turn decoder-only LLMs into text-embedding models, and use them.\n\n"
    "Start with `embedwright demo`: the whole system on real weights in minutes.\n\n"
    "Then `embedwright train --data my_pairs.jsonl --base smollm2-135m --out runs/mine`, where each line of the file "
    'is {"query": "...", "positive": "..."}.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command()(mine)
app.command()(synth)

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 75


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe file, or a packaged recipe: laptop, offline, nv-embed-v2.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Instead of a recipe: a file of your own pairs.")] = None,
    base: Annotated[str, typer.Option(help="With --data: packaged name, folder, hub id or .gguf.")] = "smollm2-135m",
    out: Annotated[
        Path | None,
        typer.Option(help="Where the run is kept (default: the recipe's run.out).", callback=to_write(check_folder)),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="With --data: keep the base's first so many layers.")] = None,
    instruction: Annotated[str | None, typer.Option(help="With --data: the instruction of your queries.")] = None,
    teacher: Annotated[str, typer.Option(help="With --data: the model that mines hard negatives.")] = "minilm",
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Say what it would do and cost (tokens, memory, time), and run nothing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="With --plan: for so many GPUs.")] = 1,
) -> None:
    """Train all stages of a recipe, or the two-stage defaults on your own pairs. Resumes by itself."""
    from embedwright.demo import quickstart
    from embedwright.training.engine.parallel import together
    from embedwright.training.recipe import Recipe
    from embedwright.training.train import train as run

    if (recipe is None) == (data is None):
        raise InputError("give a recipe file, or --data with your own pairs")
    if data is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("--data mines first, which is for one process: start many of them with a recipe file")
        if out is None:
            raise InputError("--data needs --out, the folder that the run is kept in")
        _refuse_older_model(out)
        plan = quickstart.recipe_for(
            data, base, out, layers=layers, instruction=instruction or quickstart.INSTRUCTION, teacher=teacher
        )
    else:
        assert recipe is not None
        plan = Recipe.load(recipe)
        plan = plan if out is None else plan.with_out(out)
    if plan_only:
        from embedwright.training.plan import report

        say(report(plan, processes=processes))
        return
    _refuse_older_model(Path(plan.run.out))
    model = run(plan, on_step=training(plan), on_evaluation=lambda line: say(f"  {line}"))
    with together() as first:
        if first:
            _keep(plan, model)


def _refuse_older_model(out: Path) -> None:
    """A model without its run's checkpoints is of an older run, and would be named as this one's result.

    With checkpoints, `train` itself refuses another recipe, other data and another base.
    """
    if (out / "model").exists() and not any((out / "checkpoints").glob("[!.]*")):
        raise InputError(
            f"{out / 'model'} is of an older run, whose checkpoints are gone: move it, or choose another --out"
        )


def _keep(plan: Recipe, model: Embedder) -> None:
    """Save what was trained into the run's folder, and show what it is worth."""
    folder = Path(plan.run.out) / "model"
    if folder.exists():
        say(f"{folder} is there already: left as it is")
    else:
        model.save(folder)
        shutil.copyfile(Path(plan.run.out) / "README.md", folder / "README.md")
    _before_and_after(Path(plan.run.out))
    say(
        f'model: {folder}   (in Python: Embedder.load("{folder}"))\n'
        "search with it, in a file of texts (.txt, or JSONL with `text`):\n"
        f"  embedwright index {folder} texts.jsonl {folder.with_name('index')}\n"
        f'  embedwright search {folder} {folder.with_name("index")} "your query"'
    )


def _before_and_after(out: Path) -> None:
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


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, `minilm`, or a sentence-transformers id.")],
    suite: Annotated[str, typer.Argument(help="A suite file, a folder of data sets, or `dev`.")],
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.", callback=to_write(check_file))] = None,
) -> None:
    """Score a model on a suite of local data sets."""
    from embedwright.encoders.open import open_encoder
    from embedwright.evaluation.results import render, table
    from embedwright.evaluation.suite import evaluate as run

    results = run(open_encoder(model), suite, progress=say)
    if out is not None:
        write_text(out, results.to_json() + "\n")
    say(render(table({model: results})))


@app.command()
def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="One adapter folder, ours or peft's; or several models of one base."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model.", callback=to_write(check_new_folder))],
    how: Annotated[
        Literal["average", "slerp"], typer.Option(help="Of several: the average of all, or slerp between two.")
    ] = "average",
    weights: Annotated[str | None, typer.Option(help="Of several: what each counts, as 0.7,0.3.")] = None,
    suite: Annotated[str | None, typer.Option(help="Score what went in and what came out on this suite.")] = None,
) -> None:
    """Make one model: of an adapter and its base, checked against the adapter; or of several models, as a soup."""
    from embedwright.evaluation.suite import load_suite
    from embedwright.model.formats.soup import soup

    if suite is not None:
        load_suite(suite)  # a mistake in it shows before the work is done
    if len(models) > 1:
        soup(models, out, how=how, weights=None if weights is None else _numbers(weights))
        say(f"{out}: {how} of {len(models)} models")
    elif weights is not None:
        raise InputError("--weights are for several models: one adapter is added to its base as it is")
    else:
        _fold_in(models[0], out)
    if suite is not None:
        _side_by_side([*models, str(out)], suite)


def _numbers(written: str) -> list[float]:
    try:
        return [float(number) for number in written.split(",")]
    except ValueError:
        raise InputError(f"--weights {written}: numbers with commas between them, as 0.7,0.3") from None


def _fold_in(adapter: str, out: Path) -> None:
    from embedwright.model.embedder import Embedder
    from embedwright.model.verify.selftest import TEXTS

    texts = [text for text, _ in TEXTS]
    model = Embedder.load(adapter)
    before = model.encode(texts)
    model.merge().save(out)
    del model  # of a large one there is room for one
    difference = abs(Embedder.load(out).encode(texts) - before).max()
    say(f"{out}: largest difference from the adapter's vectors {difference:.1e}")


def _side_by_side(models: list[str], suite: str) -> None:
    from embedwright.encoders.open import open_encoder
    from embedwright.evaluation.results import render, table
    from embedwright.evaluation.suite import evaluate as run

    say(render(table({model: run(open_encoder(model), suite, progress=say) for model in models})))


@app.command()
def encode(
    model: Annotated[str, typer.Argument(help="A model folder.")],
    source: Annotated[Path, typer.Argument(help="JSONL or Parquet with `text`, or plain .txt.")],
    out: Annotated[
        Path, typer.Argument(help="Folder for the vectors (Arrow shards).", callback=to_write(check_folder))
    ],
    task: TaskOption = None,
) -> None:
    """Encode a file of texts into Arrow shards. Resumes by itself."""
    from embedwright.encoders.open import open_encoder
    from embedwright.vectors.corpus import encode_corpus

    say(f"{encode_corpus(open_encoder(model), source, out, task=task, progress=counter('texts'))}")


@app.command()
def index(
    model: Annotated[str, typer.Argument(help="A model folder.")],
    source: Annotated[Path, typer.Argument(help="JSONL or Parquet with `text`, or plain .txt.")],
    out: Annotated[Path, typer.Argument(help="Folder for vectors and index.", callback=to_write(check_folder))],
) -> None:
    """Encode a corpus and build an exact index over it."""
    from embedwright.vectors.index import build_index

    encode(model, source, out)
    say(f"{build_index(out)}")


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="The model that made the index.")],
    folder: Annotated[Path, typer.Argument(help="What `index` wrote.")],
    queries: Annotated[list[str], typer.Argument(help="One or more queries, each in quotes.")],
    k: Annotated[int, typer.Option(help="Hits per query.")] = 5,
    task: TaskOption = None,
) -> None:
    """Search an index."""
    from embedwright.encoders.open import open_encoder
    from embedwright.vectors.index import search as run

    for query, hits in zip(queries, run(folder, open_encoder(model), queries, k=k, task=task), strict=True):
        say(query)
        for hit in hits:
            say(f"  {hit.score:.4f}  {hit.id}  {' '.join(hit.text.split())[:100]}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model folder, opened from or tuned on a released NV-Embed.")],
    out: Annotated[Path, typer.Argument(help="A new folder.", callback=to_write(check_new_folder))],
    layout: Annotated[Literal["nvembed"], typer.Option("--format", help="The released folders' layout.")] = "nvembed",
) -> None:
    """Write a model in the layout of the released NV-Embed folders, weights in the type they were stored in."""
    from embedwright.model.embedder import Embedder
    from embedwright.model.formats.nvembed_export import export_nvembed

    export_nvembed(Embedder.load(model), out)
    say(f"{out}: {layout} layout")


@app.command()
def doctor(model: Annotated[str | None, typer.Argument(help="A model folder to examine.")] = None) -> None:
    """Show versions, device and threads; with a model, prove that it is what it says it is."""
    from embedwright.model.verify.doctor import environment, examine_name

    for name, value in environment().items():
        say(f"{name:<22} {value}")
    if model is not None:
        findings = examine_name(model)
        for finding in findings:
            say(f"{'ok ' if finding.ok else 'BAD'} {finding.name:<40} {finding.detail}")
        if not all(finding.ok for finding in findings):
            _stop(f"{model}: not healthy", FAILED)


@app.command()
def demo(
    recipe: Annotated[Path, typer.Option(help="What to train.")] = Path("laptop"),
) -> None:
    """Build data, mine, train in two stages, evaluate, save and search: everything, in minutes on two cores."""
    from embedwright.demo import demo as whole
    from embedwright.training.recipe import Recipe

    whole.run(Recipe.load(recipe))


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad input, 75 interrupted and resumable."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    _quiet_libraries()
    try:
        if code := app(standalone_mode=False):  # typer has swallowed an exit, or (130) an interrupt
            raise KeyboardInterrupt if code == 130 else typer.Exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # Abort: what older typers make of an interrupt
        _stop("interrupted: run the same command again to go on", INTERRUPTED)
    except InputError as error:
        if os.environ.get("EMBEDWRIGHT_DEBUG"):
            raise
        _stop(error, BAD_INPUT)
    except Exception as error:
        if refused := getattr(error, "format_message", None):  # an option or argument that the parser refuses
            _stop(refused(), BAD_INPUT)
        traceback.print_exc()
        sys.exit(FAILED)


def _stop(message: object, code: int) -> None:
    if str(message):  # a bare `embedwright` has shown its help, and has nothing to add
        sys.stderr.write(f"embedwright: {message}\n")
    sys.exit(code)


def _quiet_libraries() -> None:
    """Set before they are imported, which `--help` does not."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar that transformers draws while it reads a GGUF file
