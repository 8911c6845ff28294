"""Write what is made from the program: recipe.md, cli.md, tables of data.md and scale.md, CONTRIBUTING's tree.

python scripts/make_docs.py            # writes them
python scripts/make_docs.py --check    # exits 1, with their names, where they differ
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compressed
import exports
import scale
import typer
import typer.cli
import typer.main
import verdicts
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from embedwright.cli.main import app
from embedwright.data.schema import Task
from embedwright.data.sources.catalog import load_catalog, markdown
from embedwright.evaluation.results import Results, read_without_items, table
from embedwright.studies.ablate import table as ablate_table
from embedwright.training import parts, stages
from embedwright.training.recipe import Recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROOT = DOCS.parent
TREE = "<!-- the tree, made by scripts/make_docs.py -->\n```\n", "```\n<!-- end -->"
# In the order of reading; files come by name. `test_layout.py` checks who may import whom.
ROOMS = ["", "model", "model/adapters", "model/formats", "model/interop", "model/verify", "cpu", "encoders", "vectors"]
ROOMS += [
    "data",
    "data/files",
    "data/tables",
    "data/sources",
    "data/clean",
    "export",
    "index",
    "pairs",
    "mining",
    "llm",
    "synth",
    "serve",
    "training",
    "training/batches",
]
ROOMS += ["training/losses", "training/engine", "training/masked", "training/run", "evaluation", "evaluation/bench"]
ROOMS += ["evaluation/compare", "compress", "studies", "studies/ablate", "studies/report"]
ROOMS += ["frameworks", "cli", "demo"]
CATALOGUE = "<!-- embedwright data list --markdown -->\n", "<!-- end -->"
SECTIONS: dict[str, type[BaseModel]] = {  # by the place of the part in the file
    "The recipe": Recipe,
    "model": parts.ModelPart,
    "tune": parts.TunePart,
    "stages": stages.ContrastiveStage,
    "stages.data": stages.DataPart,
    "stages.data.task": Task,
    "stages.loss": stages.LossPart,
    "stages.loss.distill": stages.DistillPart,
    "stages.optim": parts.OptimPart,
    "stages, of kind: mine": stages.MinePart,
    "stages, of kind: mntp": stages.MaskedStage,
    "stages.text, of kind: mntp": stages.TextPart,
    "run": parts.RunPart,
    "eval": parts.EvalPart,
}
TYPES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
TYPES |= {"object": "mapping", "null": ""}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HEAD = """# Recipe keys

Every key of a recipe, made from the program by `scripts/make_docs.py`. A recipe is one YAML file, such as
[laptop.yaml](../recipes/laptop.yaml). Unknown keys are refused, and so are values of another type. A key without a
default must be given; `-` means that the key has no value by default. `paper` is NV-Embed, arXiv 2405.17428, with the
number of its section; `recalled` is from memory of its appendix, not confirmed. Defaults need not be the paper's.
[losses.md](losses.md) has the formulas, [runs.md](runs.md) what may change when a run goes on.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        sys.exit(f"run scripts/make_docs.py: {', '.join(path.name for path in stale)}" if stale else 0)
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.name}")


def tree() -> str:
    """The rooms of the package and their files, each with the first sentence of its docstring."""
    source = ROOT / "src" / "embedwright"
    found = {str(path.parent.relative_to(source)).removeprefix(".") for path in source.rglob("*.py")}
    assert found == {*ROOMS}, f"ROOMS differs from the package: {found ^ {*ROOMS}}"
    lines = ["src/embedwright/"]
    for room in ROOMS:
        if room:
            lines.append(f"  {room + '/':26}{phrase(source / room / '__init__.py')}")
        for file in sorted((source / room).glob("*.py")):
            if not file.name.startswith("__"):
                lines.append(f"  {'  ' * bool(room)}{file.name:{26 - 2 * bool(room)}}{phrase(file)}")
    return "\n".join(lines) + "\n"


