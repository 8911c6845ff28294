"""Checkpoints that are whole or not there, with the digest of each file in a manifest. No pickle."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedwright.errors import InputError
from embedwright.files import remove_leftovers, sha256_of, whole_folder
from embedwright.processes import ALONE, Processes
from embedwright.training.engine.optim import projection_of
from embedwright.training.engine.parallel import full, like

logger = logging.getLogger(__name__)

_WEIGHTS, _OPTIMIZER, _STATE, _MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_PROJECTION = "projection"  # beside the moments: it is of the stage, not of the model


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

    `optimizer` is None between stages. All processes must call this. Rank 0 writes whole tensors, so any number of
    processes can go on from them. Raises OSError if it cannot write; older checkpoints stay as they are.
    """
    trained = {name: _whole(tensor, processes) for name, tensor in weights.items()}
    moments = {"state": {}, "param_groups": []} if optimizer is None else optimizer.state_dict()
    tensors = {
        f"{index}.{name}": _whole(value, processes)
        for index, values in moments["state"].items()
        for name, value in values.items()
    }
    projection = None if optimizer is None else projection_of(optimizer)
    if projection is not None:
        tensors[_PROJECTION] = _whole(projection, processes)
    final = folder / state.folder
    if processes.first:
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        try:
            with whole_folder(final) as temp:
                save_file(trained, temp / _WEIGHTS)
                save_file(tensors, temp / _OPTIMIZER)
                (temp / _STATE).write_text(json.dumps({"run": asdict(state), "optimizer": moments["param_groups"]}))
                files = {name: _digest(temp / name) for name in (_WEIGHTS, _OPTIMIZER, _STATE)}
                manifest = {"files": files, "recipe": state.recipe, "processes": processes.count}
                (temp / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        except Exception as error:  # safetensors has errors of its own for a disk that is full
            raise OSError(f"checkpoint {final} could not be written ({error}); the one before is intact") from error
        keep_newest(folder, keep)
    processes.wait()
    return final


def keep_newest(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints."""
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)


def _whole(tensor: Tensor, processes: Processes) -> Tensor:
    """Gathers a tensor on the CPU of rank 0; other ranks take part and keep nothing."""
    whole = full(tensor.detach())
    return whole.cpu().contiguous() if processes.first else whole.new_empty(0)


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


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(checkpoint / _WEIGHTS)
    return weights


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's moments and step counts, and its projection. Raises ValueError if its parameters differ."""
    numbers = json.loads((checkpoint / _STATE).read_text())["optimizer"]
    for saved, group in zip(numbers, optimizer.param_groups, strict=False):  # torch refuses another number of groups
        saved["fused"] = group["fused"]  # the kernel of this device, not of that on which the checkpoint was written
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    tensors = load_file(checkpoint / _OPTIMIZER)
    projection, kept = projection_of(optimizer), tensors.pop(_PROJECTION, None)
    if (None if projection is None else projection.shape) != (None if kept is None else kept.shape):
        raise InputError(f"{checkpoint} is of a teacher with vectors of another width: take that one, or a new run.out")
    if projection is not None and kept is not None:
        projection.data.copy_(kept)
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": numbers})


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("??-???????") if p.is_dir())


def _problem(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if _digest(checkpoint / name) != expected:
                return f"{name} has other content than its manifest says"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}
