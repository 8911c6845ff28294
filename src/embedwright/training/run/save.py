"""What a run leaves of its model: the forms of `run.save`, at its end and at the end of stages that say `save`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from embedwright.config import ConfigError
from embedwright.files import fill_folder, scratch_folder, write_text
from embedwright.host import restored_rng
from embedwright.model.embedder import Embedder
from embedwright.model.formats.folder import is_adapter, tensors_of, weights_in
from embedwright.processes import Processes
from embedwright.training.parts import Form
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import check_moved, copied, merged

logger = logging.getLogger(__name__)

_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors writes them

Card = Callable[[Embedder, str], str]  # the model card of a model in this form, which is read from this path


def kept_forms(recipe: Recipe, stage: str | None = None) -> dict[Form, Path]:
    """Returns the folder of each form that `run.save` names, of the end of a stage or (None) of the run."""
    out = recipe.out
    model = out / "stages" / stage if stage else out / "model"
    folders: dict[Form, Path] = {"merged": model, "adapter": (model if stage else out) / "adapter"}
    return {form: folder for form, folder in folders.items() if form in recipe.run.save}


def saved_model(out: Path) -> Path:
    """Returns the folder of the model that the run in `out` has saved: `model`, or `adapter` if it is there alone."""
    return out / ("adapter" if is_adapter(out / "adapter") and not (out / "model").is_dir() else "model")


def check_saved(recipe: Recipe, begun: bool, stage: int) -> None:
    """Raises ConfigError if the run cannot keep its models, because it resumes in the stage of this number.

    It cannot if a folder of models to come holds weights of another type than `run.dtype`, since what is there stays.
    `begun` says whether the run has a checkpoint. Without one, a model that is there is not of this run.
    """
    out = recipe.out
    if not begun:
        check_no_older(out)
    for name in (*(part.name for part in recipe.stages[stage:] if part.save), None):
        for folder in kept_forms(recipe, name).values():
            if _is_model(folder) and (others := _types_in(folder) - {recipe.run.dtype}):
                raise ConfigError(
                    f"recipe {recipe.name}: run.dtype: {folder} is kept in {min(others)}, not in {recipe.run.dtype}: "
                    "move it away, and run again"
                )
    for part in recipe.stages[:stage]:
        folders = kept_forms(recipe, part.name) if part.save else {}
        if missing := [form for form, folder in folders.items() if not _is_model(folder)]:
            raise ConfigError(
                f"recipe {recipe.name}: stages.{part.name}.save: the run in {out} is past that stage and has not kept "
                f"its model ({missing[0]}): leave save out, or choose another run.out"
            )


def check_no_older(out: Path) -> None:
    """Raises ConfigError if a folder holds the models of a run without its checkpoints: they would count as new."""
    for kept in (out / "model", out / "adapter", out / "stages"):
        if kept.is_dir() and any(kept.iterdir()) and not any((out / "checkpoints").glob("[!.]*")):
            raise ConfigError(
                f"{kept} is of an older run, whose checkpoints are gone: move it, or choose another run.out (--out)"
            )


def save_stage(recipe: Recipe, model: Embedder, processes: Processes, stage: str, card: Card) -> None:
    """Saves the model as it now is in each form of `run.save`, with its card; the model itself trains on.

    Each form is made of a copy, on the CPU of rank 0: it takes 4 bytes a parameter there. A folder that holds a model
    is left as it is. All processes must call this. Raises RuntimeError as `check_moved` and `merged` do.
    """
    folders = kept_forms(recipe, stage)
    lacking = processes.on_rank_0(
        lambda: [
            form for form, folder in folders.items() if not (_is_model(folder) and (folder / "README.md").exists())
        ]
    )
    for form in lacking:
        with restored_rng():
            copy = copied(recipe, model, processes)
            with processes.together():
                if copy is not None:
                    check_moved(copy)
                    _save(recipe, copy if form == "adapter" else merged(copy), folders[form], card)


def save_end(recipe: Recipe, model: Embedder, processes: Processes, card: Card) -> Embedder:
    """Saves the trained model in each form of `run.save`, with its card, and returns it merged, in float32.

    It is done on the CPU, where the model takes 4 bytes a parameter: a GPU that trains a model in bfloat16 need not
    hold it in float32. Of several processes rank 0 does so alone; the others return theirs as it trained. A folder that
    holds a model is left as it is. All processes must call this. Raises RuntimeError as `check_moved` and `merged` do.
    """
    device = model.device
    if recipe.tune.method == "qlora" or model.network.sharded:
        model = copied(recipe, model, processes) or model
    with processes.together():
        if processes.is_rank_0:
            model.network.cpu()
            model = _finished(recipe, model, card)
            if processes.count == 1:
                _move(model, device)
    return model


def _move(model: Embedder, device: torch.device) -> None:
    """Moves a finished model to the device where it trained. Where that lacks the room, the model stays on the CPU."""
    try:
        model.network.to(device)
    except torch.OutOfMemoryError:
        model.network.cpu()
        logger.warning("the model in float32 does not fit on %s beside what else is there: it is on the CPU", device)


def _finished(recipe: Recipe, model: Embedder, card: Card) -> Embedder:
    check_moved(model)
    folders = kept_forms(recipe)
    text = _save(recipe, model, folders["adapter"], card) if "adapter" in folders else None
    model = merged(model)
    if "merged" in folders:
        text = _save(recipe, model, folders["merged"], card)
    write_text(recipe.out / "README.md", text or card(model, "model"))
    return model


def _save(recipe: Recipe, model: Embedder, folder: Path, card: Card) -> str:
    """Saves one form, with its card, which it returns."""
    text = card(model, str(folder.relative_to(recipe.out)))
    if (folder / "adapter").is_dir() and not _is_model(folder):  # a stage kept it before `run.save` had `merged`
        with scratch_folder(folder) as scratch:
            model.save(scratch / "model", recipe.run.dtype)
            fill_folder(folder, scratch / "model")
    elif not _is_model(folder):
        model.save(folder, recipe.run.dtype)
    if not (folder / "README.md").exists():  # separately: a run that is killed between the two resumes here
        write_text(folder / "README.md", text)
    return text


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_adapter(folder)


def _types_in(folder: Path) -> set[str]:
    """Returns the floating-point types of the weights of a model or adapter, as `run.dtype` names them."""
    stored = tensors_of(folder / "adapter_model.safetensors") if is_adapter(folder) else weights_in(folder)
    return {_TYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in _TYPES}
