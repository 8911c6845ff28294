"""Every key of a recipe acts: another value changes rows, loss, weights or output of a tiny run.

Keys are read from the recipe's own fields, so that a new one without an entry here fails.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from embedwright.config import ConfigError
from embedwright.evaluation.results import Result, Results
from embedwright.evaluation.suite import Suite
from embedwright.model.embedder import Embedder
from embedwright.model.verify import probe
from embedwright.training.recipe import Recipe
from embedwright.training.run import checks, folder
from embedwright.training.run import scores as judge
from embedwright.training.run.checkpoint import read_state
from embedwright.training.train import train

TESTS = Path(__file__).parents[2]
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text after it"]


def keys(part: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key below a part by its dotted name; lists of parts count as one part."""
    for name, field in part.model_fields.items():
        here = f"{path}{field.alias or name}"
        inner = {key for model in parts_in(field.annotation) for key in keys(model, f"{here}.")}
        yield from inner
        if not inner or here.endswith(".task"):  # which may be a bare name too
            yield here


def parts_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inside in typing.get_args(annotation) for part in parts_in(inside)]


# ---- what changes

MINED = {"stages.mine": {"teacher": "previous", "negatives": 3, "depth": 20}, "stages.optim.steps": 4}
SCORES = {"stages.loss": {"distill": {"score_weight": 1.0, "temperature": 0.1}}}
VECTORS = {"stages.loss": {"distill": {"vector_weight": 1.0, "teacher": "{embedder}"}}}
MASKED = {
    "stages": {
        "name": "masked",
        "kind": "mntp",
        "text": [{"path": "{corpus}"}],
        "mask_token": "_",
        "heldout": 2,
        "optim": {"lr": 3e-2, "steps": 2, "batch_queries": 6},
    }
}
JUDGED = {"eval": {"suites": ["falling"], "every": 1}, "stages.optim.steps": 4}
TASK = {"name": "pairs", "instruction": "Find its answer"}
WITH_TASK = {"stages.data.0.task": TASK}

