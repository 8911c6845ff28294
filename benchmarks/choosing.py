"""Which setting to use: the first section of docs/performance.md, from the records of encode, cold start and GPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tables import Records, table

# USD for one core of a rented server and one hour. Costs are proportional to it: put in what you pay.
PRICE_PER_CORE_HOUR = 0.04
MOST_LOST = 0.5  # points of a task's score: int8 is recommended if int8_accuracy.py has measured less for each
ORDER = ["float32", "bfloat16", "int8", "ONNX Runtime int8", "ST float32", "ST bfloat16"]
EXPLAINED = f"""\
Passages on two cores; the rows of ST and ONNX Runtime are for comparison. USD: for a million passages, at
{PRICE_PER_CORE_HOUR} USD for a core and an hour (`PRICE_PER_CORE_HOUR` in `benchmarks/choosing.py`; costs are
proportional to it). MB: model and encoding, beside the libraries, as under [Encode](#encode). First vector: seconds
from `import` in a new process, with its files in the disk cache; the model is stored in float32. Distance: mean
1 - cosine to our float32, over all three text sets. The answers are by medians over the models."""


def choosing_section(results: Records) -> list[str]:
    """Which setting three users should take, by what was measured."""
    rows = sorted(_settings(results), key=lambda row: (row["model"], ORDER.index(row["setting"])))
    ours = [row for row in rows if row["setting"] in ORDER[:3]]
    if not ours:
        return []
    cells = [
        [
            row["model"],
            row["setting"],
            f"{row['rate']:,.0f}",
            f"{row['cost']:.2f}",
            f"{row['mb']:,.0f}",
            "" if row["first"] is None else f"{row['first']:.1f}",
            "" if row["distance"] is None else f"{row['distance']:.1e}",
        ]
        for row in rows
    ]
    head = ["model", "setting", "tokens/s", "USD per million", "MB", "first vector, s", "distance"]
    return [
        "## Which setting shall I use",
        "",
        *_answers(ours, results),
        "",
        EXPLAINED,
        "",
        *table(head, cells),
        "",
    ]


def _settings(results: Records) -> Iterator[dict[str, Any]]:
    """Yields a row for every side of every encode record, on passages."""
    cold = {record["model"]: record["seconds"] for name, record in results.items() if name.startswith("cold-")}
    for name, record in results.items():
        if not name.startswith("encode-"):
            continue
        found, kind = record["sets"]["passages"], record["dtype"]
        labels = {"ours": kind, "int8": "int8", "peer": f"ST {kind}", "onnx": "ONNX Runtime int8"}
        for side, rate in found["tokens_per_second"].items():
            hours = 1e6 * found["tokens"] / found["texts"] / rate / 3600
            away = [
                each["distance_to_float32"][side] for each in record["sets"].values() if "distance_to_float32" in each
            ]
            seconds = cold.get(record["model"], {}).get(labels[side])
            yield {
                "model": record["model"],
                "setting": labels[side],
                "rate": rate,
                "cost": hours * record["machine"]["cores"] * PRICE_PER_CORE_HOUR,
                "mb": record["memory"][side]["peak_mb"],
                "first": statistics.median(seconds) if seconds else None,
                "distance": statistics.mean(away) if away else None,
            }


def _answers(ours: Sequence[Mapping[str, Any]], results: Records) -> list[str]:
    """One line for each user, by medians over the models that were measured in every type. int8 is recommended once its
    scores were measured on trained models, and none falls by `MOST_LOST` points."""
    measured = {
        record["model"]: [row for row in record["differences"] if row["candidate"] == "int8" and row["task"] != "mean"]
        for name, record in results.items()
        if name.startswith("int8-")
    }
    moved = [row for rows in measured.values() for row in rows]
    int8 = bool(moved) and all(row["difference"] > -MOST_LOST for row in moved)
    by_type: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in ours:
        if int8 or row["setting"] != "int8":
            by_type.setdefault(row["setting"], {})[row["model"]] = row
    models = set.intersection(*(set(rows) for rows in by_type.values()))
    if not models or not {"float32", "bfloat16"} <= by_type.keys():
        return ["Not answered: no model has been measured in every type yet."]

    def typical(setting: str, what: str) -> float:
        return statistics.median(row[what] for model, row in by_type[setting].items() if model in models)

    def ranked(what: str, unit: str, digits: int) -> str:
        order = sorted(by_type, key=lambda setting: typical(setting, what))
        amounts = [f"{typical(setting, what):,.{digits}f} {unit}" for setting in order]
        others = ", ".join(f"{setting} {amount}" for setting, amount in zip(order[1:], amounts[1:], strict=True))
        return f'`dtype="{order[0]}"`: {amounts[0]} ({others})'

    answers = [
        f"- **A laptop** wants little memory. {ranked('mb', 'MB', 0)}.",
        f"- **A CPU server** wants cheap passages. {ranked('cost', 'USD', 2)} for a million.",
    ]
    if "int8" in by_type:
        least, most = (pick(row["difference"] for row in moved) for pick in (min, max))
        low, high = min(row["low"] for row in moved), max(row["high"] for row in moved)
        answers[-1] += (
            f" int8 moves scores by {least:+.2f} to {most:+.2f} points (intervals within {low:+.1f} to {high:+.1f})"
        )
        answers[-1] += f" on {len(moved)} tasks of trained models, {' and '.join(measured)}: measure yours."
    said = '- **A GPU:** `dtype="bfloat16"`.'
    if (gpu := results.get("gpu")) is None:
        return [*answers, f"{said} Not measured: no GPU has been at hand."]
    rates = " and ".join(f"{found['sides']['ours']['tokens_per_second']:,.0f}" for found in gpu["encode"].values())
    return [*answers, f"{said} One {gpu['gpu']} encodes {rates} tokens/s ([GPU](#gpu)). int8 was not run on one."]
