from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trees import put

from embedwright.config import ConfigError
from embedwright.data.schema import Task
from embedwright.training.recipe import Recipe, expand
from embedwright.training.stages import DistillPart, LossPart

RECIPE = """
name: laptop
seed: 7
model: {base: smollm2-135m, layers: 12, pooling: latent, latents: 128, heads: 8, max_tokens: 128}
tune: {method: lora, rank: 8, alpha: 16, dropout: 0.1, pooling_lr_ratio: 2.0}
stages:
  - name: retrieval
    data:
      - {path: docs.jsonl, weight: 0.5}
      - path: more.jsonl
        task: {name: more, instruction: Find more, licence: MIT}
    in_batch_negatives: all
    hard_negatives: 1
    optim: {lr: 2e-5, warmup_steps: 20, steps: 300, batch_queries: 64}
  - name: generalist
    data: [{path: labels.jsonl, task: labels}]
    in_batch_negatives: none
    batching: homogeneous
    hard_negatives: 3
    temperature: 0.05
    optim: {lr: 1.5e-5, steps: 100, batch_queries: 32}
run: {out: runs/laptop, checkpoint_every: 50, keep: 3, precision: bf16, batch_tokens: 4096, tracker: none}
eval: {every: 100, suites: [dev]}
"""


def content() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(RECIPE))


def load(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return Recipe.load(file)


def test_a_recipe_loads(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE)
    first, second = recipe.stages
    assert (recipe.name, recipe.seed, recipe.strict) == ("laptop", 7, False)
    assert (recipe.model.layers, recipe.model.attention, recipe.tune.rank) == (12, "bidirectional", 8)
    assert first.data[0].task is None and first.data[0].weight == 0.5
    assert first.data[1].task == Task(name="more", instruction="Find more", licence="MIT")
    assert (first.batching, first.temperature, first.optim.clip) == ("blended", 0.02, 1.0)
    assert second.data[0].task == "labels" and second.batching == "homogeneous" and second.optim.warmup_steps == 0
    assert (recipe.run.out, recipe.run.keep, recipe.eval.suites) == ("runs/laptop", 3, ("dev",))
    assert recipe == Recipe.parse(content()) and recipe == Recipe.load(str(tmp_path / "recipe.yaml"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 8  # type: ignore[misc]


def test_a_float_without_a_dot_is_a_float(tmp_path: Path) -> None:
    assert content()["stages"][0]["optim"]["lr"] == "2e-5"  # what YAML makes of it
    assert load(tmp_path, RECIPE).stages[0].optim.lr == 2e-5


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("staegs", "stages"),
        ("model.poolin", "pooling"),
        ("tune.rnk", "rank"),
        ("stages.0.batch", "batching"),
        ("stages.1.optim.warmup", "warmup_steps"),
        ("stages.0.sampling_alfa", "sampling_alpha"),
        ("stages.0.loss.mask_over", "mask_above"),
        ("stages.0.loss.distill.techer", "teacher"),
        ("stages.0.data.0.wieght", "weight"),
        ("stages.0.data.1.task.instructions", "instruction"),
        ("run.check_point_every", "checkpoint_every"),
        ("eval.suite", "suites"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(path: str, nearest: str) -> None:
    tree = put(content(), "stages.0.loss", {"distill": {"score_weight": 1.0}})
    with pytest.raises(ConfigError) as error:
        Recipe.parse(put(tree, path, 1))
    *above, key = path.split(".")
    at = [line for line in str(error.value).splitlines() if f".{key}: " in line or f" {key}: " in line]
    assert len(at) == 1 and at[0].endswith(f"unknown key; did you mean {nearest!r}?")
    assert at[0].startswith(f"recipe: {'.'.join(above)}")


def test_an_unknown_key_like_no_other_comes_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"eval\.zzz: unknown key; known: \['best', 'every', 'patience', 'suites'\]"):
        Recipe.parse(put(content(), "eval.zzz", 1))


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (RECIPE + "seed: 8\n", 24, "seed"),
        (RECIPE.replace("seed: 7", "seed: 7\nseed: 7"), 4, "seed"),
        (RECIPE.replace("    hard_negatives: 3", "    hard_negatives: 3\n    name: other"), 20, "name"),
        (RECIPE.replace("rank: 8", "rank: 8, rank: 9"), 5, "rank"),
    ],
)
def test_a_key_written_twice_is_refused_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml: line {line}: key '{key}' appears twice"):
        load(tmp_path, text)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"seed: .*\n.*tune\.rank: .*\n.*stages\.1\.optim\.clip: "):
        Recipe.parse(put(put(put(content(), "seed", "x"), "tune.rank", 0), "stages.1.optim.clip", 0))