# key -> (where it must show, its other value, what else both runs have)
CHANGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "name": ("card", "another", {}),
    "seed": ("rows", 8, {}),
    "strict": ("error", True, {}),
    "model.base": ("loss", "{other_decoder}", {}),
    "model.from": ("loss", "{embedder}", {}),
    "model.layers": ("loss", 2, {}),
    "model.attention": ("loss", "causal", {}),
    "model.pooling": ("weights", "mean", {}),
    "model.latents": ("weights", 5, {}),
    "model.heads": ("weights", 4, {}),
    "model.head_dim": ("weights", 8, {}),
    "model.multiple": ("weights", 2, {}),
    "model.max_tokens": ("loss", 20, {}),
    "model.pool_prompt": ("loss", True, WITH_TASK),
    "model.mask_rule": ("loss", "boundary", WITH_TASK),
    "model.default_task": ("loss", "Find its answer", {}),
    "tune.method": ("weights", "full", {}),
    "tune.rank": ("weights", 3, {}),
    "tune.alpha": ("weights", 7, {}),
    "tune.adapters": ("weights", "continue", {"model.from": "{adapted}"}),
    "tune.dropout": ("weights", 0.5, {}),
    "tune.pooling_lr_ratio": ("weights", 0.1, {}),
    "tune.freeze": ("weights", ["latents"], {}),
    "stages.name": ("rows", "another", {}),
    "stages.data.path": ("rows", "{few}", {}),
    "stages.data.corpus": ("loss", "{other_corpus}", {"stages.data": [{"path": "{ids}", "corpus": "{corpus}"}]}),
    "stages.data.weight": ("rows", 9.0, {}),
    "stages.data.task": ("rows", "bare", {}),
    "stages.data.task.name": ("rows", "others", WITH_TASK),
    "stages.data.task.family": ("error", "pair", {**MINED, "stages.data": [{"path": "{pairs}", "task": TASK}]}),
    "stages.data.task.instruction": ("loss", "Find another", WITH_TASK),
    "stages.data.task.symmetric": ("loss", True, WITH_TASK),
    "stages.data.task.in_batch_negatives": ("loss", "none", WITH_TASK),
    "stages.data.task.licence": ("card", "MIT", WITH_TASK),
    "stages.data.task.source": ("card", "somebody/set", WITH_TASK),
    "stages.in_batch_negatives": ("loss", "none", {}),
    "stages.hard_negatives": ("loss", 2, {}),
    "stages.batching": ("rows", "homogeneous", {}),
    "stages.temperature": ("loss", 0.5, {}),
    "stages.without_instruction": ("loss", 0.7, WITH_TASK),
    "stages.sampling_alpha": ("rows", 0.0, {}),
    "stages.loss.mask_above": ("loss", -0.01, {}),
    "stages.loss.hardness": ("loss", 5.0, {}),
    "stages.loss.focal": ("loss", 1.0, {}),
    "stages.loss.same_tower": ("loss", "both", {}),
    "stages.loss.spread_out": ("loss", 0.5, {}),
    "stages.loss.dims": ("loss", [8], {}),
    "stages.loss.scored": ("loss", "cosent", {"stages.data": [{"path": "{scored}"}]}),
    "stages.loss.distill.score_weight": ("loss", 2.0, SCORES),
    "stages.loss.distill.temperature": ("loss", 1.0, SCORES),
    "stages.loss.distill.vector_weight": ("loss", 2.0, VECTORS),
    "stages.loss.distill.similarity_weight": ("loss", 2.0, VECTORS),
    "stages.loss.distill.teacher": ("loss", ["{embedder}", "{other_embedder}"], VECTORS),
    "stages.mine.teacher": ("loss", "{other_embedder}", MINED),
    "stages.mine.rule": ("loss", "naive", MINED),
    "stages.mine.margin": ("loss", 0.6, MINED),
    "stages.mine.negatives": ("loss", 1, MINED),
    "stages.mine.depth": ("loss", 4, MINED),
    "stages.mine.sampled": ("loss", True, MINED),
    "stages.mine.sample_from": ("loss", 1, MINED | {"stages.mine.sampled": True, "stages.mine.negatives": 1}),
    "stages.mine.every": ("loss", 2, MINED),
    "stages.kind": ("error", "mine", MASKED),
    "stages.text.path": ("loss", "{other_corpus}", MASKED),
    "stages.text.licence": ("card", "MIT", MASKED),
    "stages.mask_token": ("loss", "e", MASKED),
    "stages.mask_share": ("loss", 0.5, MASKED),
    "stages.heldout": ("rows", 5, MASKED),
    "stages.save": ("files", True, {}),
    "stages.optim.lr": ("weights", 1e-3, {}),
    "stages.optim.steps": ("rows", 3, {}),
    "stages.optim.batch_queries": ("rows", 5, {}),
    "stages.optim.warmup_steps": ("weights", 1, {}),
    "stages.optim.clip": ("weights", 1e-9, {}),
    "stages.optim.weight_decay": ("weights", 0.9, {}),
    "stages.optim.betas": ("weights", [0.5, 0.9], {}),
    "stages.optim.eps": ("weights", 1e-2, {}),
    "stages.optim.schedule": ("weights", "cosine", {"stages.optim.steps": 3}),
    "run.out": ("place", "{elsewhere}", {}),
    "run.checkpoint_every": ("files", 1, {}),
    "run.keep": ("files", 1, {"run.checkpoint_every": 1}),
    "run.precision": ("loss", "bf16", {}),
    "run.batch_tokens": ("weights", 20, {}),  # other dropout masks
    "run.tracker": ("files", ["tensorboard"], {}),
    "run.save": ("files", ["adapter", "merged"], {}),
    "run.dtype": ("saved", "bfloat16", {}),
    "eval.suites": ("files", ["falling"], {}),
    "eval.every": ("files", 2, JUDGED),
    "eval.best": ("weights", True, JUDGED),
    "eval.patience": ("rows", 1, JUDGED),
}

