"""Trains by a recipe inside a chain of steps: heals a pruned model, which may follow the model from before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from embedwright.compress.chain import Step, save_step
from embedwright.errors import InputError
from embedwright.files import sha256_of
from embedwright.locate import find
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import history_of
from embedwright.model.formats.families import split_family
from embedwright.training.recipe import Recipe, read_recipe
from embedwright.training.train import OnEvaluation, OnStep, train

Listen = Callable[[Recipe], OnStep]


def filled(
    recipe: str | Path, source: str, teacher: str, out: Path, decoder: Mapping[str, Any] | None = None
) -> Recipe:
    """Reads a recipe and fills in `model: {from: source}` and `run.out`, whatever it says of these.

    Where its `model` is an embedder too, its `max_tokens` and `default_task` stay. With `decoder`, the part `model`
    that makes an embedder of one, the recipe's other keys of `model` stay. A stage whose `loss.distill` follows vectors
    or similarities and names no teacher follows `teacher`. The model is saved whole, in the type that it is stored in
    unless the recipe says another. Raises ConfigError for a mistake.
    """
    content = read_recipe(recipe)
    own, run = (part if isinstance(part := content.get(key), dict) else {} for key in ("model", "run"))
    if decoder is None:
        kept = {key: own[key] for key in ("max_tokens", "default_task") if own.get("from") and key in own}
        content["model"] = {"from": source} | kept
    else:
        content["model"] = {**decoder, **{key: own[key] for key in own.keys() - {"base", "from"}}}
    content["run"] = {**run, "out": str(out), "save": "merged"}
    content.pop("provenance", None)  # of the values that were replaced, too
    for stage in content["stages"] if isinstance(content.get("stages"), list) else ():
        loss = stage.get("loss") if isinstance(stage, dict) else None
        distill = loss.get("distill") if isinstance(loss, dict) else None
        if isinstance(distill, dict) and (distill.get("vector_weight") or distill.get("similarity_weight")):
            distill["teacher"] = distill.get("teacher") or teacher
    plan = Recipe.parse(content, str(recipe))
    if plan.tune.adapters == "continue":
        raise InputError(f"{recipe}: tune.adapters: a pruned model has none to continue: leave it out")
    return plan


def heal_step(recipe: str | Path, teacher: str, listen: Listen, on_evaluation: OnEvaluation) -> Step:
    """Returns the step that trains by a recipe. `teacher` is the model from before the first step.

    Raises ConfigError for a mistake in the recipe, now.
    """
    asked = filled(recipe, teacher, teacher, Path("unset"))

    def make(source: str, out: Path) -> None:
        plan = filled(recipe, source, teacher, out.with_name(f"{out.name}.run"))
        save_step(train_and_load(plan, source, listen, on_evaluation), source, out, "heal", **training_facts(plan))

    return Step("heal", resume_facts(asked), make)


def resume_facts(plan: Recipe) -> dict[str, Any]:
    """Says what a step trains by: a done step is taken over only by a recipe that would train the same model.

    A recipe's hash leaves out the type of the weights and where the data lie, so both are here: data by their content.
    """
    entries = [entry for stage in plan.stages for entry in stage.data]
    named = [getattr(entry, key, None) for entry in entries for key in ("path", "corpus", "rows")]
    places = [Path(name) for name in named if isinstance(name, str | Path)]
    files = [file for place in places for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
    dtype = plan.run.dtype if "dtype" in plan.run.model_fields_set else None
    return {"recipe": plan.hash(), "dtype": dtype, "data": [sha256_of(file) for file in files]}


def train_and_load(plan: Recipe, source: str, listen: Listen, on_evaluation: OnEvaluation) -> Embedder:
    """Runs or resumes a recipe, and loads the model that it has saved, with the history of `source`."""
    if "dtype" not in plan.run.model_fields_set:
        stored = str(Embedder.load(source).network.backbone.dtype).removeprefix("torch.")
        plan = plan.model_copy(update={"run": plan.run.model_copy(update={"dtype": stored})})
    train(plan, on_step=listen(plan), on_evaluation=on_evaluation)
    model = Embedder.load(plan.out / "model")
    config: Any = model.network.config  # whose history says that it was trained, as this step does
    began = plan.model.from_
    config.history = None if began is None else history_of(find(split_family(began)[1]).path)
    return model


def training_facts(plan: Recipe) -> dict[str, Any]:
    """Says for the history what trained a model: its stages, teachers and data."""
    stages = [f"{stage.name} {stage.optim.steps} steps of {stage.optim.batch_queries}" for stage in plan.stages]
    data = [_data(entry) for stage in plan.stages for entry in stage.data]
    teachers = [Path(name).name for stage in plan.stages for name in stage.loss.teachers]
    facts = {"recipe": plan.name, "stages": ", ".join(stages), "teacher": ", ".join(dict.fromkeys(teachers))}
    return {key: said for key, said in facts.items() if said} | {"data": ", ".join(dict.fromkeys(data))}


def _data(entry: Any) -> str:
    """Names a file of data, with its licence where the recipe says it."""
    licence = getattr(getattr(entry, "task", None), "licence", "") or getattr(entry, "licence", "")
    return Path(entry.path).name + (f" ({licence})" if licence else "")
