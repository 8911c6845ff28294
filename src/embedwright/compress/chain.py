"""The steps of `embedwright compress`, each from one model folder to the next. A chain that was stopped goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from embedwright.errors import InputError
from embedwright.files import check_new_folder, locked, put_folder, remove_leftovers, write_json, write_text
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import content_fingerprint, detect
from embedwright.model.formats.families import split_family
from embedwright.model.interop.card import Row, card_of, facts, inherited, markdown_table, model_card

ORIGINAL = "original"  # what a report calls the model that the chain begins with
_ASKED = "asked.json"

Say = Callable[[str], None]


class Step(NamedTuple):
    """One step: its name, what the user asked of it (plain JSON), and the function that does it.

    `make(source, out)` opens the model of the folder `source` and writes a new model into the folder `out`, whole or
    not at all.
    """

    name: str
    asked: Mapping[str, Any]
    make: Callable[[str, Path], None]


def save_step(model: Embedder, source: str, out: Path, step: str, **did: str | float) -> None:
    """Saves the model that a step made of `source`, with what the step did at the end of the model's history."""
    config: Any = model.network.config
    config.history = with_step(config.history, source, step, did)
    model.save(out)


def with_step(history: Sequence[Row] | None, source: str, step: str, did: Row) -> list[Row]:
    """Returns a history with one more step. The first step names the model that it began with."""
    if not history:
        place = Path(split_family(source)[1]).expanduser()
        did = {"of": place.resolve().name if place.exists() else source, **did}
    return [*(history or []), {"step": step, **did}]


@contextmanager
def chained(model: str, out: Path, steps: Sequence[Step], say: Say) -> Iterator[dict[str, str]]:
    """Makes the model of each step, and yields the folders of all models by name, the original first.

    They lie in `<out>.steps`. A step whose folder is there is done, so a chain that was stopped goes on. After the
    block the last one is `out`, and the others are removed. If nothing of the first step is done when the block ends
    with an error, no folder is left. The adapters of a model are merged before the first step.
    Raises InputError if `<out>.steps` has steps of another model, or others than these.
    """
    out = check_new_folder(out)
    work = out.with_name(f"{out.name}.steps")
    if detect(model)[1] == "adapter":
        steps = [Step("merged", {}, _merge), *steps]
    with locked(work.with_suffix(".lock")):
        _claim(work, content_fingerprint(model), [[step.name, dict(step.asked)] for step in steps])
        models = {ORIGINAL: model}
        source = model
        for number, step in enumerate(steps, start=1):
            folder = work / f"{number}-{step.name}"
            if not folder.is_dir():
                say(f"[{number}/{len(steps)}] {step.name}")
                with _emptied(work):
                    step.make(source, folder)
            models[step.name] = source = str(folder)
        if "merged" in models:  # with all of its weights on disk, it is what the others are compared with
            models[ORIGINAL] = models.pop("merged")
        yield models
        file = work / _ASKED
        write_json(file, json.loads(file.read_text(encoding="utf-8")) | {"done": True})
        put_folder(Path(source), out)
        _remove(work)


def finished(model: str, out: Path, steps: Sequence[Step]) -> bool:
    """Returns whether these steps made `out` and their run was stopped while it removed them. Removes what is left."""
    place = out.resolve()
    work = place.with_name(f"{place.name}.steps")
    with locked(work.with_suffix(".lock")):
        file = work / _ASKED
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if not before.get("done") or (work / f"{len(before['steps'])}-{before['steps'][-1][0]}").is_dir():
            return False
        _remove(work)
    asked = [[step.name, dict(step.asked)] for step in steps]
    same = (before["model"], before["steps"][-len(asked) :]) == (content_fingerprint(model), asked)
    return same and place.is_dir()


def write_card(folder: Path, name: str, model: str, rows: Sequence[Row] = (), decoder: str | None = None) -> None:
    """Opens the last model, which proves it, and writes its card, which calls it `name`; `rows` are its scores.

    Licence, base, data and training stay those of the card of `model`, which the chain began with. A `decoder` that
    became the student has its own, and is named as the base. A static student, which only sentence-transformers opens,
    keeps the card that it has, and the rest is added.
    """
    file = folder / "README.md"
    if detect(str(folder))[1] is not None:
        opened = Embedder.load(folder)
        known = facts(opened.network, opened.text_tokenizer)
        if decoder is not None and not Path(decoder).exists():
            known["base"] = decoder
        card = model_card(name, scores=rows, **known)
    else:
        card = file.read_text(encoding="utf-8") + (f"\n## Scores\n\n{markdown_table(rows)}\n" if rows else "")
    if decoder is None:
        card = inherited(card, [card_of(model)])
    write_text(file, card)


def _remove(work: Path) -> None:
    """Removes the folder of the steps. What was asked for goes last: it tells the next call if this one is stopped."""
    for folder in filter(Path.is_dir, work.iterdir()):
        shutil.rmtree(folder)
    shutil.rmtree(work)


@contextmanager
def _emptied(work: Path) -> Iterator[None]:
    """Removes the folder of the steps if the block fails and nothing is in it that a call could go on with."""
    try:
        yield
    except BaseException:
        if [file.name for file in work.iterdir()] == [_ASKED]:
            shutil.rmtree(work)
        raise


def _merge(source: str, out: Path) -> None:
    save_step(Embedder.load(source).merge(), source, out, "merged")


def _claim(work: Path, model: str, steps: list[list[Any]]) -> None:
    """Makes the folder of the steps. One that is there is taken over if the steps done in it are asked for again."""
    file = work / _ASKED
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        done = sum((work / f"{number}-{name}").is_dir() for number, (name, _) in enumerate(before["steps"], start=1))
        if done and (before["model"], before["steps"][:done]) != (model, steps[:done]):
            raise InputError(f"{work} holds steps of another model, or other steps: remove it, or choose another OUT")
    else:
        check_new_folder(work)
    write_json(file, {"model": model, "steps": steps})
    remove_leftovers(work)
