"""Histograms of the report: scores of positives, hard negatives and random pairs, by a run's model and in mining."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embedwright.data.tables.table import open_examples
from embedwright.encoders.protocol import Encoder, encode_finite, task_for
from embedwright.mining.report import KINDS
from embedwright.studies.report.run import Chart, chart
from embedwright.training.batches.blend import Row, Source
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe

SAMPLE = 200  # rows of a task
TASKS = 4  # the first so many tasks of a run
BIN = 0.02  # of cosine
SEED = 0

Scores = NDArray[np.float32]


def pair_charts(encoder: Encoder, recipe: Recipe, folder: Path) -> list[Chart]:
    """Returns a chart for each of the first tasks with hard negatives: cosines by this encoder, in percent of pairs.

    A random pair is a query and the positive of another sampled row. Negatives that a stage has mined in its run are
    read from the run's `folder`. Raises InputError if the training data cannot be opened.
    """
    charts: list[Chart] = []
    seen = set()
    for source, stage in _sources(recipe, folder):
        if len(charts) == TASKS or (key := (source.task.name, source.table.path)) in seen:
            continue
        seen.add(key)
        per_row = source.table.negatives_per_row(), source.table.positives_per_row()
        usable = source.rows[np.minimum(*per_row)[source.rows] > 0]
        if len(usable) < 2:  # a random pair needs two rows
            continue
        # not in the order of the file, where neighbours may share a label: a row's neighbour gives its random pair
        drawn = np.random.default_rng(SEED).permutation(len(usable))[:SAMPLE]
        sample = replace(source, rows=usable[drawn])
        rows = [sample.row(i) for i in range(len(drawn))]
        title = f"Task {source.task.name}" + (f", negatives mined for {stage}" if stage else "")
        charts.append(_chart(f"pairs-{len(charts)}", encoder, title, rows))
    return charts


def mining_charts(folder: Path) -> list[Chart]:
    """Returns a chart for each time that a stage of the run has mined: the scores by the teacher.

    A folder that is being filled, or was when the run was killed, is passed over. Mining without scores (`random`) has
    no chart.
    """
    charts: list[Chart] = []
    for file in sorted(folder.glob("mined/*/[0-9]*/[0-9]*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        scores, stage, step = report["scores"], file.parts[-3], int(file.parts[-2])
        series = {key.replace("_", " "): scores[key] for key in KINDS}
        if not any(map(any, series.values())):
            continue
        made = f"Scores by the teacher: {report['queries']:,} queries, {report['negatives']:,} negatives taken."
        charts.append(_histogram(f"mined-{len(charts)}", f"Mining for {stage}, step {step}", series, scores, made))
    return charts


def _sources(recipe: Recipe, folder: Path) -> Iterator[tuple[Source, str]]:
    """Gives the sources of all stages. One that was mined has its last negatives, and the name of the stage with it."""
    for stage, sources in zip(recipe.stages, open_sources(recipe), strict=True):
        mined = max((folder / "mined" / stage.name).glob("[0-9]*"), default=None)
        for number, source in enumerate(sources):
            file = None if mined is None else mined / f"{number:02d}.parquet"
            if file is not None and file.is_file():
                table = open_examples(file, seed=recipe.seed)
                yield replace(source, table=table, rows=np.arange(len(table))), stage.name
            else:
                yield source, ""


def _chart(name: str, encoder: Encoder, title: str, rows: Sequence[Row]) -> Chart:
    negatives = [[passage.text for passage in row.example.negatives] for row in rows]
    query_NE = _encoded(encoder, [(row, row.example.query) for row in rows], queries=True)
    positive_NE = _encoded(encoder, [(row, row.example.positives[0].text) for row in rows])
    negative_FE = _encoded(encoder, [(row, text) for row, own in zip(rows, negatives, strict=True) for text in own])
    counts = [len(own) for own in negatives]
    positive_N: Scores = np.einsum("ne,ne->n", query_NE, positive_NE)
    random_N: Scores = np.einsum("ne,ne->n", query_NE, np.roll(positive_NE, 1, axis=0))
    negative_F: Scores = np.einsum("fe,fe->f", query_NE.repeat(counts, axis=0), negative_FE)
    hardest = [own.max() for own in np.split(negative_F, np.cumsum(counts)[:-1])]
    first = np.floor(min(each.min() for each in (positive_N, random_N, negative_F)) / BIN)
    last = np.floor(max(each.max() for each in (positive_N, random_N, negative_F)) / BIN)
    edges = np.arange(first, last + 2) * BIN
    found = {"positives": positive_N, "hard negatives": negative_F, "random pairs": random_N}
    series = {name: np.histogram(scores, edges)[0].tolist() for name, scores in found.items()}
    above = float(np.mean(positive_N > np.array(hardest)))
    note = f"In {above:.0%} of {len(rows)} sampled rows, the positive scores above every hard negative."
    return _histogram(name, title, series, {"start": float(edges[0]), "step": BIN}, note)


def _encoded(encoder: Encoder, texts: Sequence[tuple[Row, str]], queries: bool = False) -> Scores:
    """Encodes each text as training does: with its task's instruction, if it is a query or the task is symmetric."""
    by_instruction: dict[str | None, list[int]] = {}
    for number, (row, _) in enumerate(texts):
        asked = task_for(encoder, row.task.instruction) if queries or row.task.symmetric else ""
        by_instruction.setdefault(asked or None, []).append(number)
    parts = {asked: encode_finite(encoder, [texts[n][1] for n in own], asked) for asked, own in by_instruction.items()}
    vectors_NE = np.empty((len(texts), next(iter(parts.values())).shape[1]), dtype=np.float32)
    for instruction, own in by_instruction.items():
        vectors_NE[own] = parts[instruction]
    return vectors_NE


def _histogram(
    name: str, title: str, counts: Mapping[str, Sequence[int]], bins: Mapping[str, float], note: str
) -> Chart:
    """Returns a chart of histograms, each in percent of its own scores, so that they can be compared."""
    series, said = [], []
    for kind, own in counts.items():
        if not (total := sum(own)):
            continue
        middle = [bins["start"] + (i + 0.5) * bins["step"] for i in range(len(own))]
        mean = math.fsum(m * n for m, n in zip(middle, own, strict=True)) / total
        said.append(f"{kind}: {total:,}, mean {mean:.3f}")
        points = {"x": [round(m, 6) for m in middle], "y": [100 * n / total for n in own]}
        series.append({"name": f"{kind} (mean {mean:.2f})", "area": True, **points})
    return chart(name, title, series, f"{title}: {'; '.join(said)}.", x="score", unit="%", note=note)