# key -> (why it changes nothing in such a run, the test of what it does)
EXCEPTIONS = {
    "provenance": ("printed by --plan", "unit/training/test_plan.py::test_provenance_is_printed_with_the_values"),
    "stages.data.rows": ("for --plan, where the file is absent", "unit/training/test_plan.py::test_rows_are_counted"),
    "tune.gradient_checkpointing": ("less memory", "unit/training/test_train.py::test_gradient_checkpointing_gives"),
    "run.workers": ("less waiting", "unit/training/test_train.py::test_the_order_of_rows_is_the_same_from_any_step"),
    "run.timeout_minutes": ("for many processes", "unit/training/engine/test_parallel.py::test_a_group_has_the_time"),
    "run.parallel": ("for many processes", "unit/training/engine/test_parallel.py::test_"),
}


def test_every_key_has_an_entry() -> None:
    known = set(keys(Recipe))
    assert known == CHANGES.keys() | EXCEPTIONS.keys() and not CHANGES.keys() & EXCEPTIONS.keys()
    assert len(EXCEPTIONS) <= 10
    for reason, place in EXCEPTIONS.values():
        file, _, test = place.partition("::")
        assert reason and re.search(rf"^def {test}", (TESTS / file).read_text(), re.MULTILINE), place


# ---- runs


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path], tiny_embedder: Callable[..., Embedder]
) -> dict[str, str]:
    at = tmp_path_factory.mktemp("every-key")
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox", "lazy", "quick"]

    def text(about: str) -> str:
        return " ".join([about, *random.choice(words, random.integers(2, 9))])

    def row(i: int) -> dict[str, Any]:
        made = {"query": text(f"q{i}"), "positives": [text(f"p{i}")], "negatives": [text(f"n{i}{k}") for k in range(3)]}
        return made | {"positive_scores": [0.9], "negative_scores": random.random(3).tolist()}

    ids = [{"query": text(f"q{i}"), "positives": [{"id": f"d{i}"}]} for i in range(12)]
    tiny_embedder("mean", seed=3).save(at / "embedder")
    tiny_embedder("mean", "qwen3").save(at / "other")
    adapted = tiny_embedder("mean", seed=3).add_lora(2, 4)
    for name, parameter in adapted.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    adapted.save(at / "adapted")
    return {
        "adapted": str(at / "adapted"),
        "decoder": str(tiny_decoder("llama")),
        "other_decoder": str(tiny_decoder("qwen3")),
        "embedder": str(at / "embedder"),
        "other_embedder": str(at / "other"),
        "pairs": write(at / "pairs.jsonl", [row(i) for i in range(24)]),
        "more": write(at / "more.jsonl", [row(i) for i in range(40, 46)]),
        "few": write(at / "few.jsonl", [row(i) for i in range(60, 70)]),
        "scored": write(at / "scored.jsonl", [row(i) | {"score": i % 4} for i in range(12)]),
        "ids": write(at / "ids.jsonl", [entry | {"negatives": [text("n")]} for entry in ids]),
        "corpus": write(at / "corpus.jsonl", [{"_id": f"d{i}", "text": text("c")} for i in range(12)]),
        "other_corpus": write(at / "other.jsonl", [{"_id": f"d{i}", "text": text("o")} for i in range(12)]),
        "elsewhere": str(at / "elsewhere" / "out"),
    }


BASE: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "model": {"base": "{decoder}", "layers": 1, "latents": 4, "heads": 2, "multiple": 1, "max_tokens": 40},
    "tune": {"rank": 2, "alpha": 4, "dropout": 0.1},
    "stages": {
        "name": "first",
        "data": [{"path": "{pairs}"}, {"path": "{more}"}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "temperature": 0.1,
        "optim": {"lr": 3e-2, "steps": 2, "batch_queries": 6},
    },
    "run": {"tracker": "none", "workers": 0},
}


def put(tree: Any, key: str, value: Any) -> None:
    """Set a dotted key; a list on the way is entered at its first element, unless a number says where."""
    *above, last = key.split(".")
    for part in above:
        tree = tree[int(part)] if isinstance(tree, list) and part.isdigit() else first(tree).setdefault(part, {})
    first(tree)[last] = value


