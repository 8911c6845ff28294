from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from embedwright.config import ConfigError
from embedwright.model.embedder import Embedder
from embedwright.model.formats.families import FAMILIES
from embedwright.model.pooling import Kind
from embedwright.text import Contract
from embedwright.training.cost import sizes_of
from embedwright.training.lengths import tokens_of
from embedwright.training.plan import report
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import (
    check_moved,
    longest_of,
    merged,
    shape_of,
    start_model,
    tokenizer_and_contract,
)
from embedwright.training.train import train

NVEMBED = Path(__file__).parents[3] / "parity" / "fixtures" / "nvembed-tiny-v2"
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text after it " * 3]


@pytest.fixture
def content(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    pairs = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stage = {
        "name": "first",
        "data": [{"path": str(tmp_path / "pairs.jsonl")}],
        "in_batch_negatives": "all",
        "hard_negatives": 0,
        "temperature": 0.1,
        "optim": {"lr": 1e-2, "steps": 2, "batch_queries": 4},
    }
    return {
        "name": "started",
        "seed": 7,
        "model": {"base": str(tiny_decoder("llama")), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 40},
        "tune": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "stages": [stage],
        "run": {"out": str(tmp_path / "run"), "tracker": "none"},
    }


def test_the_start_follows_the_seed_alone(content: dict[str, Any]) -> None:
    tree = content

    def weights() -> dict[str, nn.Parameter]:
        torch.rand(np.random.default_rng().integers(1, 9))
        return dict(start_model(Recipe.parse(tree)).network.named_parameters())

    first, again = weights(), weights()
    assert all(torch.equal(first[n], again[n]) for n in first)
    tree["seed"] = 8
    other = weights()
    differ = {n for n in first if not torch.equal(first[n], other[n])}
    assert any("lora_A" in n for n in differ) and any(n.startswith("head.") for n in differ)
    assert all("lora_A" in n or n.startswith("head.") for n in differ)


def test_arms_of_a_pooling_ablation_can_read_the_same_tokens(
    content: dict[str, Any], tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    """Else `latent` and `mean` differ in template and mask too, and their difference says nothing of pooling."""
    model = content["model"]

    def contract(**keys: Any) -> Contract:
        found = start_model(recipe := Recipe.parse({**content, "model": model | keys})).contract
        assert found == tokenizer_and_contract(recipe.model)[1]
        return found

    latent, mean = contract(pooling="latent"), contract(pooling="mean")
    assert (latent.mask_rule, mean.mask_rule) == ("offsets", "boundary") and latent != mean
    assert contract(pooling="latent", mask_rule="boundary") == mean
    assert contract(pooling="mean", mask_rule="offsets") == latent
    with pytest.raises(ValueError, match=r"model.*set one"):
        contract(mask_rule="offsets", pool_prompt=True)
    with pytest.raises(ValueError, match=r"model\.base: mask_rule: boundary: .* BOS"):
        contract(mask_rule="boundary", base=str(tiny_decoder("llama", bos=True)))

    content["model"] = model | {"mask_rule": "boundary"}
    trained = train(Recipe.parse(content))
    trained.save(tmp_path / "saved")
    stored = Embedder.load(tmp_path / "saved")
    assert stored.contract == trained.contract and stored.contract.mask_rule == "boundary"
    assert np.array_equal(stored.encode_query(TEXTS, "find it"), trained.encode_query(TEXTS, "find it"))


def test_adapters_that_nothing_reached_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="21 LoRA adapters are still zero after training"):
        check_moved(start_model(Recipe.parse(content)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_are_those_of_the_recipe(content: dict[str, Any], precision: str) -> None:
    tree = content | {"tune": {"rank": 3, "alpha": 12, "dropout": 0.25}}
    tree["run"]["precision"] = precision
    network = start_model(Recipe.parse(tree)).network
    layer = network.backbone.layers[1].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout.default.p) == (3, 4, 0.25)
    # under autocast the small adapters are cast, not every input
    assert network.mixed == (precision == "bf16") and layer.cast_input_dtype_enabled != network.mixed


# ---- an embedder that trains on


def going_on(content: dict[str, Any], folder: Path | str, **more: Any) -> dict[str, Any]:
    return content | {"model": {"from": str(folder)} | more}


def vectors(model: Embedder) -> list[Any]:
    return [model.encode(TEXTS, task=task) for task in (None, "Find its answer")]


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder], family_folder: Callable[..., Path]
) -> Callable[[str], str]:
    """The folder of an embedder of each form, as it is said in a recipe."""
    folder = tmp_path_factory.mktemp("published")

    @cache
    def make(form: str) -> str:
        if form == "nvembed":
            return str(NVEMBED)
        if form in FAMILIES:
            return f"{form}:{family_folder(form)}"
        pooling, _, adapter = form.partition("-")
        model = tiny_embedder(pooling, attention="causal" if pooling == "last" else "bidirectional", max_tokens=64)
        if adapter:
            model.add_lora(2)
            for name, parameter in model.network.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        model.save(folder / form)
        return str(folder / form)

    return make


