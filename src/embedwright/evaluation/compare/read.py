"""Reads what is compared: results of `eval`, `bench`, runs and studies from disk, or a model that is scored now.

NAME.json, or a folder of such files    results of `eval`, or AIR-Bench results
a folder with model_meta.json           MTEB results of one model and revision, as `bench` and mteb write them
a folder with evaluations.jsonl         a run: its last evaluation. Runs that differ in their seed only are one, if
                                        their last evaluations are at the same point
a folder with study.json                a study of `ablate`: each arm, the baseline first
any other name                          a model, if there is a suite
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embedwright.config import load_yaml
from embedwright.errors import InputError, MissingPackageError, NotFoundError, as_input_error
from embedwright.evaluation.compare.compare import Candidate
from embedwright.evaluation.results import (
    Result,
    Results,
    items_file,
    parts_scored,
    read_arrays,
    read_results,
    read_without_items,
    run_items_file,
    with_items,
)
from embedwright.files import whole_lines

MTEB_MODEL, RUN, STUDY = "model_meta.json", "evaluations.jsonl", "study.json"
NO_PART_OF_A_RECIPE = ("name", "seed", "run", "provenance")  # what may differ between the runs of one candidate


class _Found(NamedTuple):
    """The results of one training seed. Those with equal `same`, if it is not empty, are seeds of one candidate."""

    name: str
    results: list[Results]
    seed: int | None = None
    same: str = ""


def read_candidates(
    given: Sequence[str],
    suite: str | None = None,
    progress: Callable[[str], None] | None = None,
    how: Mapping[str, Any] | None = None,
) -> list[Candidate]:
    """Reads all that is to be compared, the first one first. Models are opened with `how` and scored on `suite`.

    Raises InputError for a path that holds no results or those of several models, for a model without a suite, and for
    a suite without a model.
    """
    candidates: list[Candidate] = []
    known: dict[str, dict[int | None, Sequence[Results]]] = {}
    scored = False
    for each in given:
        path = Path(each).expanduser()
        found = _on_disk(path) if path.exists() else []
        if not found:
            if suite is None:
                what = "holds no results" if path.exists() else "is no result file or folder"
                raise NotFoundError(f"{each} {what}; to score a model, give a --suite")
            scored = True
            found = [_Found(each, [_score(each, suite, progress, how or {})])]
        for one in found:
            seeds = known.get(one.same, {})
            if not one.same or not seeds or one.seed in seeds:
                seeds = known[one.same] = {}
                candidates.append(Candidate(one.name, seeds))
            seeds[one.seed] = one.results
    if suite is not None and not scored:
        raise InputError(f"--suite {suite} is for models, and everything here is results on disk")
    return _named_apart(candidates)


def _score(model: str, suite: str, progress: Callable[[str], None] | None, how: Mapping[str, Any]) -> Results:
    from embedwright.encoders.open import open_encoder  # results on disk are read without torch
    from embedwright.evaluation.suite import BM25, evaluate

    return evaluate(model if model == BM25 else open_encoder(model, **how), suite, name=model, progress=progress)


def _named_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Adds the seeds to a name that has several, and a number to one that was given before."""
    named: dict[str, Candidate] = {}
    for candidate in candidates:
        seeds = ", ".join(str(seed) for seed in sorted(candidate.seeds, key=lambda seed: seed or 0))
        name = f"{candidate.name} (seeds {seeds})" if len(candidate.seeds) > 1 else candidate.name
        before = sum(other == name or other.startswith(f"{name} #") for other in named)
        name = f"{name} #{before + 1}" if before else name
        named[name] = Candidate(name, candidate.seeds)
    return [*named.values()]


def _on_disk(path: Path) -> list[_Found]:
    """Returns the results in a file or folder; none if there are none."""
    if path.is_file():
        return [_of_files([read_results(path)], path)] if path.suffix == ".json" else []
    if (path / STUDY).is_file():
        return _study(path)
    if (path / RUN).is_file():
        return [_run(path)]
    found = result_folders(path)
    if len(found) > 1:
        raise InputError(f"{path} has results of several models: name one of {', '.join(map(str, found))}")
    return [_mteb(found[0]) if (found[0] / MTEB_MODEL).is_file() else _folder(found[0])] if found else []


def result_folders(path: Path) -> list[Path]:
    """Returns `path` if it holds results, else the folders below it that do: each has those of one model."""
    folders = [path] if _has_results(path) else sorted({file.parent for file in path.rglob("*.json")})
    return [folder for folder in folders if "unfinished" not in folder.parts and _has_results(folder)]


def _has_results(folder: Path) -> bool:
    return (folder / MTEB_MODEL).is_file() or any(_result_files(folder))


def _result_files(folder: Path) -> Iterator[tuple[Path, Results]]:
    """Gives the results in a folder, without their items. Other JSON files are passed over."""
    for file in sorted(folder.glob("*.json")):
        try:
            yield file, read_without_items(file)
        except InputError:
            continue