def test_off_is_refused_with_the_words_that_are_allowed(tmp_path: Path) -> None:
    """YAML 1.1 reads `off` and `no` as false."""
    for word in ("off", "no"):
        text = RECIPE.replace("in_batch_negatives: none", f"in_batch_negatives: {word}")
        with pytest.raises(ConfigError, match=r"stages\.1\.in_batch_negatives: .*'none', 'same_task' or 'all'"):
            load(tmp_path, text)


def test_the_stage_of_the_docs_has_every_key_of_a_loss() -> None:
    page = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
    (stage,) = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["stages"]
    given = content()["stages"][0]
    recipe = Recipe.parse(put(content(), "stages", [stage | {key: given[key] for key in ("data", "optim")}]))
    chosen = recipe.stages[0].loss
    assert set(stage["loss"]) == set(LossPart.model_fields) and set(stage["loss"]["distill"]) == set(
        DistillPart.model_fields
    )
    assert chosen.dims == (256, 64) and recipe.stages[0].sampling_alpha == 0.5


def mining(**change: Any) -> dict[str, Any]:
    """A recipe whose second of three stages mines for the third."""
    tree = content()
    tree["stages"].insert(1, {"kind": "mine", "every": 20} | change)
    return tree


def test_a_stage_that_mines_is_part_of_the_one_behind_it(tmp_path: Path) -> None:
    recipe = Recipe.parse(mining())
    assert [stage.name for stage in recipe.stages] == ["retrieval", "generalist"]
    first, second = recipe.stages
    assert first.mine is None and second.mine is not None
    assert (second.mine.teacher, second.mine.every, second.mine.rule) == ("previous", 20, "perc")
    assert Recipe.parse(put(content(), "stages.0.kind", "train")) == Recipe.parse(content())
    # as a run's folder has it
    assert load(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json"))).hash() == recipe.hash()
    hashes = {Recipe.parse(mining(**change)).hash() for change in ({}, {"every": None}, {"margin": 0.9})}
    assert len({*hashes, Recipe.parse(content()).hash()}) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"margn": 0.9}, r"recipe: stages\.1\.margn: unknown key; did you mean 'margin'\?"),
        ({"negatives": 2}, r"recipe: stages\.2: .*hard_negatives=3 of 2 that are mined"),
        ({"rule": "perc", "margin": 7}, r"recipe: stages\.1: .*the margin of rule 'perc' must be"),
        ({"teacher": "minilm"}, r"recipe: stages\.1: .*minilm does not change .* leave every out"),
        ({"sampled": True, "sample_from": 3}, r"recipe: stages\.1: .*sample_from 3 is too few"),
        ({"sample_from": 30}, r"recipe: stages\.1: .*sampled is off"),
        ({"kind": "mien"}, r"recipe: stages\.1\.kind: 'mien' is none of train, mine, mntp"),
    ],
)
def test_a_mistake_in_a_stage_that_mines_is_named_by_its_place(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Recipe.parse(mining(**change))


def test_a_mistake_behind_a_stage_that_mines_is_named_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"recipe: stages\.2\.optim\.stpes: unknown key; did you mean 'steps'"):
        Recipe.parse(put(mining(), "stages.2.optim.stpes", 3))


def test_a_stage_that_mines_for_nothing_is_refused() -> None:
    last = content()
    last["stages"].append({"kind": "mine"})
    with pytest.raises(ConfigError, match=r"stages\.2: mines negatives for the stage after it, but there is none"):
        Recipe.parse(last)
    twice = mining()
    twice["stages"].insert(1, {"kind": "mine"})
    with pytest.raises(ConfigError, match=r"stages\.2: negatives are mined for it by stages\.1 already"):
        Recipe.parse(twice)


