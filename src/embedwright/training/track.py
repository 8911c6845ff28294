"""What a run writes about itself: `metrics.jsonl`, one object a step, and TensorBoard beside it."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Literal


class Tracker:
    """Opens the log of a run that stands at (stage, step); what lies behind that, a torn line included, is cut off."""

    def __init__(
        self, out: Path, tracker: Literal["tensorboard", "none"], stages: list[str], stage: int, step: int
    ) -> None:
        self.file = out / "metrics.jsonl"
        found = [r for r in read_records(self.file) if r["stage"] in stages]
        kept = [r for r in found if (stages.index(r["stage"]), r["step"]) <= (stage, step)]
        write_records(self.file, kept)
        self.total = len(kept)
        self.writer = None
        if tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=self.total + 1)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(self, record: dict[str, Any]) -> None:
        """One line, flushed: a run that is killed loses no step that was done."""
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        self.total += 1
        if self.writer is not None:
            for name in ("loss", "lr", "grad_norm"):
                self.writer.add_scalar(name, record[name], self.total)
            self.writer.add_scalar("tokens_per_second", record["tokens"] / record["seconds"], self.total)


def read_records(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, as far as they are whole; none where there is no file."""
    records: list[dict[str, Any]] = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # torn by a kill in the middle of a line: nothing whole comes behind it
    return records


def write_records(file: Path, records: list[dict[str, Any]]) -> None:
    """Written aside and renamed: a kill in the middle leaves the file as it was."""
    aside = file.with_suffix(".part")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    aside.replace(file)
