"""What a person at a terminal sees of long work: one line with rate and time left. Used by the command and the demo."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedwright.training.recipe import Recipe

_EVERY_S = 5.0


def say(text: str = "") -> None:
    """Prints a result, on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str = "") -> None:
    """Prints what is going on, on standard error, so that standard output holds results alone."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def tell(counts: Mapping[str, int], out: Callable[[str], None] = say) -> None:
    """Prints how many there are of each kind; kinds without any are left out."""
    for what, count in counts.items():
        if count:
            out(f"  {count:,} {what}")


def counter(unit: str) -> Callable[..., None]:
    """A callback `(done, total, remark="")`: a line at most every five seconds, and one at the end."""
    started, shown, first = time.monotonic(), 0.0, 0

    def update(done: int, total: int, remark: str = "") -> None:
        nonlocal started, shown, first
        now = time.monotonic()
        if shown == 0.0:  # the first call sets the pace: what was done before (a resumed run) does not count
            first, started, shown = done, now, now
        elif done < total and now - shown < _EVERY_S:
            return
        shown = now
        rate = (done - first) / max(now - started, 1e-9)
        left = f", {clock((total - done) / rate)} left" if rate and done < total else ""
        pace = f", {rate:,.1f} {unit}/s" if rate >= 1 else f", {1 / rate:.1f} s each" if rate else ""
        note(f"  {done:,}/{total:,} {unit}{pace}{left}{'  ' + remark if remark else ''}")

    return update


def training(recipe: Recipe) -> Callable[[dict[str, Any]], None]:
    """An `on_step` for `train`."""
    steps = {stage.name: stage.optim.steps for stage in recipe.stages}
    total = sum(steps.values())
    before = {name: sum(list(steps.values())[:i]) for i, name in enumerate(steps)}
    update = counter("steps")

    def on_step(record: dict[str, Any]) -> None:
        pace = record["tokens"] / record["seconds"]
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.3f}"
        remark = f"{record['stage']}: loss {loss}, {pace:,.0f} tokens/s"
        update(before[record["stage"]] + record["step"], total, remark)

    return on_step


def clock(seconds: float) -> str:
    """Returns minutes and seconds, as 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