FORMS = [*get_args(Kind), "latent-adapter", "mean-adapter", "nvembed", *FAMILIES]


@pytest.mark.parametrize("form", FORMS)
def test_it_begins_with_its_own_vectors_and_contract(
    content: dict[str, Any], published: Callable[[str], str], form: str
) -> None:
    name = published(form)
    stored = Embedder.load(name, dtype="float32")  # as the run computes
    wanted = vectors(stored)
    recipe = Recipe.parse(going_on(content, name))
    model = start_model(recipe)
    for ours, theirs in zip(vectors(model), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 if "adapter" in form else 1e-6)
    network = model.network
    assert model.contract == network.contract == stored.contract and network.pooling == stored.network.pooling
    assert network.backbone.config.is_causal == stored.network.backbone.config.is_causal
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert any("lora_" in name for name in trained)
    # and all that is said of it without its weights is so
    found, contract = tokenizer_and_contract(recipe.model)
    decoder, pooling = shape_of(recipe.model)
    assert contract == stored.contract and pooling == stored.network.pooling
    assert found.backend_tokenizer.encode("tides").ids == model.tokenizer.backend_tokenizer.encode("tides").ids
    sizes = sizes_of(recipe)
    backbone = sum(p.numel() for name, p in network.backbone.named_parameters() if "lora_" not in name)
    assert sizes.decoder == backbone and sizes.head == sum(p.numel() for p in network.head.parameters())
    assert bool(decoder.is_causal) == network.backbone.config.is_causal


@pytest.mark.parametrize("form", ["latent-adapter", "mean"])
@pytest.mark.parametrize(("method", "precision"), [("full", "fp32"), ("full", "bf16"), ("lora", "bf16")])
def test_every_way_to_tune_begins_with_its_vectors(
    content: dict[str, Any], published: Callable[[str], str], form: str, method: str, precision: str
) -> None:
    tree = going_on(content, published(form))
    tree["tune"], tree["run"]["precision"] = {"method": method}, precision
    network = start_model(Recipe.parse(tree)).network
    for name, parameter in network.named_parameters():
        free = method == "full" or "lora_" in name or name.startswith("head.")
        assert parameter.requires_grad == free
        assert parameter.dtype == (torch.float32 if free else torch.bfloat16)
    network.mixed = False
    found = vectors(Embedder(network.float(), Embedder.load(published(form)).tokenizer))
    for ours, theirs in zip(found, vectors(Embedder.load(published(form))), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 if method == "full" else 0.02)  # 8 bits of each weight


@pytest.mark.parametrize("form", ["latent-adapter", "mean", "qwen3-embedding", "nvembed"])
def test_it_trains_on_and_on_under_its_contract(
    content: dict[str, Any], published: Callable[[str], str], tmp_path: Path, form: str
) -> None:
    """A run that goes on from a model, one from what that run made, saved and loaded."""
    stored = Embedder.load(published(form))
    name, before = published(form), vectors(stored)
    for turn in ("first", "second"):
        content["run"]["out"] = str(tmp_path / turn)
        train(Recipe.parse(going_on(content, name))).save(tmp_path / f"{turn}-model")
        name = str(tmp_path / f"{turn}-model")
        model = Embedder.load(name)
        assert model.contract == stored.contract and model.network.pooling == stored.network.pooling
        after = vectors(model)
        assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(after, before, strict=True))
        before = after
    card = (tmp_path / "second" / "README.md").read_text()
    assert "made from first-model" in card and str(tmp_path) not in card
    again = Recipe.load(tmp_path / "second" / "recipe.yaml")
    assert again == Recipe.parse(going_on(content, tmp_path / "first-model"))


