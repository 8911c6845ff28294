"""The commands that make training data: `mine` and all of `data`. As in `cli`: parse, call, print, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embedwright.display import counter, say

Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="Instruction for these texts, if they are queries.")]

data_app = typer.Typer(help="Build, check and convert training data.", no_args_is_help=True)


def mine(
    examples: Annotated[Path, typer.Argument(help="Training examples or pairs.")],
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help='Rows {"_id", "text"}; default: the positives of all.')] = None,
    teacher: Annotated[str, typer.Option(help="`minilm`, a folder or a hub id.")] = "minilm",
    rule: Annotated[str, typer.Option(help="naive, shift, abs, margin or perc.")] = "perc",
    margin: Annotated[float | None, typer.Option(help="Default: 0.95 for perc, the paper's best for others.")] = None,
    negatives: Annotated[int, typer.Option(help="Per query.")] = 7,
    depth: Annotated[int, typer.Option(help="Candidates looked at per query.")] = 100,
    task: TaskOption = None,
) -> None:
    """Find hard negatives with a teacher model, leaving out what is likely a positive."""
    from embedwright.data.mine import mine as run
    from embedwright.data.mine import positives_of
    from embedwright.data.readers import read_corpus
    from embedwright.data.table import open_examples, write_examples
    from embedwright.model.opening import open_encoder

    rows = list(open_examples(examples))
    out.parent.mkdir(parents=True, exist_ok=True)
    pool = read_corpus(corpus) if corpus else positives_of(rows)
    found, report = run(
        rows,
        pool,
        open_encoder(teacher),
        rule=rule,  # type: ignore[arg-type]  # `mine` refuses other words, naming the known ones
        margin=margin,
        negatives=negatives,
        depth=depth,
        task=task,
        progress=counter("texts"),
    )
    write_examples(out, found)
    say(json.dumps(report.to_json(), indent=2))


@data_app.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="`docstrings`: of the installed libraries.")], out: Out
) -> None:
    """Build a data set with its held-out part."""
    from embedwright.data import docstrings

    if name != "docstrings":
        raise ValueError(f"no data set {name!r}; known: docstrings")
    docstrings.build(out)
    say((out / "report.json").read_text())


@data_app.command("check")
def data_check(path: Annotated[Path, typer.Argument(help="A data file or BEIR folder.")]) -> None:
    """Read a whole data set; report what is in it and what was wrong. Exits 2 if a line was bad."""
    from embedwright.data.table import open_examples

    table = open_examples(path)
    say(json.dumps({**table.report, "tasks": {k: len(v) for k, v in table.rows_by_task().items()}}, indent=2))
    if table.quarantined:
        table.arrow.unlink()  # converted anew next time, so that the lines are named again
        raise ValueError(f"{path}: {table.quarantined} bad lines, kept unchanged in {table.quarantine}")


@data_app.command("labels")
def data_labels(
    path: Annotated[Path, typer.Argument(help='Rows {"text", "label"}.')],
    out: Out,
    task: Annotated[str | None, typer.Option(help="Name of the task; default: the file's.")] = None,
    negatives: Annotated[int, typer.Option(help="Per example.")] = 7,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Turn labelled texts into examples: positives of the same class, negatives of others."""
    from embedwright.data.readers import detect_kind
    from embedwright.data.table import open_examples, write_examples

    if detect_kind(path) != "labelled":
        raise ValueError(f'{path}: rows are not {{"text", "label"}}')
    table = open_examples(path, task=task, negatives=negatives, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_examples(out, table)
    say(json.dumps(table.report, indent=2))
