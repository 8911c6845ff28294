"""The commands that look at many runs and results: `report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from embedwright.cli import options
from embedwright.cli.display import say
from embedwright.cli.options import arg, opt
from embedwright.files import write_text


def report(
    sources: Annotated[
        list[Path],
        arg("A run's folder, result files, folders of results, or several of these.", metavar="RUN|RESULTS..."),
    ],
    out: Annotated[Path, opt("HTML file to write.", callback=options.file_to_write)],
) -> None:
    """Draw a run or results as one HTML file: training, scores, example queries, and a map of texts."""
    from embedwright.studies.report import report as draw

    page = draw(sources, shlex.join(["embedwright", *sys.argv[1:]]), say=lambda line: say(f"  {line}"))
    write_text(out, page)
    say(f"{out}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser")
