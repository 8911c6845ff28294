"""Draws a run, or results, as one HTML file that needs nothing else: no network, no fonts, no other file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from embedwright.errors import MissingPackageError
from embedwright.studies.report.model import Say, model_parts
from embedwright.studies.report.run import is_run, read_run
from embedwright.studies.report.scores import Scored, read_scores, score_tables

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"


def report(paths: Sequence[Path], command: str, say: Say = logger.info) -> str:
    """Returns the report of a run and of results as the text of one HTML page.

    Args:
        paths: Run folders, and whatever `embedwright compare` reads. The first run is described in full, with parts for
            which its model encodes samples of its data. The scores of all others are shown beside it.
        command: The command that asked for the report, which the page shows.
        say: A function that gets a line before each part that takes time.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A path is neither a run nor a result.
        ImportError: The `[eval]` extra is not installed.
    """
    if missing := [name for name in ("jinja2", "sklearn", "scipy") if find_spec(name) is None]:
        raise MissingPackageError(f"a report needs {', '.join(missing)}: pip install 'embedwright[eval]'")
    folder = next(filter(is_run, paths), None)
    scored = read_scores(folder, [path for path in paths if path is not folder])
    run = None if folder is None else read_run(folder)
    model = None if folder is None else model_parts(folder, say)
    charts = [*run["curves"], *model["pairs"], *model["mined"]] if run and model else []
    page = {
        "title": run["name"] if run else "Results",
        "run": run,
        "model": model,
        "tables": score_tables(scored),
        "commands": _commands(folder, scored, command),
        "drawn": {"charts": {chart["id"]: chart for chart in charts}, "map": model["map"] if model else None},
    }
    return _rendered(page)


def _commands(folder: Path | None, scored: Sequence[Scored], report: str) -> list[dict[str, str]]:
    """Lists what was made by which command, where known when, on which machine and with which versions."""
    made = [] if folder is None else [("the run and its scores", f"embedwright train {folder / 'recipe.yaml'}", "", "")]
    for name, results in ((each.name, results) for each in scored for seed in each.seeds for results in seed):
        about = results.about
        if about.get("command"):
            machine = about.get("machine", {})
            where = ", ".join(filter(None, [about.get("date"), machine.get("processor"), *machine.get("gpus", [])]))
            packages = ", ".join(f"{package} {version}" for package, version in about.get("versions", {}).items())
            made.append((f"{name} on {results.suite}", about["command"], where, packages))
    made.append(("this report", report, "", ""))
    return [dict(zip(("what", "command", "when and where", "with"), row, strict=True)) for row in dict.fromkeys(made)]


def _rendered(page: dict[str, Any]) -> str:
    """Fills the template. Every text is escaped, in HTML and in the JSON that the script reads."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # what is not finite is no JSON
    html = environment.get_template("report.html").render(page)
    return html.encode(errors="replace").decode()  # a file's name may have bytes that are no UTF-8