@pytest.mark.parametrize("form", ["latent", "mean", "qwen3-embedding"])
def test_it_keeps_its_instruction_or_takes_that_of_the_recipe(
    content: dict[str, Any], published: Callable[[str], str], tmp_path: Path, form: str
) -> None:
    own = Embedder.load(published(form)).contract.default_task
    assert bool(own) == (form == "qwen3-embedding")
    for given in (None, "Find its answer"):
        more = {} if given is None else {"default_task": given}
        recipe = Recipe.parse(going_on(content, published(form), **more) | {"tune": {"method": "full"}})
        model = merged(start_model(recipe))
        assert model.contract.default_task == tokenizer_and_contract(recipe.model)[1].default_task == (given or own)
        model.save(tmp_path / str(given))
        kept = Embedder.load(tmp_path / str(given))
        assert kept.contract == model.contract
        assert given is None or np.array_equal(kept.encode_query(TEXTS), kept.encode(TEXTS, task=given))


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_the_instruction_of_a_recipe_goes_into_every_form_and_trains_rows_that_have_none(
    content: dict[str, Any], tmp_path: Path, pooling: str
) -> None:
    from sentence_transformers import SentenceTransformer

    asked, sizes = "Find its answer", {"latents": 8, "heads": 4, "multiple": 1} if pooling == "latent" else {}
    content["model"] = {"base": content["model"]["base"], "pooling": pooling, "max_tokens": 40, **sizes}
    losses = []
    for name, stated, own in (("own", None, asked), ("stated", {"name": "pairs", "instruction": asked}, None)):
        content["run"] = {"out": str(tmp_path / name), "tracker": "none", "save": ["merged", "adapter"]}
        content["stages"][0]["data"][0]["task"] = stated
        content["model"]["default_task"] = own
        records: list[Any] = []
        train(Recipe.parse(content), on_step=records.append)
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1]
    whole, adapter = (Embedder.load(tmp_path / "own" / form) for form in ("model", "adapter"))
    plain = Embedder.load(tmp_path / "stated" / "model")
    assert plain.contract.default_task == ""
    assert whole.contract == adapter.contract == plain.contract.model_copy(update={"default_task": asked})
    wanted = plain.encode(TEXTS, task=asked)
    theirs = SentenceTransformer(str(tmp_path / "own" / "model"), device="cpu")
    for found in (whole.encode_query(TEXTS), adapter.encode_query(TEXTS), theirs.encode_query(TEXTS)):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    np.testing.assert_array_equal(whole.encode_query(TEXTS, ""), plain.encode(TEXTS))
    assert f"| instruction of a query without one | {asked} |" in (tmp_path / "own" / "README.md").read_text()


def test_its_texts_may_be_cut_shorter(content: dict[str, Any], published: Callable[[str], str], tmp_path: Path) -> None:
    recipe = Recipe.parse(going_on(content, published("mean"), max_tokens=16))
    model = train(recipe)
    model.save(tmp_path / "short")
    assert Embedder.load(tmp_path / "short").max_tokens == model.max_tokens == 16
    assert len(model.tokenize([TEXTS[2]]).ids_T) == 16 and longest_of(recipe.model) == 16
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe
    for say in (start_model, lambda recipe: tokens_of(recipe, [[True]])):
        with pytest.raises(ValueError, match=r"max_tokens=65: .*mean reads 64 tokens, but can only be shortened"):
            say(Recipe.parse(going_on(content, published("mean"), max_tokens=65)))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({}, "needs base, a decoder, or from, an embedder"),
        ({"base": "a", "from": "b"}, "but not both"),
        ({"from": "b", "layers": 2, "pooling": "mean"}, "layers, pooling: an embedder of `from` keeps its own"),
        ({"from": "b", "attention": "bidirectional"}, "attention: an embedder of `from` keeps its own"),
        ({"from": ""}, "from"),
        ({"form": "b"}, "unknown key; did you mean 'from'?"),
    ],
)
def test_a_model_is_said_in_one_way(content: dict[str, Any], model: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.parse(content | {"model": model})
    assert str(error.value).startswith("recipe: model") and says in str(error.value)


def test_four_bits_are_of_a_decoder(content: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tune\.method: qlora .* use lora for model\.from"):
        Recipe.parse(content | {"model": {"from": "b"}, "tune": {"method": "qlora"}})


@pytest.mark.parametrize("form", ["latent", "mean", "mean-adapter", "nvembed", "qwen3-embedding"])
def test_an_embedder_is_no_base(content: dict[str, Any], published: Callable[[str], str], form: str) -> None:
    recipe = Recipe.parse(content | {"model": {"base": published(form).partition(":")[2] or published(form)}})
    for say in (start_model, train, report):
        with pytest.raises(ValueError, match=r"is an embedder, and .* write model: \{from: "):
            say(recipe)
    assert not Path(recipe.run.out).exists()


def test_what_cannot_train_on_is_named(
    content: dict[str, Any], tiny_decoder: Callable[..., Path], family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = Path(shutil.copytree(family_folder("embeddinggemma"), tmp_path / "embeddinggemma"))
    (dense / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "2_Dense", "type": "st.Dense"}]))
    refused = {
        str(tiny_decoder("llama")): "is not an embedder: to make one from a decoder, write model: {base: ",
        str(dense): "has modules that only sentence-transformers runs",
        str(tmp_path / "absent"): "does not exist",
    }
    for name, says in refused.items():
        for say in (start_model, train, *([] if "absent" in name else [report])):  # a plan waits for its model
            with pytest.raises(ValueError) as error:
                say(Recipe.parse(going_on(content, name)))
            assert str(error.value).startswith("recipe started: model.from: ") and says in str(error.value)
    with pytest.raises(ValueError, match=r"recipe started: model\.base: .* name the decoder that it was made from"):
        start_model(Recipe.parse(content | {"model": {"base": str(dense)}}))