def test_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="different names"):
        Recipe.parse(put(content(), "stages.1.name", "retrieval"))


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        Recipe.load(tmp_path / "absent.yaml")
    for text, says in (("- a list", "found list"), ("", "found NoneType"), ("a: [", "while parsing"), ("a: \x00", "")):
        with pytest.raises(ConfigError, match=rf"recipe\.yaml: .*{says}"):
            load(tmp_path, text)


# ---- hash


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict | list) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, tree


OTHER = {"lora": "full", "latent": "mean", "all": "same_task", "none": "all", "homogeneous": "blended", "bf16": "fp32"}
OTHER |= {"2e-5": "3e-5", "bidirectional": "causal", "ddp": "fsdp"}


def test_a_recipe_without_an_instruction_of_its_own_is_as_it_was() -> None:
    plain, null, told = (
        Recipe.parse(content() if task == "" else put(content(), "model.default_task", task))
        for task in ("", None, "Find it")
    )
    assert plain == null and plain.hash() == null.hash() != told.hash()
    assert "default_task" not in null.model_dump()["model"] and Recipe.parse(told.model_dump(mode="json")) == told
    assert "model.default_task" not in null.values_by_key()  # of which a provenance would have to speak
    with pytest.raises(ConfigError, match="default_task"):
        Recipe.parse(put(content(), "model.default_task", " "))


def test_the_hash_follows_all_that_decides_the_weights_and_nothing_else() -> None:
    tree = put(put(content(), "model.attention", "bidirectional"), "tune.gradient_checkpointing", False)
    tree["run"] |= {"workers": 1, "parallel": "ddp"}
    before = Recipe.parse(tree).hash()
    assert before == Recipe.parse(copy.deepcopy(tree)).hash() and len(bytes.fromhex(before)) == 8
    changed, same = set(), set()
    for path, value in leaves(tree):
        if value is False:
            new: Any = True
        elif isinstance(value, str):
            new = "tensorboard" if path == "run.tracker" else OTHER.get(value, f"{value}x")
        else:
            new = value / 2 if isinstance(value, float) else value + 1
        other = Recipe.parse(put(copy.deepcopy(tree), path, new))
        (same if other.hash() == before else changed).add(path)
    may_change = {"tracker", "checkpoint_every", "keep", "batch_tokens", "workers", "parallel", "out"}
    assert same == {
        "name",
        "model.base",
        "stages.0.data.0.path",
        "stages.0.data.1.path",
        "stages.1.data.0.path",
        "tune.gradient_checkpointing",
        "eval.every",
        "eval.suites.0",
        *(f"run.{key}" for key in may_change),
    }
    assert {"seed", "stages.0.optim.lr", "stages.0.data.0.weight", "run.precision", "stages.1.name"} <= changed


