"""`heldout.jsonl`: the loss of a masked phase on documents that it never trains on, before and after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedwright.processes import Processes
from embedwright.training.run.track import read_records, write_records

FILE = "heldout.jsonl"


def measured_once(
    out: Path, stage: str, step: int, measure: Callable[[], dict[str, float]], processes: Processes
) -> dict[str, Any] | None:
    """Measures at this point of the run, keeps the record and returns it; None where it has one already."""
    records = processes.on_rank_0(lambda: read_records(out / FILE))
    if any((record["stage"], record["step"]) == (stage, step) for record in records):
        return None
    record = {"stage": stage, "step": step, **measure()}
    processes.on_rank_0(lambda: write_records(out / FILE, [*records, record]))
    return record