@pytest.mark.parametrize("form", ["mean", "mean-adapter"])
def test_another_embedder_in_its_place_is_another_run(
    content: dict[str, Any], published: Callable[[str], str], tmp_path: Path, form: str
) -> None:
    folder = Path(shutil.copytree(published(form), tmp_path / "model"))
    recipe = Recipe.parse(going_on(content, folder))
    train(recipe)
    train(recipe)
    weights = folder / ("adapter_model.safetensors" if "adapter" in form else "model.safetensors")
    changed = load_file(weights)
    next(iter(changed.values())).view(-1)[0] += 1
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"holds a run of another model \(files: \w+ -> \w+\): choose another"):
        train(recipe)


def test_another_base_in_its_place_is_another_run(
    content: dict[str, Any], tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_decoder("llama"), tmp_path / "base"))
    content["model"]["base"] = str(base)
    train(Recipe.parse(content))
    shutil.rmtree(base)
    shutil.copytree(tiny_decoder("qwen3"), base)
    with pytest.raises(ConfigError, match=r"holds a run of another model \(files: \w+ -> \w+\): choose another"):
        train(Recipe.parse(content))


# ---- the model of a stage, kept


def in_two_stages(content: dict[str, Any], out: Path, save: bool) -> dict[str, Any]:
    [stage] = content["stages"]
    stages = [stage | {"save": save}, stage | {"name": "second", "optim": stage["optim"] | {"steps": 3}}]
    return content | {"stages": stages, "run": content["run"] | {"out": str(out)}}