def phrase(file: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.\s(?=[A-Z`])", " ".join(docstring.split("\n\n")[0].split()))[0].rstrip(".")


def between(path: Path, marks: tuple[str, str], content: str) -> str:
    """The text of a file, with `content` between the two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(marks[0])
    return f"{before}{marks[0]}{content}{marks[1]}{rest.partition(marks[1])[2]}"


def pages() -> dict[Path, str]:
    """Each page that is made from the program, as it should be."""
    tables = markdown(load_catalog().values()).strip() + "\n"
    return {
        DOCS / "recipe.md": recipe(),
        DOCS / "cli.md": commands(),
        DOCS / "results.md": results(DOCS / "results"),
        DOCS / "export.md": exports.page((DOCS / "export.md").read_text(encoding="utf-8")),
        DOCS / "scale.md": scale.page((DOCS / "scale.md").read_text(encoding="utf-8")),
        ROOT / "CONTRIBUTING.md": between(ROOT / "CONTRIBUTING.md", TREE, tree()),
        DOCS / "data.md": between(DOCS / "data.md", CATALOGUE, tables),
        **compressed.pages(),
    }


# ---- the command line


def commands() -> str:
    """The `--help` of every command, as typer writes it, with summaries that are not cut."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="embedwright")
    for inner in _commands(command):
        inner.short_help = (inner.help or "").partition("\n\n")[0]
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="embedwright", title="Commands")
    return text.rstrip() + "\n"


def _commands(group: Any) -> Iterator[Any]:
    for command in getattr(group, "commands", {}).values():
        yield command
        yield from _commands(command)


# ---- the recipe


def recipe() -> str:
    lines = [HEAD]
    for place, part in SECTIONS.items():
        meanings = _texts_under_keys(part)
        lines += [f"## {place}\n", " ".join((part.__doc__ or "").split()) + "\n"]
        lines += ["| key | type | default | unit | meaning | source |", "|---|---|---|---|---|---|"]
        for name, field in part.model_fields.items():
            if name in meanings or not _parts_in(field.annotation):  # else it is a section of its own
                meaning, unit, source = _split(meanings[name])
                row = (f"`{field.alias or name}`", _type(part, name), _default(field.default), unit, meaning, source)
                lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", re.sub(" +", " ", "\n".join(lines)))


def _texts_under_keys(part: type[BaseModel]) -> dict[str, str]:
    """Key -> the text that stands under it in the source of the class."""
    (tree,) = ast.parse(inspect.getsource(part)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        key.target.id: " ".join(inspect.cleandoc(text.value.value).split())
        for key, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _split(text: str) -> tuple[str, str, str]:
    """`Meaning. Unit: steps. Source: where.` in its three parts."""
    found = re.fullmatch(r"(.*?)(?: Unit: (.*?)\.)?(?: Source: (.*)\.)?", text)
    assert found, text
    return found[1], found[2] or "", found[3] or ""


def _parts_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inside in typing.get_args(annotation) for part in _parts_in(inside)]


def _type(part: type[BaseModel], name: str) -> str:
    """What the key takes, in words, from the JSON schema of its part."""
    return _words(part.model_json_schema(by_alias=False)["properties"][name])


def _words(schema: dict[str, Any]) -> str:
    if branches := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(filter(None, map(_words, branches)))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "object")
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_words(schema['prefixItems'][0])}"
    if kind == "array":
        return f"list of {_words(schema['items'])}"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if abs(schema.get(key, 2**63)) < 2**63]
    return " ".join([TYPES[kind], ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "-" if value in (None, "") else str(value)


# ---- results


RESULTS = """# Results

What was really run, made by `scripts/make_docs.py` from the JSON files in [results](results), as `embedwright eval
MODEL SUITE --out docs/results` and `embedwright ablate FILE --out docs/results/ablations` write them. Higher is
better. Seconds are those of a shared machine. The draws of an evaluation (the rows that a classifier learns from,
first centres of k-means) have the seed 42.

Nothing here ran on a GPU, and no published benchmark was run: the machine had no access to the sets of MTEB and
AIR-Bench, so none of the paper's scores is measured again here. [`embedwright bench`](evaluation.md) does that where
they are.
"""
MODELS = {  # how those came to be whose name does not say it
    "smollm2-135m-6-layers-mean": 'Untrained: `Embedder.from_decoder("smollm2-135m", layers=6, pooling="mean", '
    'max_tokens=64, dtype="bfloat16")`, which reads both ways.',
    "runs/laptop/model": "The model of `embedwright demo`: six layers of SmolLM2 with latent pooling, trained by "
    "LoRA for 84 steps (seed 7) on documentation of Python libraries. It cuts texts after 64 tokens.",
    "results/flagship": "[The flagship](../results/flagship/README.md): 16 layers of SmolLM2 with mean pooling, "
    "trained by `recipes/flagship-135m.yaml` without a neural teacher. In-domain: newsgroups20, clinc150, STS.",
    "results/flagship-distilled": "[The flagship, distilled](../results/flagship-distilled/README.md): the same model, "
    "trained on for 75 minutes by `recipes/flagship-135m-distilled.yaml`, with MiniLM's vectors. In-domain as it is.",
    "flagship-static-256": "The flagship's [static student](students.md): 256 numbers for each token, and no network.",
    "minilm": "All-MiniLM-L6-v2, which cuts texts after 256 tokens.",
    "bm25": "BM25 ranks whole texts by their words, and has no score for the other tasks.",
}
IN_DOMAIN = {  # by suite: its tasks that the cells of our studies train for (recipes/ablations/base/cell.yaml)
    "dev-mini": " In-domain: newsgroups20, clinc150, sts14: cells train on other rows of these, or of STS12 and 13.",
}
NEEDED = ("model", "command", "date", "machine", "versions")  # of a number that may be shown


def results(folder: Path) -> str:
    """The page of all results in `folder`, by suite and study. Exits with the name of a file that says too little."""
    studies = sorted(folder.rglob("study.json"))
    inside = {file for study in studies for file in study.parent.rglob("*.json")}
    inside |= {*(folder / "ablations").rglob("*.json")}  # a study that runs there has no study.json yet
    inside |= {*(folder / "twins").rglob("*.json"), *(folder / "compression").glob("*.json")}  # of other forms
    suites: dict[str, dict[str, Results]] = {}
    for file in sorted({*folder.rglob("*.json")} - inside):
        found = checked(file)
        columns = suites.setdefault(found.suite, {})
        if found.about["model"] in columns:
            sys.exit(f"{file}: a second result of {found.about['model']} on {found.suite}")
        columns[found.about["model"]] = found
    lines = [RESULTS, *verdicts.page(folder)]
    for suite, of_suite in suites.items():
        # the first has all tasks, whose order the table takes
        columns = dict(sorted(of_suite.items(), key=lambda item: -len(item[1].rows)))
        head = ["task", "metric", *columns]
        lines += [f"## Suite `{suite}`\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in table(columns):
            cells = (
                "-" if value is None else value if isinstance(value, str) else f"{value:.4f}" for value in row.values()
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
        places: dict[str, list[str]] = {}
        for name, found in columns.items():
            lines.append(f"- `{name}`: {MODELS.get(name, '')} {made(found)}".replace("  ", " "))
            places.setdefault(place(found), []).append(name)
        lines += [f"- On {where}: {', '.join(names)}." for where, names in places.items()] + [""]
    lines += [line for file in studies for line in study(file)]
    return "\n".join([*lines, *twins().page(folder / "twins")]).rstrip() + "\n"


def twins() -> Any:
    """The script that makes the tables of benchmarks/twins, as a module."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "twins" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(file: Path) -> list[str]:
    """The table of an ablation and how its runs were made. Their `scores.json` lie where `ablate` has left them."""
    said = json.loads(file.read_text(encoding="utf-8"))
    runs = [*said["cells"], *said.get("shared_stages", ()), *said["trials"]]
    scored = [] if said["smoke"] else [run["folder"] for run in runs if "failed" not in run]
    if not scored:
        sys.exit(f"{file}: a smoke test, or a study without a score, is not shown")
    cells = [checked(file.parent / folder / "scores.json") for folder in scored]
    seeds = ", ".join(map(str, sorted({run["seed"] for run in said["cells"]}))) or "none yet"
    seconds = sum(sum(run["seconds"].values()) for run in runs)
    how = f"- {len(said['cells'])} cells of seeds {seeds}, {len(said['trials'])} trials of rates, "
    commands = dict.fromkeys(re.sub(r" --only[ =]\S+", "", cell.about["command"]) for cell in cells)
    days = sorted({cell.about["date"][:10] for cell in cells})
    how += f"the cells' seconds add up to {seconds:,.0f}: {', '.join(f'`{command}`' for command in commands)}, "
    where = sorted({place(cell) for cell in cells})
    how += f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}, each cell on {'; '.join(where)}."
    if len(states := {cell.about.get("code") for cell in cells}) > 1:
        how += f" They ran on {len(states)} states of the code."
    how += IN_DOMAIN.get(said["scored_on"], "")
    return [f"## Study `{said['study']}`\n", "```", ablate_table.render(said), "```\n", how, ""]


def checked(file: Path) -> Results:
    """The results of a file that says how they were made."""
    found = read_without_items(file)
    if lacking := [key for key in NEEDED if not found.about.get(key)]:
        sys.exit(f"{file}: about has no {', '.join(lacking)}: a number without these is not shown")
    return found


def made(found: Results) -> str:
    """Command, date and seconds of a result."""
    return f"`{found.about['command']}`, {found.about['date'][:10]}, {found.seconds:,.0f} s."


def place(found: Results) -> str:
    """Machine and versions of a result."""
    machine, versions = found.about["machine"], found.about["versions"].items()
    cores = f"{machine['cores']} core{'s' * (machine['cores'] != 1)} of {machine['processor']}"
    return (
        f"{cores}, {', '.join(machine['gpus']) or 'no GPU'}; {', '.join(f'{key} {value}' for key, value in versions)}"
    )


if __name__ == "__main__":
    main()
