"""The files of recipes/ablations/: all of their recipes are valid, and each arm differs in what it is named for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suite_files import Words, write_set

from embedwright.config import load_yaml
from embedwright.evaluation.suite import evaluate
from embedwright.studies.ablate.file import Study, with_overrides
from embedwright.training.recipe import Recipe, leaves
from embedwright.training.run.start import tokenizer_and_contract

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "ablations"
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}

CAUSAL, POOLING, TOKENS = "model.attention", "model.pooling", "model.mask_rule"
# the pooling block, which is new in both, keeps its rate: ten times the ratio at a tenth of the rate
FULL = {"tune.method", "tune.pooling_lr_ratio", "stages.retrieval.optim.lr", "stages.generalist.optim.lr"}
FIRST_OBJECTIVE = {f"stages.generalist.{key}" for key in ("hard_negatives", "temperature", "optim.batch_queries")}
TOPICS = "stages.generalist.data.1"
RULE, TEACHER = "stages.retrieval.mine.rule", "stages.retrieval.mine.teacher"
NEW_SETS = ("hover", "nfcorpus", "scifact", "miracl", "mrtydi")

POOLINGS = {
    "mean": {POOLING, TOKENS},
    "mlp": {POOLING},
    "mean-causal": {POOLING, CAUSAL, TOKENS},
    "last-causal": {POOLING, CAUSAL, TOKENS},
}

# What differs from the baseline in each arm of each file. A key stands for all keys below it.
EXPECTED: dict[str, dict[str, set[str]]] = {
    "pooling": POOLINGS,
    "pooling-controls": {
        **POOLINGS,
        "latent-frozen": {"tune.freeze"},
        "last": {POOLING, TOKENS},
        "latent-causal": {CAUSAL},
        "self": {POOLING},
        "self-causal": {POOLING, CAUSAL},
    },
    "stages": {
        "one-in-batch": {"order", "stages.retrieval", "stages.generalist.in_batch_negatives"},
        "one": {"order", "stages.retrieval"},
        "reversed": {"order"},
        "homogeneous": {"stages.retrieval.batching", "stages.generalist.batching"},
    },
    "second-stage": {
        "continued": {TOPICS, "stages.generalist.in_batch_negatives", *FIRST_OBJECTIVE},
        "in-batch-off": {TOPICS, *FIRST_OBJECTIVE},
        "blend": {"stages.generalist.in_batch_negatives", *FIRST_OBJECTIVE},
        "seven-negatives": {"stages.generalist.hard_negatives"},
        "rate-third": {"stages.generalist.optim.lr"},
        "rate-tenth": {"stages.generalist.optim.lr"},
        "clinc150": {f"{TOPICS}.path", f"{TOPICS}.task"},
        "same-task": {"stages.generalist.in_batch_negatives"},
    },
    "mining": {
        "naive": {RULE},
        "random": {RULE, TEACHER},
        "bm25": {TEACHER},
        "shift": {RULE},
        "abs": {RULE},
        "margin": {RULE},
    },
    "labels": {"labels": {f"stages.generalist.data.{n}.{key}" for n in (5, 6) for key in ("path", "task.symmetric")}},
    "lora-full": {"full": FULL},
    "depth": {f"lora-{n}": {"model.layers"} for n in (8, 12, 22, 30)}
    | {f"full-{n}": FULL | {"model.layers"} for n in (8, 12, 22, 30)}
    | {"full-16": FULL},
    "s2": {"s2": {f"stages.{s}.data.{n}.weight" for s in ("retrieval", "generalist") for n in range(12, 17)}},
    "s3": {"s3": {f"stages.{s}.data.{n}.weight" for s in ("retrieval", "generalist") for n in (17, 18)}},
}


def values(recipe: Recipe) -> dict[str, Any]:
    """All that an arm decides, by dotted key; stages by their names."""
    content = recipe.model_dump(mode="json", exclude={"name", "seed", "run"})
    stages = {stage.pop("name"): stage for stage in content["stages"]}
    return dict(leaves(content | {"stages": stages, "order": ",".join(stages)}))


def test_every_arm_has_its_difference_written_here() -> None:
    arms = {name: Study(file).said for name, file in FILES.items()}
    assert {name: {*said.arms} - {said.baseline} for name, said in arms.items()} == {
        name: {*expected} for name, expected in EXPECTED.items()
    }


@pytest.mark.parametrize(("file", "arm"), [(file, arm) for file, arms in EXPECTED.items() for arm in arms])
def test_an_arm_differs_from_the_baseline_in_what_it_is_named_for(file: str, arm: str) -> None:
    study = Study(FILES[file])
    base, own = (values(study.recipe(name, 1)) for name in (study.said.baseline, arm))
    changed = {key for key in base | own if base.get(key) != own.get(key)}
    below = {key: {place for place in changed if f"{place}.".startswith(f"{key}.")} for key in EXPECTED[file][arm]}
    assert all(below.values()), "an arm that does not change what it is named for"
    assert changed == set().union(*below.values()), "an arm that changes more than it is named for"


def test_an_override_of_one_stage_leaves_another_alone_where_the_base_writes_both_once() -> None:
    base = load_yaml(FOLDER / "base" / "cell.yaml")
    before = Recipe.parse(base)
    after = Recipe.parse(with_overrides(base, {"stages.generalist.data.0.weight": 5}))
    assert after.stages[1].data[0].weight == 5 and after.stages[0] == before.stages[0]


def test_the_controls_of_pooling_have_its_cells() -> None:
    """So that these are not run again: equal but for the arms that come after them, and what these need."""
    first, whole = (Study(FILES[name]).said.model_dump() for name in ("pooling", "pooling-controls"))
    assert list(whole["arms"])[:5] == list(first["arms"]) and whole["arms"] | first["arms"] == whole["arms"]
    assert set(first["pairs"]) < set(whole["pairs"]) and len(whole["arms"]) == 10
    for key in first.keys() - {"arms", "pairs", "paper", "smoke", "run_on"}:
        assert first[key] == whole[key], key


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("s2", "s3")])  # their decoder is a download
def test_all_arms_read_the_same_tokens(name: str) -> None:
    """`latent` and `mean` do not by themselves: template and pool mask would differ as well."""
    study = Study(FILES[name])
    assert len({tokenizer_and_contract(study.recipe(arm, 1).model)[1] for arm in study.said.arms}) == 1


@pytest.mark.parametrize("arm", [arm for arm in EXPECTED["depth"] if arm.startswith("full")])
def test_the_pooling_block_trains_at_one_rate_in_lora_and_full(arm: str) -> None:
    study = Study(FILES["depth"])
    for ours, theirs in zip(study.recipe("lora-16", 1).stages, study.recipe(arm, 1).stages, strict=True):
        ratios = [study.recipe(name, 1).tune.pooling_lr_ratio for name in ("lora-16", arm)]
        assert ours.optim.lr * ratios[0] == pytest.approx(theirs.optim.lr * ratios[1])


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_the_size_of_its_cells(file: str) -> None:
    study = Study(FILES[file])
    said = study.said
    for arm in said.arms:
        for stage in study.recipe(arm, 1).stages:
            assert all(entry.path.startswith(("runs/ablation-data/", "data/nv-embed-v2/")) for entry in stage.data)
    if said.run_on in (None, "1 GPU"):
        recipe = study.recipe(said.baseline, 1)
        assert (recipe.model.layers, recipe.model.max_tokens) == (8 if file == "second-stage" else 16, 256)
        assert said.suite == "dev-mini" or file == "second-stage"
    else:
        assert said.run_on == "8 GPUs" and said.benchmark == "MTEB(eng, v1)"
    for arm in said.smoke.arms:
        tiny = study.recipe(arm, 1, smoke=True)
        assert tiny.model.layers and tiny.model.layers <= 3 and all(stage.optim.steps == 2 for stage in tiny.stages)
    assert len(said.smoke.arms) == 1 and Path(study.suite(smoke=True)) == FOLDER / "base" / "smoke-suite.yaml"


def test_numbers_of_data_mean_the_sets_that_they_are_meant_for() -> None:
    for file, names in (("s2", NEW_SETS), ("s3", ())):
        study = Study(FILES[file])
        for stage in study.recipe(study.said.baseline, 1).stages:
            rare = [Path(entry.path).stem for entry in stage.data if entry.weight < 1]
            assert rare == [*names, "synthetic", "synthetic_short"]  # neither arm below S3 has synthetic examples
    before, after = (Study(FILES["labels"]).recipe(arm, 1).stages[1].data for arm in ("examples", "labels"))
    changed = {entry.path: other.path for entry, other in zip(before, after, strict=True) if entry != other}
    data = "runs/ablation-data/data"
    assert changed == {f"{data}/{name}.parquet": f"{data}/{name}-label.parquet" for name in ("clinc150", "newsgroups")}


def test_within_a_library_a_query_has_the_documents_of_its_library_alone(tmp_path: Path) -> None:
    """Against the same questions asked of each library as a corpus of its own."""
    random = np.random.default_rng(0)

    def text() -> str:
        return " ".join(random.choice(["tide", "moon", "array", "graph", "axis", "node"], 5))

    ids = [f"{library}.part{i % 3}:f{i}" for i in range(8) for library in ("numpy", "numpyro", "torch")]
    corpus = {id_: f"{text()} {i}" for i, id_ in enumerate([*ids, "torch:load"])}
    queries = {id_: text() for id_ in [*ids[:12], "torch:load"]}

    def write(name: str, kept: str) -> float:
        some, own = ({i: t for i, t in texts.items() if i.startswith(kept)} for texts in (queries, corpus))
        write_set(tmp_path / name / "retrieval", some, own, {i: {i: 1} for i in some})
        tasks = [{"name": "docs", "kind": "retrieval", "path": "retrieval", "instruction": "Find"}]
        (tmp_path / name / "suite.yaml").write_text(json.dumps({"name": name, "tasks": tasks}))
        return len(some) * evaluate(Words(), tmp_path / name / "suite.yaml").rows[0].value

    write("all", "")
    subprocess.run([sys.executable, str(FOLDER / "within_library.py"), str(tmp_path / "all")], check=True)
    whole, within = evaluate(Words(), tmp_path / "all" / "second-stage.yaml").rows
    alone = sum(write(name, begin) for name, begin in (("a", "numpy."), ("b", "numpyro."), ("c", "torch")))
    assert (whole.task, within.task, within.metric) == ("docs", "docs-within-library", "nDCG@10")
    assert within.value == pytest.approx(alone / len(queries), abs=1e-9) and within.value > whole.value


def test_git_keeps_of_a_study_what_it_needs_to_be_shown_and_to_go_on() -> None:
    """The files that `test_a_study_goes_on_elsewhere_from_its_results_alone` copies, and nothing else of a cell."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    cell, kept = "docs/results/ablations/pooling/latent/seed-1", ("result.json", "scores.json", "scores.items.npz")
    files = [f"docs/results/ablations/pooling/{name}.json" for name in ("study", "budget")]
    others = [
        f"{cell}/{name}" for name in ("cell.json", "log.txt", "metrics.jsonl", "recipe.yaml", "checkpoints/1/x.pt")
    ]
    asked = [*files, *(f"{cell}/{name}" for name in kept), *others]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *asked], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == others, done.stderr


@pytest.mark.long
def test_the_data_is_made_and_a_cell_of_each_file_runs(tmp_path: Path) -> None:
    """As `make ablate-smoke` does it."""
    if not os.environ.get("EMBEDWRIGHT_DATA"):
        pytest.skip("EMBEDWRIGHT_DATA is not set")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "embedwright"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m embedwright "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {**os.environ, "PATH": path, "ROWS": "60", "DOCS": "200"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    run(str(FOLDER / "data.sh"))
    for name, file in FILES.items():
        assert "its scores mean nothing" in run("embedwright", "ablate", str(file), "--smoke", "--out", "out"), name
