"""The commands for many runs and results: `ablate` and `report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from embedwright.cli import options
from embedwright.cli.display import note, say
from embedwright.cli.options import arg, opt
from embedwright.files import write_text


def ablate(
    file: Annotated[Path, arg("Ablation: a YAML file of a base recipe and arms.")],
    out: Annotated[Path, opt("Folder of all studies.", callback=options.folder_to_write)] = Path("runs/ablations"),
    jobs: Annotated[int, opt("Number of cells that run side by side.", min=1)] = 1,
    smoke: Annotated[bool, opt("Run one tiny cell instead, to see that the file runs.", "--smoke")] = False,
    only: Annotated[list[str] | None, opt("Cell to run, as ARM/SEED. Repeatable. Default: all.")] = None,
    anyway: Annotated[bool, opt("Run a file here that is marked for another machine.", "--anyway")] = False,
    look: Annotated[bool, opt("Run nothing: compare the cells that are done, and write study.json.", "--look")] = False,
) -> None:
    """Train and score each arm of an ablation with each seed, and compare. Run it again to go on after a stop.

    A budget scales the steps and the warm-up of an arm's stages, and nothing else.
    """
    from embedwright.studies.ablate.study import ablate as run
    from embedwright.studies.ablate.table import render

    study = run(file, out, side_by_side=jobs, smoke=smoke, only=only or (), anyway=anyway, look=look, say=note)
    say(render(study))
    if study["failed"]:
        typer.echo(f"embedwright: failed: {', '.join(study['failed'])}", err=True)
        raise typer.Exit(1)


def report(
    sources: Annotated[
        list[Path],
        arg("A run's folder, result files, folders of results, or several of these.", metavar="RUN|RESULTS..."),
    ],
    out: Annotated[Path, opt("HTML file to write.", callback=options.file_to_write)],
) -> None:
    """Draw a run or results as one HTML file: training, scores, example queries, and a map of texts."""
    from embedwright.studies.report.page import report as draw

    page = draw(sources, shlex.join(["embedwright", *sys.argv[1:]]), say=lambda line: note(f"  {line}"))
    write_text(out, page)
    say(f"{out}: {len(page.encode()) / 1e3:,.0f} kB; open it in a browser")