def first(tree: Any) -> Any:
    return tree[0] if isinstance(tree, list) else tree


def described(more: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    tree = copy.deepcopy(BASE)
    for key, value in more.items():
        if key == "model.from":
            tree["model"] = {"from": value}
        else:
            put(tree, key, copy.deepcopy(value))
    tree["stages"] = [tree["stages"]]
    text = json.dumps(tree)
    for name, place in places.items():
        text = text.replace(f"{{{name}}}", place)
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def files_of(out: Path) -> list[tuple[str, str]]:
    """Names, and what evaluations say; TensorBoard's own files are called after the time."""
    named = (file for file in sorted(out.rglob("*")) if "tfevents" not in file.name)
    return [
        (str(file.relative_to(out)), file.read_text() if file.name == "evaluations.jsonl" else "") for file in named
    ]


def compared(out: Path, tree: dict[str, Any], places: dict[str, str]) -> set[str]:
    """The models whose content a run compares between its processes, and with its checkpoints."""
    [*_, newest] = sorted((out / "checkpoints").iterdir())
    facts = read_state(newest).facts
    trained = tree["model"].get("from") or tree["model"]["base"]
    assert facts["model"]["files"]
    return {trained, *facts["teacher"], *([places["decoder"]] if trained == places["adapted"] else [])}


@pytest.fixture(scope="module")
def outcome(
    places: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, Any]]]:
    """`outcome(changes)`: all that a run leaves, by where a change may show. Equal runs are made once."""

    def falling(model: Any, suite: Suite, progress: Any = None) -> Results:
        scores.append(1 / (1 + len(scores)))
        return Results(suite.name, (Result("t", "sts", "spearman", scores[-1]),), 0.0)

    scores: list[float] = []
    opened = set[str]()

    def look(event: str, given: Any) -> None:
        if event == "open" and str(given[0]).endswith("config.json"):
            opened.add(str(Path(given[0]).parent))

    @cache
    def run(said: str) -> dict[str, Any]:
        tree = described(json.loads(said), places)
        out = Path(tree["run"].setdefault("out", str(tmp_path_factory.mktemp("run"))))
        scores.clear()
        opened.clear()
        records: list[dict[str, Any]] = []
        try:
            model = train(Recipe.parse(tree), on_step=records.append)
        except ConfigError as error:
            return {"error": str(error)}
        return {
            "rows": [(record["step"], record["ids"]) for record in records],
            "loss": [record["loss"] for record in records],
            "weights": model.encode(TEXTS, task="Find its answer").tobytes(),
            "files": files_of(out),
            "saved": [file.stat().st_size for file in sorted(out.glob("model/*.safetensors"))],
            "place": str(out),
            "models": opened & {*places.values()} - compared(out, tree, places),
            "card": (out / "README.md").read_text(),
            "error": "",
        }

    with pytest.MonkeyPatch.context() as patch:  # what takes time and changes nothing
        patch.setattr(folder, "_commit", lambda root: None)
        patch.setattr(probe, "check", lambda network: None)
        patch.setattr(judge, "run_suite", falling)
        patch.setattr(checks, "load_suite", lambda name: Suite.model_construct(name=str(name), tasks=()))
        sys.addaudithook(look)  # there is no way to remove it
        yield lambda changes: run(json.dumps(changes))


@pytest.mark.parametrize("key", CHANGES)
def test_another_value_of_a_key_shows(key: str, outcome: Callable[..., dict[str, Any]]) -> None:
    where, value, both = CHANGES[key]
    plain, changed = outcome(both), outcome({**both, key: value})
    assert plain["error"] == "", "the run that is compared with"
    assert changed["error"] if where == "error" else not changed["error"]
    if where != "error":
        assert changed[where] != plain[where]
        assert changed["models"] == set(), "models that the processes of a run do not compare (train.py)"


def test_a_run_is_the_same_again(outcome: Callable[..., dict[str, Any]], places: dict[str, str]) -> None:
    """Else nothing above would say anything."""
    plain = outcome({})
    again = outcome({"strict": False})  # the default
    assert plain is not again and {**plain, "place": ""} == {**again, "place": ""}