def _folder(folder: Path) -> _Found:
    """Reads a folder of result files, one a suite. Files of one suite (AIR-Bench has one a set) become one."""
    suites: dict[str, Results] = {}
    models: dict[str, str] = {}
    for file, bare in _result_files(folder):
        results = with_items(bare, items_file(file))
        if model := results.about.get("model"):
            identity = json.dumps([model, results.about.get("fingerprint")], sort_keys=True)
            models.setdefault(identity, f"{file} ({model})")
        before = suites.get(results.suite)
        rows = (*before.rows, *results.rows) if before else results.rows
        if len({row.task for row in rows}) < len(rows):
            raise InputError(f"{folder} has several results of suite {results.suite}: name one of its files")
        suites[results.suite] = Results(results.suite, rows, results.seconds, results.about)
    if len(models) > 1:
        raise InputError(
            f"{folder} has results of several models, or of one before and after its weights changed: "
            f"{', '.join(models.values())}. Name one file, or move the files of each model to a folder of its own"
        )
    return _of_files([*suites.values()], folder)


def _of_files(results: list[Results], path: Path) -> _Found:
    return _Found(str(results[0].about.get("model") or path), results)


def _run(folder: Path) -> _Found:
    """Reads the last evaluation of a run: all suites of its last point.

    Runs are seeds of one candidate if they were evaluated at the same point, too. A run that stops by its scores may do
    so at any step of its last stage.
    """
    with as_input_error(folder / RUN, "is no record of a run's evaluations"):
        records = [json.loads(line) for line in whole_lines(folder / RUN)]
        points = [(record["stage"], record["step"]) for record in records]
        last = [record for record, point in zip(records, points, strict=True) if point == points[-1]]
        results = [
            with_items(
                Results.from_json(json.dumps(record["results"])),
                run_items_file(folder, record["stage"], record["step"], record["suite"]),
            )
            for record in last
        ]
    if not results:
        raise InputError(f"{folder} is a run without an evaluation: name suites in its recipe (`eval`)")
    recipe, name = load_yaml(folder / "recipe.yaml"), folder.resolve().name
    stage, step = points[-1]
    with as_input_error(folder / "recipe.yaml", "is no recipe of a run"):
        seed, stages = recipe["seed"], [each["name"] for each in recipe.get("stages", [])]
        stops_early = recipe.get("eval", {}).get("patience")
    if stages and stage != stages[-1]:
        name += f", unfinished: {stage} {step}"
    same = [stage, None if stops_early else step]
    same += [{key: value for key, value in recipe.items() if key not in NO_PART_OF_A_RECIPE}]
    return _Found(name, _by_version(results), seed, json.dumps(same, sort_keys=True))


def _by_version(found: Sequence[Results]) -> list[Results]:
    """Puts MTEB tasks into the suite of their version of mteb, as those of `bench` are. A task counts once."""
    suites: dict[str, dict[str, Result]] = {}
    for results in found:
        version = results.about.get("mteb")
        rows = suites.setdefault(f"mteb {version}" if version else results.suite, {})
        for row in results.rows:  # of two benchmarks' subsets of one task, the more
            if row.task not in rows or len(row.data) > len(rows[row.task].data):
                rows[row.task] = row
    return [Results(suite, tuple(rows.values()), 0.0) for suite, rows in suites.items()]


def _study(folder: Path) -> list[_Found]:
    """Reads each cell of a study that has run."""
    with as_input_error(folder / STUDY, "is no record of a study"):
        study: Mapping[str, Any] = json.loads((folder / STUDY).read_text(encoding="utf-8"))
        cells = sorted(study["cells"], key=lambda cell: cell["arm"] != study.get("baseline"))
        return [
            _Found(
                cell["arm"],
                [read_results(folder / cell["folder"] / "scores.json")],
                cell["seed"],
                f"{folder} {cell['arm']}",
            )
            for cell in cells
        ]


def _mteb(folder: Path) -> _Found:
    """Reads the MTEB results of one revision of a model. Each version of mteb is a suite of its own."""
    suites: dict[str, list[Result]] = {}
    counted: set[tuple[str, str]] = set()  # tasks whose score is a part of that of another task here
    for file in sorted(folder.glob("*.json")):
        if file.name == MTEB_MODEL:
            continue
        with as_input_error(file, "is no MTEB result"):
            saved = json.loads(file.read_text(encoding="utf-8"))
            parts = [part["main_score"] for split in saved["scores"].values() for part in split]
            kind, metric, within = _metadata(saved["task_name"])
            data = parts_scored(saved["scores"])
            items = read_arrays(items_file(file))
            result = Result(saved["task_name"], kind, metric, float(np.mean(parts)), items=items, data=data)
            suite = f"mteb {saved['mteb_version']}"
            suites.setdefault(suite, []).append(result)
            counted |= {(suite, name) for name in within}
    with as_input_error(folder / MTEB_MODEL, "is no description of a model by mteb"):
        meta = json.loads((folder / MTEB_MODEL).read_text(encoding="utf-8"))
        name = f"{meta['name']} ({meta['revision']})"
    whole = {suite: [row for row in rows if (suite, row.task) not in counted] for suite, rows in suites.items()}
    return _Found(name, [Results(suite, tuple(rows), 0.0) for suite, rows in whole.items()])


def _metadata(task: str) -> tuple[str, str, list[str]]:
    """Returns the type of an MTEB task, the name of its main score, and the tasks that an aggregate is the mean of."""
    try:
        from mteb import get_task
    except ImportError as error:
        raise MissingPackageError("MTEB results need mteb: pip install 'embedwright[bench]'") from error
    try:
        metadata = get_task(task).metadata
    except KeyError:
        return "unknown type", "main score", []
    return metadata.type, metadata.main_score, [part.metadata.name for part in getattr(metadata, "tasks", [])]
