from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from embedwright.config import ConfigError
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify.doctor import examine_name
from embedwright.processes import ALONE
from embedwright.training.plan import report
from embedwright.training.recipe import Recipe
from embedwright.training.run import save
from embedwright.training.run.start import rank_of, start_model
from embedwright.training.train import train

TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text after it"]
TASK = "Find its answer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Make = Callable[..., dict[str, Any]]


@pytest.fixture
def described(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Make:
    """`described(out, stages, **parts)`: a recipe of stages of one pair a row, so that nothing is drawn at random."""
    pairs = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def make(out: str, stages: tuple[str, ...] = ("first",), **parts: Any) -> dict[str, Any]:
        stage = {
            "data": [{"path": str(tmp_path / "pairs.jsonl")}],
            "in_batch_negatives": "all",
            "hard_negatives": 0,
            "temperature": 0.1,
            "optim": {"lr": 1e-2, "steps": 2, "batch_queries": 4},
        }
        tree: dict[str, Any] = {
            "name": "saved",
            "seed": 7,
            "model": {"base": str(tiny_decoder("llama")), "layers": 2, "latents": 8, "heads": 4, "max_tokens": 40},
            "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "stages": [stage | {"name": name} for name in stages],
            "run": {"tracker": "none", "out": str(tmp_path / out)},
        }
        for part, values in parts.items():
            tree[part] = values if part == "model" and "from" in values else tree[part] | values
        return tree

    return make


def vectors(model: Embedder) -> np.ndarray[Any, Any]:
    return np.stack([model.encode(TEXTS, task=task) for task in (None, TASK)])


def types(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118


# ---- forms and types


@pytest.mark.parametrize(
    ("dtype", "pooling", "precision", "far"),
    [
        ("float32", "latent", "fp32", 1e-6),
        ("float32", "mean", "bf16", 1e-2),  # its own vectors are those of its 16-bit backbone
        ("bfloat16", "mean", "fp32", 2e-2),
        ("float16", "latent", "fp32", 2e-3),
        ("bfloat16", "latent", "bf16", 5e-2),
    ],
)
def test_both_forms_give_the_vectors_of_the_trained_model(
    described: Make, tmp_path: Path, dtype: str, pooling: str, precision: str, far: float
) -> None:
    tree = described("run", model={"pooling": pooling}, run={"save": ["adapter", "merged"], "dtype": dtype})
    tree["run"]["precision"] = precision
    trained = train(Recipe.parse(tree))
    short = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert types(tmp_path / "run/adapter/adapter_model.safetensors") == {short}
    assert types(tmp_path / "run/model/model.safetensors") == {short}  # embeddings and norms, too
    for form in ("adapter", "model"):
        name = str(tmp_path / "run" / form)
        np.testing.assert_allclose(vectors(Embedder.load(name)), vectors(trained), atol=far)
        assert not [finding for finding in examine_name(name) if not finding.ok]
        assert (Path(name) / "README.md").read_text().count(f'Embedder.load("{form}")') == 1
    assert (tmp_path / "run/README.md").read_text() == (tmp_path / "run/model/README.md").read_text()

    base = Embedder.from_decoder(
        tree["model"]["base"], layers=2, pooling=pooling, **({} if pooling == "mean" else {"latents": 8, "heads": 4})
    ).network.float()
    peft: Any = PeftModel.from_pretrained(base if pooling == "latent" else base.backbone, str(tmp_path / "run/adapter"))
    stored = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    name = next(name for name in stored if "lora_B" in name)
    own = dict(peft.named_parameters())[name.replace(".weight", ".default.weight")]
    assert torch.equal(own.to(DTYPES[dtype]), stored[name]) and own.abs().sum() > 0
    other = SentenceTransformer(str(tmp_path / "run/model"), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = Embedder.load(tmp_path / "run/model", dtype="float32")
    np.testing.assert_allclose(other.encode(TEXTS), ours.encode(TEXTS), atol=1e-5)


def test_sixteen_bits_change_nothing_in_memory(described: Make, tmp_path: Path) -> None:
    kept = {"save": ["adapter", "merged"], "dtype": "bfloat16"}
    low = train(Recipe.parse(described("low", ("first", "second"), run=kept)))
    plain = train(Recipe.parse(described("plain", ("first", "second"))))
    np.testing.assert_array_equal(vectors(low), vectors(plain))
    assert {p.dtype for p in low.network.parameters()} == {torch.float32}
    assert (tmp_path / "plain/model").exists() and not (tmp_path / "plain/adapter").exists()
    tuned = Embedder(copy.deepcopy(low.network), low.tokenizer).add_lora(2)  # on other weights than the rounded ones
    with pytest.raises(InputError, match=r"the weights below the adapters are not those of .*llama any more"):
        tuned.save(tmp_path / "adapter")
    low.save(tmp_path / "again")
    plain.save(tmp_path / "other")
    again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "other"))
    assert again == other


@pytest.mark.parametrize("room", [True, False])
def test_a_run_on_a_gpu_ends_on_the_cpu_and_the_model_goes_back_where_it_fits(
    described: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """No test has a GPU: it is what the network is told."""
    done: list[str] = []

    def told(name: str) -> Any:
        def call(*given: Any) -> Any:
            done.append(f"{name} {given[1]}" if name == "to" else name)
            if name == "to" and not room:
                raise torch.OutOfMemoryError("full")
            return given[0]

        return call

    recipe = Recipe.parse(described("run"))
    model = start_model(recipe)
    for parameter in model.network.parameters():
        parameter.data += 0.1
    for owner, name in ((EmbedwrightModel, "cpu"), (EmbedwrightModel, "to"), (save, "merged"), (Embedder, "save")):
        monkeypatch.setattr(owner, name, told(name))
    monkeypatch.setattr(Embedder, "device", property(lambda self: torch.device("cuda", 1)))
    assert save.save_end(recipe, model, ALONE, lambda saved, path: "a card") is model
    assert done == ["cpu", "merged", "save", "to cuda:1", *([] if room else ["cpu"])]


def test_a_run_may_save_nothing(described: Make, tmp_path: Path) -> None:
    train(Recipe.parse(described("run", run={"save": "none"})))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "README.md" in names and not names & {"model", "adapter", "stages"}


def test_a_model_without_its_card_gets_one_and_a_card_stays_as_it_is(described: Make, tmp_path: Path) -> None:
    recipe, card = Recipe.parse(described("run")), tmp_path / "run/model/README.md"
    train(recipe)
    told = card.read_text()
    card.unlink()  # as where a run is killed after it has saved the model
    train(recipe)
    assert card.read_text() == told
    card.write_text("mine")
    train(recipe)
    assert card.read_text() == "mine"


def test_a_weight_too_large_for_float16_is_named(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("mean")
    with torch.no_grad():
        model.network.backbone.norm.weight[3] = 1e5
    before = vectors(model)
    with pytest.raises(InputError, match=r"backbone\.norm\.weight has values that torch\.float16 cannot hold"):
        model.save(tmp_path / "saved", dtype="float16")
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(vectors(model), before)
    with pytest.raises(InputError, match="dtype='int8' is none of"):
        model.save(tmp_path / "saved", dtype="int8")


def test_forms_that_cannot_be_are_refused_at_the_start(described: Make) -> None:
    with pytest.raises(ConfigError, match=r"run\.save: tune\.method full trains no adapters"):
        Recipe.parse(described("run", tune={"method": "full"}, run={"save": ["adapter"]}))
    tree = described("run", run={"save": []})
    tree["stages"][0]["save"] = True
    with pytest.raises(
        ConfigError, match=r"stages\.first\.save keeps the forms of run\.save, but run\.save names none"
    ):
        Recipe.parse(tree)


def test_a_stage_keeps_the_same_forms(described: Make, tmp_path: Path) -> None:
    tree = described("run", ("first", "second"), run={"save": ["merged", "adapter"], "dtype": "float16"})
    tree["stages"][0]["save"] = True
    train(Recipe.parse(tree))
    alone = train(Recipe.parse(described("alone")))
    stage = tmp_path / "run/stages/first"
    for folder in (stage, stage / "adapter"):
        np.testing.assert_allclose(vectors(Embedder.load(folder)), vectors(alone), atol=2e-3)
    assert types(stage / "adapter/adapter_model.safetensors") == types(stage / "model.safetensors") == {"F16"}
    (stage / "adapter/adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"stages\.first\.save: .* has not kept its model \(adapter\)"):
        train(Recipe.parse(tree))


def test_a_run_that_went_on_may_keep_another_form(described: Make, tmp_path: Path) -> None:
    """Before the next stage has a checkpoint, a stage ends again. Its adapter lies in the merged one's folder."""

    def killed(record: dict[str, Any]) -> None:
        if record["stage"] == "second":
            raise KeyboardInterrupt

    tree = described("run", ("first", "second"), run={"save": ["adapter"]})
    tree["stages"][0]["save"] = True
    with pytest.raises(KeyboardInterrupt):
        train(Recipe.parse(tree), on_step=killed)
    kept = tmp_path / "run" / "stages" / "first"
    before = vectors(Embedder.load(kept / "adapter"))
    tree["run"]["save"] = ["adapter", "merged"]
    train(Recipe.parse(tree))
    for folder in (kept, kept / "adapter"):
        np.testing.assert_allclose(vectors(Embedder.load(folder)), before, atol=1e-5)
        card = (folder / "README.md").read_text()
        assert "| first |" in card and "| second |" not in card


def test_a_finished_run_is_kept_in_another_type_once_the_old_model_is_away(described: Make, tmp_path: Path) -> None:
    tree = described("run", run={"save": ["merged", "adapter"]})
    train(Recipe.parse(tree))
    tree["run"]["dtype"] = "float16"
    for folder in (tmp_path / "run/model", tmp_path / "run/adapter"):
        with pytest.raises(
            ConfigError, match=rf"run\.dtype: {folder} is kept in float32, not in float16: move it away"
        ):
            train(Recipe.parse(tree))
        folder.rename(folder.with_name(f"{folder.name}-32"))
    train(Recipe.parse(tree))
    files = ("model/model.safetensors", "adapter/adapter_model.safetensors")
    assert [types(tmp_path / "run" / file) for file in files] == [{"F16"}] * 2
    train(Recipe.parse(tree))


def test_models_of_a_run_whose_checkpoints_are_gone_are_refused(described: Make, tmp_path: Path) -> None:
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter is of an older run, whose checkpoints are gone"):
        train(Recipe.parse(described("run")))


# ---- going on from adapters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_are_one_run_of_both_stages(described: Make, tmp_path: Path, precision: str) -> None:
    """Each stage has an optimizer of its own, so that nothing is lost between the runs."""
    kept = {"save": "adapter", "precision": precision}
    records: list[dict[str, Any]] = []
    together = train(Recipe.parse(described("one", ("first", "second"), run=kept)), on_step=records.append)
    train(Recipe.parse(described("a", run=kept)))
    begin = {"from": str(tmp_path / "a/adapter")}
    tree = described("b", ("second",), model=begin, run=kept)
    tree["tune"] = {"adapters": "continue", "dropout": 0.0}
    again: list[dict[str, Any]] = []
    apart = train(Recipe.parse(tree), on_step=again.append)
    assert [record["loss"] for record in again] == [record["loss"] for record in records[2:]]
    np.testing.assert_array_equal(vectors(apart), vectors(together))
    one, two = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "b"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    config = json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == described("one")["model"]["base"]  # one adapter, on the decoder
    loaded = Embedder.load(tmp_path / "b/adapter")
    np.testing.assert_array_equal(vectors(loaded), vectors(Embedder.load(tmp_path / "one/adapter")))


def test_adapters_go_on_as_they_were_with_the_dropout_of_the_recipe(described: Make, tmp_path: Path) -> None:
    train(Recipe.parse(described("a", run={"save": "adapter", "dtype": "bfloat16"})))
    folder = tmp_path / "a/adapter"
    tree = described("b", model={"from": str(folder)}, run={"save": "adapter"})
    tree["tune"] = {"adapters": "continue", "dropout": 0.25}
    recipe = Recipe.parse(tree)
    model = start_model(recipe)
    layer = model.network.backbone.layers[1].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout.default.p) == (4, 2, 0.25)
    moving = {name for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    assert moving and all("lora_" in name or name.startswith("head.") for name in moving)
    np.testing.assert_array_equal(vectors(model), vectors(Embedder.load(folder)))
    assert rank_of(recipe) == 4 and "rank" not in recipe.model_dump()["tune"]
    assert Recipe.parse(recipe.model_dump(mode="json")).hash() == recipe.hash()
    assert report(recipe) and "adapters" not in Recipe.parse(described("c")).decisive()["tune"]
    train(recipe)
    assert json.loads((tmp_path / "b/adapter/adapter_config.json").read_text())["lora_dropout"] == 0.25


@pytest.mark.parametrize(
    ("form", "tune", "model", "reason"),
    [
        ("adapter", {"adapters": "continue", "rank": 16}, {}, r"tune\.rank=16: the adapters of .* have 4"),
        ("adapter", {"adapters": "continue", "alpha": 16}, {}, r"tune\.alpha=16: the adapters of .* have 8"),
        ("model", {"adapters": "continue"}, {}, "has no adapters to train on: leave tune.adapters out"),
        ("adapter", {}, {}, r"fresh ones on top of them would have a base that is on no disk: write tune: \{adapters"),
        ("model", {}, {"max_tokens": 20}, r"max_tokens=20: an adapter keeps the text contract of the embedder"),
        ("model", {}, {"default_task": "Find"}, r"default_task=Find: an adapter keeps the text contract"),
        ("adapter", {"adapters": "continue", "method": "full"}, {}, "by method lora alone"),
    ],
)
def test_what_cannot_go_on_is_refused_at_the_start(
    described: Make, tmp_path: Path, form: str, tune: dict[str, Any], model: dict[str, Any], reason: str
) -> None:
    train(Recipe.parse(described("a", run={"save": ["adapter", "merged"]})))
    tree = described("b", model={"from": str(tmp_path / "a" / form)} | model, run={"save": "adapter"})
    tree["tune"] = tune
    with pytest.raises(InputError, match=reason):
        train(Recipe.parse(tree))
    assert not (tmp_path / "b/checkpoints").exists()


def test_adapters_on_a_whole_embedder_stay_on_it(described: Make, tmp_path: Path) -> None:
    """Fresh adapters, trained in bf16 on a folder in float32: they are opened on that folder in bfloat16."""
    train(Recipe.parse(described("a")))
    kept = {"save": ["adapter", "merged"], "precision": "bf16"}
    train(Recipe.parse(described("b", model={"from": str(tmp_path / "a/model")}, run=kept)))
    loaded = Embedder.load(tmp_path / "b/adapter")
    assert loaded.network.backbone.dtype == torch.bfloat16
    np.testing.assert_allclose(vectors(loaded), vectors(Embedder.load(tmp_path / "b/model")), atol=5e-2)
