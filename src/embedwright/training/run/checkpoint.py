"""Checkpoints that are whole or not there, with the digest of each file in a manifest. No pickle."""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedwright.errors import InputError
from embedwright.files import remove_leftovers, sha256_of, whole_folder
from embedwright.processes import ALONE, Processes
from embedwright.training.engine.optim import projection_of
from embedwright.training.run.tensors import (
    FileDigest,
    read_tensors,
    tensor_sizes,
    write_hashed_text,
    write_parts,
    write_tensors,
)

logger = logging.getLogger(__name__)

_WEIGHTS, _OPTIMIZER, _STATE, _MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_PROJECTION = "projection"  # beside the moments: it is of the stage, not of the model
_OF_OPTIMIZER = re.compile(rf"\d+\.(step|exp_avg|exp_avg_sq)|{_PROJECTION}")


@dataclass(frozen=True)
class RunState:
    """The position of a run: `step` steps of stage number `stage` are done. Dropout and row order follow from it.

    Step 0 means that the previous stage has ended on these weights. `recipe`, `data` and `model` (the files that the
    run began with) are fingerprints. `facts` holds what they were made of, so that a refusal can name what changed.
    """

    stage: int
    step: int
    recipe: str
    data: str
    model: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.stage:02d}-{self.step:07d}"


def save_checkpoint(
    folder: Path,
    state: RunState,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    keep: int,
    processes: Processes = ALONE,
) -> Path:
    """Writes a checkpoint below `folder`, then removes all but the newest `keep`.

    `optimizer` is None between stages. All processes must call this. Rank 0 writes whole tensors; of sharded ones each
    process writes its part. Any number of processes can resume from either. Raises OSError in all of them if one cannot
    write; older checkpoints stay as they are.
    """
    moments = {"state": {}, "param_groups": []} if optimizer is None else optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, values in moments["state"].items() for name, value in values.items()}
    projection = None if optimizer is None else projection_of(optimizer)
    if projection is not None:
        tensors[_PROJECTION] = projection.detach()
    final = folder / state.folder
    about = {"run": asdict(state), "optimizer": moments["param_groups"]}
    try:
        with ExitStack() as stack:

            def begin() -> str:
                if final.exists():  # the same step again, after a resume from an older one
                    shutil.rmtree(final)
                return str(stack.enter_context(whole_folder(final)))

            temp = Path(processes.on_rank_0(begin))
            files: dict[str, FileDigest] = {}
            if any(hasattr(tensor, "full_tensor") for tensor in weights.values()):
                files = write_parts(temp, {name: w.detach() for name, w in weights.items()} | tensors, processes)

            def end() -> None:
                if not files:
                    for file, content in ((_WEIGHTS, weights), (_OPTIMIZER, tensors)):
                        files[file] = write_tensors(temp / file, content)
                files[_STATE] = write_hashed_text(temp / _STATE, json.dumps(about))
                manifest = {"files": files, "recipe": state.recipe, "processes": processes.count}
                (temp / _MANIFEST).write_text(json.dumps(manifest, indent=2))
                stack.close()
                keep_newest(folder, keep)

            processes.on_rank_0(end)
    except Exception as error:  # safetensors has errors of its own for a disk that is full
        raise OSError(f"checkpoint {final} could not be written ({error}); the one before is intact") from error
    return final


def keep_newest(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)


def newest(folder: Path) -> Path | None:
    """Finds the newest checkpoint whose files match its manifest. Renames a damaged one to `*.damaged-*` and logs it.

    Only one process may call this, because it removes what a killed process left.
    """
    remove_leftovers(folder)
    for candidate in reversed(_complete(folder)):
        problem = _problem(candidate)
        if problem is None:
            return candidate
        logger.warning("checkpoint %s is damaged (%s): set aside, the one before is used", candidate, problem)
        candidate.rename(candidate.with_name(f"{candidate.name}.damaged-{uuid.uuid4().hex[:6]}"))
    return None


def read_state(checkpoint: Path) -> RunState:
    return RunState(**json.loads((checkpoint / _STATE).read_text())["run"])


def restore_weights(checkpoint: Path, own: dict[str, Tensor]) -> None:
    """Reads the weights into the trained tensors, of sharded ones this process's part. InputError if names differ."""
    stored = {name for name in tensor_sizes(checkpoint) if not _OF_OPTIMIZER.fullmatch(name)}
    if own.keys() != stored:
        raise InputError(f"checkpoint and model differ in {sorted(own.keys() ^ stored)[:3]}")
    read_tensors(checkpoint, {name: parameter.detach() for name, parameter in own.items()})


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's moments and step counts, and its projection. Raises ValueError if its parameters differ."""
    numbers = json.loads((checkpoint / _STATE).read_text())["optimizer"]
    for saved, group in zip(numbers, optimizer.param_groups, strict=False):  # torch refuses another number of groups
        saved["fused"] = group["fused"]  # the kernel of this device, not of that on which the checkpoint was written
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored = {name: size for name, size in tensor_sizes(checkpoint).items() if _OF_OPTIMIZER.fullmatch(name)}
    projection = projection_of(optimizer)
    if (None if projection is None else projection.shape) != stored.pop(_PROJECTION, None):
        raise InputError(f"{checkpoint} is of a teacher with vectors of another width: take that one, or a new run.out")
    state: dict[int, dict[str, Any]] = {}
    for key, size in stored.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        moment = torch.zeros_like(parameter) if parameter.shape == size else torch.zeros(size)
        state.setdefault(int(index), {})[name] = moment.detach()
    tensors = {f"{index}.{name}": moment for index, moments in state.items() for name, moment in moments.items()}
    read_tensors(checkpoint, tensors if projection is None else tensors | {_PROJECTION: projection.detach()})
    optimizer.load_state_dict({"state": state, "param_groups": numbers})


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("??-???????") if p.is_dir())


def _problem(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        for name, expected in files.items():
            file = checkpoint / name
            if {"sha256": sha256_of(file), "bytes": file.stat().st_size} != expected:
                return f"{name} has other content than its manifest says"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None
