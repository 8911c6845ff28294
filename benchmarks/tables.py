"""What every table of docs/performance.md is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Records = Mapping[str, Mapping[str, Any]]  # by the name of the result


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, as lines."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def spread(ratio: Mapping[str, float]) -> str:
    """A ratio over its rounds."""
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def machines(results: Records) -> list[str]:
    """One line for each machine and set of versions, with the days and the names of its results."""
    runs: dict[str, list[str]] = {}
    for name, record in results.items():
        m = record["machine"]
        versions = ", ".join(f"{p} {m[p]}" for p in ("python", "torch", "transformers", "sentence-transformers"))
        instructions = " ".join([m["instructions"], *m.get("extensions", ())])
        cores = f"{m['cores']} cores, {m['threads']} threads, {instructions}, {m['memory_gb']} GB"
        runs.setdefault(f"{m['cpu']}, {cores}; {versions}", []).append(name)
    days = {line: sorted({results[name]["date"] for name in names}) for line, names in runs.items()}
    return [
        f"Machine: {line}; {' to '.join(dict.fromkeys((days[line][0], days[line][-1])))} ({', '.join(names)})."
        for line, names in runs.items()
    ]
