"""Adapters on disk: the same vectors from every kind of base, through peft itself, and no other base by mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel

from embedwright.model import backbone
from embedwright.model.embedder import Embedder
from embedwright.model.formats import adapter as adapter_folder
from embedwright.model.verify.probe import ProbeError

NVEMBED = Path(__file__).parents[3] / "parity" / "fixtures" / "nvembed-tiny-v2"
TEXTS = ["how do tides work?", "the moon", "a dog that does not mind, and a longer text behind it"]
TASK = "Given a question, retrieve passages"
Make = Callable[..., Embedder]


def tuned(model: Embedder, std: float = 0.2) -> Embedder:
    """Adapters and pooling block as training might leave them."""
    torch.manual_seed(0)
    model.add_lora(rank=4, alpha=8)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
        elif name.startswith("head."):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def vectors(model: Embedder) -> np.ndarray:
    return np.concatenate([model.encode(TEXTS), model.encode(TEXTS, TASK)])


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(params=["decoder", "causal decoder", "whole", "stock", "whole without a pooling block", "nvembed"])
def base(request: pytest.FixtureRequest, tiny_embedder: Make, tiny_decoder: Callable[..., Path], tmp_path: Path) -> Any:
    """Opens a base of each kind."""
    kind = request.param
    if kind == "nvembed":
        return lambda: Embedder.load(NVEMBED, dtype="float32")
    if kind.endswith("decoder"):
        attention: Any = "causal" if kind.startswith("causal") else "bidirectional"
        sizes = {"latents": 6, "heads": 2, "multiple": 1, "layers": 2}
        return lambda: Embedder.from_decoder(tiny_decoder("mistral", True), attention=attention, **sizes)
    model = tiny_embedder("latent" if kind == "whole" else "mean", bos=kind != "stock")
    model.save(tmp_path / "base")
    return lambda: Embedder.load(tmp_path / "base")


@pytest.fixture
def saved(tiny_embedder: Make, tmp_path: Path) -> Path:
    """An adapter folder over `tmp_path / "base"`, a latent model."""
    tiny_embedder("latent").save(tmp_path / "base")
    tuned(Embedder.load(tmp_path / "base")).save(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- there and back


def test_saved_and_loaded_it_gives_the_same_vectors_merged_or_not(base: Callable[[], Embedder], tmp_path: Path) -> None:
    plain, model = vectors(base()), tuned(base())
    expected = vectors(model)
    assert np.abs(expected - plain).max() > 0.02
    model.save(tmp_path / "adapter")
    np.testing.assert_array_equal(vectors(model), expected)  # what is saved stays as it is
    assert model.network.backbone.peft_config["default"].base_model_name_or_path is None

    loaded = Embedder.load(tmp_path / "adapter")
    np.testing.assert_allclose(vectors(loaded), expected, atol=1e-6)
    assert loaded.contract == model.contract and loaded.network.pooling == model.network.pooling
    trainable = {name for name, p in loaded.network.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.network.named_parameters() if p.requires_grad}
    loaded.save(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors", "base_samples.safetensors", "embedwright.json"):
        ours, again = ((tmp_path / folder / file).read_bytes() for folder in ("adapter", "again"))
        assert sorted(ours) == sorted(again)  # peft writes the names of layers in any order

    loaded.merge().save(tmp_path / "merged")
    np.testing.assert_allclose(vectors(loaded), expected, atol=1e-5)
    np.testing.assert_allclose(vectors(Embedder.load(tmp_path / "merged")), expected, atol=1e-5)


def test_the_folder_holds_the_adapters_and_the_pooling_block_and_nothing_of_the_base(saved: Path) -> None:
    names = {p.name for p in saved.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "base_samples.safetensors", "embedwright.json"}
    assert not names & {"config.json", "model.safetensors"}
    model = Embedder.load(saved)
    tensors = load_file(saved / "adapter_model.safetensors")
    backbone, head = model.network.backbone, dict(model.network.head.named_parameters())
    linear = [n.removesuffix(".base_layer") for n, m in backbone.named_modules() if n.endswith(".base_layer")]
    lora = {f"base_model.model.backbone.{name}.lora_{m}.weight" for name in linear for m in "AB"}
    assert len(linear) == 21 and tensors.keys() == lora | {f"base_model.model.head.{name}" for name in head}
    assert all(torch.equal(tensors[f"base_model.model.head.{name}"], p) for name, p in head.items())
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, ["head"])
    assert (config["task_type"], config["inference_mode"]) == ("FEATURE_EXTRACTION", True)
    assert config["base_model_name_or_path"] == str((saved.parent / "base").resolve())


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
def test_types_are_those_of_training_unless_asked(trained: str, tiny_embedder: Make, tmp_path: Path) -> None:
    tiny_embedder("latent").save(tmp_path / "base")
    model = tuned(Embedder.load(tmp_path / "base", dtype=trained))
    model.save(tmp_path / "adapter")

    def types(**options: Any) -> tuple[Any, ...]:
        network = Embedder.load(tmp_path / "adapter", **options).network
        lora = next(p for n, p in network.named_parameters() if "lora_" in n)
        return network.backbone.norm.weight.dtype, network.head.latents.dtype, lora.dtype

    assert types() == (getattr(torch, trained), torch.float32, torch.float32)
    for asked in ("float32", "bfloat16", "float16"):
        assert types(dtype=asked) == (getattr(torch, asked), torch.float32, torch.float32)
    np.testing.assert_array_equal(vectors(Embedder.load(tmp_path / "adapter")), vectors(model))


def test_a_loaded_adapter_trains_on(saved: Path) -> None:
    model = Embedder.load(saved)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    queries, documents = model.tokenize(TEXTS, TASK), model.tokenize(TEXTS)
    torch.nn.functional.cross_entropy(model.embed(queries) @ model.embed(documents).T * 20, torch.arange(3)).backward()
    optimizer.step()
    moved = {name for name, p in model.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("head.")}


@pytest.mark.parametrize(("bos", "within"), [(False, "layers"), (True, "backbone")])
def test_the_next_adapters_stand_on_what_was_saved_last(
    bos: bool, within: str, tiny_embedder: Make, tmp_path: Path
) -> None:
    """Merged weights are on no disk until they are saved. Names are those of what AutoModel makes of that folder."""
    model = tuned(tuned(tiny_embedder("mean", bos=bos)).merge())
    with pytest.raises(ValueError, match=r"the weights below the adapters are not those of .*llama.* any more"):
        model.save(tmp_path / "adapter")
    model.merge().save(tmp_path / "base")
    expected = vectors(tuned(model))
    model.save(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert all(name.startswith(f"base_model.model.{within}.") for name in names)
    np.testing.assert_allclose(vectors(Embedder.load(tmp_path / "adapter")), expected, atol=1e-6)


def test_weights_tuned_in_full_below_the_adapters_are_seen(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent")
    with torch.no_grad():
        model.network.backbone.layers[2].mlp.down_proj.weight *= 1.001
    with pytest.raises(ValueError, match="save the model without adapters"):
        tuned(model).save(tmp_path / "adapter")
    made = Embedder(model.network, model.tokenizer)
    made.network.origin = None
    with pytest.raises(ValueError, match="the weights below the adapters are on no disk"):
        made.save(tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(saved: Path) -> None:
    with pytest.raises(FileExistsError):
        Embedder.load(saved).save(saved)


@pytest.mark.parametrize("family", ["", "e5-mistral:"])
def test_an_embedder_of_others_is_found_again_under_the_name_that_opened_it(
    family: str, family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_folder("e5-mistral")
    with monkeypatch.context() as patch:
        patch.chdir(folder.parent)
        model = tuned(Embedder.load(f"{family}./{folder.name}"))
    expected = vectors(model)
    model.save(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == f"{family}{folder.resolve()}"
    np.testing.assert_allclose(vectors(Embedder.load(tmp_path / "adapter")), expected, atol=1e-6)


# ---- peft itself


def padded(model: Embedder) -> dict[str, Tensor]:
    texts = model.tokenize(TEXTS, TASK)
    lengths = texts.lengths_N.tolist()

    def rows(values_T: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values_T.split(lengths)), batch_first=True)

    return {
        "input_ids": rows(texts.ids_T),
        "attention_mask": rows(torch.ones_like(texts.ids_T)),
        "pool_mask": rows(texts.pool_mask_T),
    }


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_plain_peft_opens_ours_around_auto_model(pooling: str, tiny_embedder: Make, tmp_path: Path) -> None:
    tiny_embedder(pooling, bos=True).save(tmp_path / "base")
    model = tuned(Embedder.load(tmp_path / "base"))
    model.save(tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    outputs = theirs(**padded(model)).pooler_output
    np.testing.assert_allclose(outputs.numpy(), model.encode(TEXTS, TASK), atol=1e-6)


@torch.no_grad()
def test_plain_peft_opens_ours_around_a_stock_model(tiny_embedder: Make, tmp_path: Path) -> None:
    tiny_embedder("mean").save(tmp_path / "base")
    model = tuned(Embedder.load(tmp_path / "base"))
    model.save(tmp_path / "adapter")
    stock = AutoModel.from_pretrained(tmp_path / "base", attn_implementation="sdpa")
    theirs = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert type(stock).__name__ == "LlamaModel"
    for text, expected in zip(TEXTS, model.encode(TEXTS, TASK), strict=True):
        tokens = model.tokenize([text], TASK)
        states = theirs(input_ids=tokens.ids_T[None]).last_hidden_state[0]
        got = F.normalize(states[tokens.pool_mask_T].mean(0), dim=0)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["latent", "mean"])
@pytest.mark.parametrize("head", [True, False])
def test_adapters_of_plain_peft_open(head: bool, pooling: str, tiny_embedder: Make, tmp_path: Path) -> None:
    """Of the user's own choice of layers and sizes; the pooling block tuned with them or not."""
    tiny_embedder(pooling, bos=True).save(tmp_path / "base")
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"down_proj": 2},
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[0, 2],
        layers_pattern="layers",
        init_lora_weights="gaussian",
        modules_to_save=["head"] if head and pooling == "latent" else None,
    )
    theirs = get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    model = Embedder.load(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(**padded(model)).pooler_output.numpy()
    assert np.abs(expected - Embedder.load(tmp_path / "base").encode(TEXTS, TASK)).max() > 0.02
    np.testing.assert_allclose(model.encode(TEXTS, TASK), expected, atol=1e-6)

    model.save(tmp_path / "ours")
    np.testing.assert_allclose(Embedder.load(tmp_path / "ours").encode(TEXTS, TASK), expected, atol=1e-6)
    np.testing.assert_allclose(model.merge().encode(TEXTS, TASK), expected, atol=1e-5)


def test_adapters_of_plain_peft_on_a_stock_model_open(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("last")
    model.save(tmp_path / "base")
    theirs = get_peft_model(model.network.backbone, LoraConfig(r=2, target_modules=r"layers\.[01].*\.[kv]_proj"))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.base_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(vectors(Embedder.load(tmp_path / "adapter")), vectors(model), atol=1e-6)


# ---- another base, no base


def test_a_base_that_was_moved_is_found_where_the_config_says(saved: Path, tmp_path: Path) -> None:
    expected = vectors(Embedder.load(saved))
    moved = (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as error:
        Embedder.load(saved)
    assert str(tmp_path / "base") in str(error.value)
    assert f"base_model_name_or_path into {saved / 'adapter_config.json'}" in str(error.value)
    edit(saved / "adapter_config.json", base_model_name_or_path=str(moved))
    np.testing.assert_array_equal(vectors(Embedder.load(saved)), expected)


def test_a_decoder_that_is_gone_is_named(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    decoder = Path(shutil.copytree(tiny_decoder("llama"), tmp_path / "decoder"))
    tuned(Embedder.from_decoder(decoder, pooling="mean")).save(tmp_path / "adapter")
    shutil.rmtree(decoder)
    with pytest.raises(FileNotFoundError, match=r"the base of this adapter, .*/decoder, cannot be opened"):
        Embedder.load(tmp_path / "adapter")


def test_another_base_is_refused(saved: Path, tiny_embedder: Make, tmp_path: Path) -> None:
    """Also one that differs by a small adapter alone."""
    Embedder.load(tmp_path / "base").save(tmp_path / "copy")
    edit(saved / "adapter_config.json", base_model_name_or_path=str(tmp_path / "copy"))
    Embedder.load(saved)
    tuned(Embedder.load(tmp_path / "base"), std=1e-3).merge().save(tmp_path / "near")
    tiny_embedder("latent", "qwen3").save(tmp_path / "far")
    for other in ("near", "far"):
        edit(saved / "adapter_config.json", base_model_name_or_path=str(tmp_path / other))
        with pytest.raises(
            ValueError, match=f"{other} has other weights than the base that this adapter was trained on"
        ):
            Embedder.load(saved)


@pytest.mark.parametrize(("part", "key", "value"), [("contract", "max_tokens", 77), ("pooling", "heads", 4)])
def test_a_base_that_reads_otherwise_is_refused(part: str, key: str, value: int, saved: Path) -> None:
    stored = json.loads((saved / "embedwright.json").read_text())
    edit(saved / "embedwright.json", **{part: stored[part] | {key: value}})
    with pytest.raises(ValueError, match=f"has another {part} than the base that this adapter was trained on"):
        Embedder.load(saved)


def test_an_adapter_on_an_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "second")
    edit(tmp_path / "second" / "adapter_config.json", base_model_name_or_path=str(saved))
    with pytest.raises(ValueError, match="is an adapter itself: merge that first"):
        Embedder.load(tmp_path / "second")


def test_a_base_that_is_opened_causal_is_refused(
    tiny_decoder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA around a causal decoder, with a config that says otherwise: the probe sees what it does."""
    tuned(Embedder.from_decoder(tiny_decoder("llama"), pooling="mean")).save(tmp_path / "adapter")

    def causal_inside(config: Any, attention: str) -> None:
        right(config, "causal")

    def claims_to_be_bidirectional(*arguments: Any) -> Any:
        loaded = load(*arguments)
        loaded.config = type(loaded.config)(**loaded.config.to_dict() | {"is_causal": False})
        return loaded

    right, load = backbone.set_attention, adapter_folder.load_backbone
    monkeypatch.setattr(backbone, "set_attention", causal_inside)
    monkeypatch.setattr(adapter_folder, "load_backbone", claims_to_be_bidirectional)
    with pytest.raises(ProbeError, match="attention is causal"):
        Embedder.load(tmp_path / "adapter")


# ---- what does not fit


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', but only LORA is supported"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path does not say where the base is"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"key_of_tomorrow": 1}, "key_of_tomorrow=1 is not supported"),
    ],
)
def test_settings_that_we_do_not_follow_are_refused(values: dict[str, Any], reason: str, saved: Path) -> None:
    edit(saved / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=reason):
        Embedder.load(saved)


LATENTS = "base_model.model.head.latents"
LORA_A = "base_model.model.backbone.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(LORA_A), f"1 tensors are missing, e.g. {LORA_A}"),
        (lambda t: t.pop(LATENTS), f"1 tensors are missing, e.g. {LATENTS}"),
        (lambda t: t.update({"more": t[LORA_A].clone()}), "1 tensors are unexpected, e.g. more"),
        (
            lambda t: t.update({LORA_A: t[LORA_A][:2].clone()}),
            f"1 tensors are of another shape than the model's, e.g. {LORA_A}",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any], reason: str, saved: Path
) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=reason):
        Embedder.load(saved)


def test_a_new_pooling_block_must_be_in_the_adapter(tiny_embedder: Make, tmp_path: Path) -> None:
    tuned(tiny_embedder("latent")).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".head." not in n}, file)
    with pytest.raises(ValueError, match=r"14 tensors are missing, e\.g\. base_model\.model\.head\.attention"):
        Embedder.load(tmp_path / "adapter")


def test_tensors_that_were_edited_give_other_vectors_than_recorded(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    save_file({name: t * 1.1 if "lora_B" in name else t for name, t in load_file(file).items()}, file)
    with pytest.raises(ProbeError, match="adapter does not give the vectors that it was saved with"):
        Embedder.load(saved)


def test_files_that_are_not_there_or_not_whole(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        Embedder.load(saved)
    file.rename(saved / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors does not exist"):
        Embedder.load(saved)


def test_lora_on_the_pooling_block_is_refused(tiny_embedder: Make, tmp_path: Path) -> None:
    tiny_embedder("latent").save(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "to_q"])
    get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"LoRA on the pooling block \(attention\.to_q\.lora_A.* it trains in full"):
        Embedder.load(tmp_path / "adapter")


# ---- adapters that change nothing


def test_adapters_that_training_did_not_reach_are_named(
    tiny_embedder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_embedder("mean").add_lora(2)
    model.save(tmp_path / "adapter")
    Embedder.load(tmp_path / "adapter")
    assert len(caplog.messages) == 2 and len(set(caplog.messages)) == 1
    assert caplog.messages[0].startswith("21 of 21 LoRA adapters are zero and change nothing, e.g. layers.0.self_attn")