def test_keys_that_older_runs_lack_change_their_hash_only_by_another_value() -> None:
    before, optim = Recipe.parse(content()), "stages.0.optim"
    assert not {"betas", "eps", "schedule"} & before.decisive()["stages"][0]["optim"].keys()
    defaults = {"betas": [0.9, 0.999], "eps": 1e-8, "schedule": "linear"}
    others = {"betas": [0.9, 0.95], "eps": 1e-6, "schedule": "constant"}
    for key in defaults:
        assert Recipe.parse(put(content(), f"{optim}.{key}", defaults[key])).hash() == before.hash()
        assert Recipe.parse(put(content(), f"{optim}.{key}", others[key])).hash() != before.hash()
    said = dict.fromkeys(before.values_by_key(), "guess") | {"stages.retrieval.optim.betas": "paper: says so"}
    Recipe.parse(put(content(), "provenance", said))
    del said["stages.retrieval.optim.betas"], said["stages.retrieval.optim.eps"]
    Recipe.parse(put(content(), "provenance", said))  # of a recipe that is older than the keys
    with pytest.raises(ConfigError, match=r"says nothing of stages\.retrieval\.optim\.eps"):
        Recipe.parse(put(put(content(), f"{optim}.eps", 1e-6), "provenance", said))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("betas", [0.9, 1.0], "betas.1"), ("betas", [0.9], "betas"), ("eps", 0, "eps"), ("schedule", "step", "cosine")],
)
def test_bad_values_of_the_optimizer_are_named(key: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe.parse(put(content(), f"stages.0.optim.{key}", value))


def test_the_hash_takes_equal_numbers_as_equal(tmp_path: Path) -> None:
    same = load(tmp_path, RECIPE.replace("lr: 2e-5", "lr: 0.00002"))
    assert same.hash() == Recipe.parse(content()).hash()


def test_the_hash_follows_the_losses() -> None:
    plain = Recipe.parse(content())
    spelt = put(content(), "stages.0.loss", {"mask_above": None, "dims": [], "distill": None, "scored": "info_nce"})
    assert Recipe.parse(put(spelt, "stages.0.sampling_alpha", 1)).hash() == plain.hash()
    changes: list[tuple[str, Any]] = [
        ("sampling_alpha", 0.5),
        ("loss", {"mask_above": 0.1}),
        ("loss", {"mask_above": 0.2}),
        ("loss", {"dims": [64]}),
        ("loss", {"dims": [32]}),
        ("loss", {"scored": "cosent"}),
        ("loss", {"spread_out": 0.1}),
        ("without_instruction", 0.3),
        ("loss", {"distill": {"score_weight": 1.0}}),
        ("loss", {"distill": {"score_weight": 1.0, "temperature": 0.1}}),
    ]
    hashes = {Recipe.parse(put(content(), f"stages.{n}.{key}", value)).hash() for key, value in changes for n in (0, 1)}
    assert len(hashes | {plain.hash()}) == 2 * len(changes) + 1
    decisive = str(plain.decisive())  # keys that came after runs had begun: at their defaults no hash has them
    assert "without_instruction" not in decisive and "spread_out" not in decisive


def test_provenance_speaks_of_the_losses_that_are_chosen() -> None:
    plain = Recipe.parse(content()).values_by_key()
    assert not any("loss" in key or "alpha" in key.rpartition(".")[2] for key in plain if key.startswith("stages"))
    tree = put(content(), "stages.0.loss", {"mask_above": 0.1, "distill": {"score_weight": 1.0}})
    recipe = Recipe.parse(put(tree, "stages.1.sampling_alpha", 0.5))
    chosen = {key: value for key, value in recipe.values_by_key().items() if key not in plain}
    assert chosen == {
        "stages.retrieval.loss.mask_above": 0.1,
        "stages.retrieval.loss.distill": {"score_weight": 1.0},
        "stages.generalist.sampling_alpha": 0.5,
    }
    said = dict.fromkeys(recipe.values_by_key(), "guess")
    Recipe.parse(put(tree, "provenance", said))
    del said["stages.retrieval.loss.mask_above"]
    with pytest.raises(ConfigError, match=r"provenance: says nothing of stages\.retrieval\.loss\.mask_above"):
        Recipe.parse(put(tree, "provenance", said))


def test_with_out_changes_the_folder_alone() -> None:
    recipe = Recipe.parse(content())
    moved = recipe.with_out(Path("/elsewhere"))
    assert moved.run.out == "/elsewhere" and moved.hash() == recipe.hash()
    assert moved.with_out("runs/laptop") == recipe


# ---- paths


def test_paths_are_filled_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDWRIGHT_TEST_A", "/a")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("${EMBEDWRIGHT_TEST_A}/x/${EMBEDWRIGHT_TEST_A}.jsonl") == Path("/a/x//a.jsonl")
    assert expand("~/x.jsonl") == Path("/home/me/x.jsonl") and expand("x/y.jsonl") == Path("x/y.jsonl")


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("EMBEDWRIGHT_TEST_B", raising=False)
    if value is not None:
        monkeypatch.setenv("EMBEDWRIGHT_TEST_B", value)
    with pytest.raises(ConfigError, match=r"^\$\{EMBEDWRIGHT_TEST_B\}/x: set the environment variable EMBEDWRIGHT_TES"):
        expand("${EMBEDWRIGHT_TEST_B}/x")


def test_a_packaged_recipe_is_opened_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("laptop").name == "laptop"
    with pytest.raises(FileNotFoundError, match=r"lapptop.*laptop"):
        Recipe.load("lapptop")
    (tmp_path / "laptop").write_text("name: own\n")
    with pytest.raises(ValueError, match="laptop"):  # what is in the folder comes first
        Recipe.load("laptop")
