"""Where a run resumes: rank 0 decides, and every process must read what rank 0 reads."""

from __future__ import annotations

import logging
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedwright.config import ConfigError
from embedwright.files import remove_leftovers, write_text
from embedwright.processes import Processes
from embedwright.training.recipe import Recipe, differences
from embedwright.training.run.checkpoint import RunState, newest, read_state
from embedwright.training.run.save import check_saved

logger = logging.getLogger(__name__)


def find_resume_point(recipe: Recipe, fresh: RunState, processes: Processes) -> tuple[RunState, Path | None]:
    """Returns the state to resume from and the newest checkpoint; `fresh` and None if there is no checkpoint.

    Raises ConfigError in all processes if one of them has another recipe, other data or another model than rank 0, or
    if the folder holds a run of another one.
    """
    out = recipe.out
    of_first = RunState(**processes.broadcast(asdict(fresh)))
    with processes.together():
        if other := _other(of_first, fresh):
            raise ConfigError(f"its {other} differs from that of process 0: give all processes the same files")

    def look() -> tuple[dict[str, Any], str | None]:
        checkpoint = newest(out / "checkpoints")
        state = fresh if checkpoint is None else read_state(checkpoint)
        if other := _other(state, fresh):
            raise ConfigError(f"{out} holds a run of another {other}: choose another run.out, or remove that folder")
        check_saved(recipe, checkpoint is not None, state.stage)
        if checkpoint is not None:
            logger.info("resuming %s at stage %d, step %d", out, state.stage, state.step)
        return asdict(state), None if checkpoint is None else str(checkpoint)

    state, checkpoint = processes.on_rank_0(look)
    return RunState(**state), checkpoint and Path(checkpoint)


def open_folder(out: Path, processes: Processes) -> None:
    """Makes the folder of a run and removes what killed writers left there.

    Raises ConfigError in all processes if it is another folder in one of them, such as one on a disk of its own.
    """

    def make() -> str:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        name = f".processes.{uuid.uuid4().hex[:12]}"  # like a leftover temporary file, so that a later start removes it
        write_text(out / name, "")
        return name

    mark = out / processes.on_rank_0(make)
    with processes.together():
        if not mark.exists():
            raise ConfigError(f"run.out: {out} is another folder here than in process 0: all processes must share one")
    if processes.is_rank_0:
        mark.unlink()


def _other(then: RunState, now: RunState) -> str | None:
    """Says what differs between two states of one run, and in what; None if nothing does."""
    pairs = {what: (getattr(then, what), getattr(now, what)) for what in ("recipe", "data", "model")}
    teachers = now.facts["teacher"]
    pairs["teacher"] = teachers | then.facts.get("teacher", {}), teachers  # older checkpoints do not tell of all
    for what, (before, after) in pairs.items():
        if before != after:
            return f"{what} ({differences(then.facts.get(what), now.facts.get(what))})"
    return None