@pytest.mark.parametrize(
    ("method", "precision", "pooling"),
    [("lora", "fp32", "latent"), ("lora", "bf16", "mean"), ("full", "fp32", "latent"), ("qlora", "bf16", "latent")],
)
def test_a_stage_keeps_its_model_and_the_run_stays_as_it_is(
    content: dict[str, Any], tmp_path: Path, method: str, precision: str, pooling: str
) -> None:
    if method == "qlora" and find_spec("bitsandbytes") is None:
        pytest.skip("package bitsandbytes is missing (the extra [qlora])")
    content["model"]["pooling"], content["run"]["precision"] = pooling, precision
    content["tune"] |= {"method": method, "dropout": 0.2}
    records: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    models = {
        save: train(Recipe.parse(in_two_stages(content, tmp_path / f"{save}", save)), on_step=records[save].append)
        for save in records
    }
    told = [[(r["stage"], r["step"], r["loss"], r["ids"]) for r in records[save]] for save in (False, True)]
    assert told[0] == told[1] and len(told[0]) == 5
    for ours, theirs in zip(vectors(models[True]), vectors(models[False]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not (tmp_path / "False" / "stages").exists()

    # it is what a run of that stage alone ends on, and another run begins from it as from any other embedder
    alone = train(Recipe.parse(content | {"run": content["run"] | {"out": str(tmp_path / "alone")}}))
    alone.save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "True" / "stages").iterdir()] == ["first"]
    kept = Embedder.load(tmp_path / "True" / "stages" / "first")
    for ours, theirs in zip(vectors(kept), vectors(Embedder.load(tmp_path / "model")), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if method != "qlora":  # 4 bits are of a decoder
        after = [
            train(Recipe.parse(going_on(content, folder) | {"run": content["run"] | {"out": str(tmp_path / name)}}))
            for folder, name in ((tmp_path / "True" / "stages" / "first", "a"), (tmp_path / "model", "b"))
        ]
        for ours, theirs in zip(*map(vectors, after), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_model_that_cannot_be_kept_any_more_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(Recipe.parse(in_two_stages(content, out, False)))
    asked = Recipe.parse(in_two_stages(content, out, True))
    with pytest.raises(ConfigError, match=r"stages\.first\.save: .* is past that stage and has not kept its model"):
        train(asked)
    shutil.rmtree(out)
    train(asked)
    train(asked)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ConfigError, match="model is of an older run, whose checkpoints are gone"):
        train(asked)


# ---- frozen latents


def test_frozen_latents_stay_and_all_else_trains(content: dict[str, Any]) -> None:
    """Bit by bit, in a run that is stopped and gone on with too; without `freeze` they move."""
    content["tune"]["freeze"] = ["latents"]
    content["stages"][0]["optim"]["steps"] = 5
    content["run"]["checkpoint_every"] = 1
    recipe = Recipe.parse(content)
    network = start_model(recipe).network
    begun = {name: value.detach().clone() for name, value in network.named_parameters()}
    assert sizes_of(recipe).trained == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert not begun["head.latents"].eq(0).any()

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe.with_out(f"{recipe.run.out}-pieces"), on_step=stop)
    whole, pieces = train(recipe), train(recipe.with_out(f"{recipe.run.out}-pieces"))
    assert np.array_equal(whole.encode(TEXTS), pieces.encode(TEXTS))
    (last,) = Path(recipe.run.out).glob("checkpoints/00-0000005")
    kept = load_file(last / "weights.safetensors")
    assert "head.latents" not in kept and len([name for name in kept if name.startswith("head.")]) >= 9
    assert all(not torch.equal(value, begun[name]) for name, value in kept.items())
    for model in (whole, pieces):
        assert torch.equal(model.network.head.latents, begun["head.latents"])  # type: ignore[arg-type, union-attr]

    del content["tune"]["freeze"]
    free = train(Recipe.parse(content).with_out(f"{recipe.run.out}-free"))
    assert not torch.equal(free.network.head.latents, begun["head.latents"])  # type: ignore[arg-type, union-attr]


def test_a_model_without_latents_has_none_to_freeze(
    content: dict[str, Any], tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    content["tune"]["freeze"] = ["latents"]
    content["model"]["pooling"] = "mlp"
    with pytest.raises(ConfigError, match=r"tune\.freeze: pooling mlp has no latents"):
        Recipe.parse(content)
    tiny_embedder("mean").save(tmp_path / "mean")
    content["model"] = {"from": str(tmp_path / "mean")}
    with pytest.raises(ValueError, match=r"tune\.freeze: this embedder pools without latents"):
        start_model(Recipe.parse(content))


def test_every_path_of_a_recipe_may_begin_with_the_home_folder(
    content: dict[str, Any], tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MINE", "runs")
    shutil.copytree(tiny_decoder("llama"), home / "decoder")
    Embedder.from_decoder(home / "decoder", pooling="mean").save(home / "teacher")
    (tmp_path / "pairs.jsonl").rename(home / "pairs.jsonl")
    texts = [{"_id": f"d{i}", "text": f"the sea and {i}"} for i in range(9)]
    (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    scored = [{"text1": f"a tide {i}", "text2": f"moon {i * i}", "score": i % 5} for i in range(10)]
    (home / "suite").mkdir()
    (home / "suite/alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    entry = {"path": "~/pairs.jsonl", "corpus": "~/corpus.jsonl"}
    mined = {"kind": "mine", "teacher": "~/teacher", "rule": "naive", "negatives": 1}
    distill = {"teacher": "~/teacher", "similarity_weight": 1.0}
    content["stages"] = [mined, content["stages"][0] | {"data": [entry], "loss": {"distill": distill}}]
    content["stages"][1]["hard_negatives"] = 1
    content["model"]["base"] = "~/decoder"
    content["eval"] = {"suites": ["~/suite"]}
    content["run"]["out"] = "~/${MINE}/a"
    steps: list[dict[str, Any]] = []
    for _ in range(2):  # the second time it goes on, and finds that nothing is left to do
        trained = train(Recipe.parse(content), on_step=steps.append)
    assert len(steps) == 2 and (home / "runs/a/mined/first/0000000/00.parquet").is_file()
    after = going_on(content, "~/runs/a/model")
    after["run"]["out"] = str(tmp_path / "after")
    train(Recipe.parse(after))
    for found, expected in zip(vectors(Embedder.load(home / "runs/a/model")), vectors(trained), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not list(here.iterdir()) and not [path for path in home.iterdir() if path.name[0] in ".~"]
