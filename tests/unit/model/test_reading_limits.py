"""What a model refuses to read: lengths, texts, arguments, tokens that it has not, positions that depend on a batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from embedwright.errors import InputError, InputTypeError
from embedwright.model.embedder import Embedder

RELEASED = Path(__file__).parents[2] / "parity" / "fixtures" / "nvembed-tiny-v2"
TEXTS = ["how do tides work?", "a", "the moon"]


@pytest.fixture(scope="module")
def model(tiny_embedder: Any) -> Embedder:
    made: Embedder = tiny_embedder("latent")
    return made


# ---- texts


@pytest.mark.parametrize(
    "texts",
    [
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        pd.Series(TEXTS, index=[7, 5, 3]),
        pd.Series(TEXTS, dtype="string"),
        pa.array(TEXTS),
        pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
        dict.fromkeys(TEXTS).keys(),
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_any_series_of_texts_is_read_in_its_order(texts: Any, model: Embedder) -> None:
    np.testing.assert_array_equal(model.encode(texts), model.encode(TEXTS))


def test_a_generator_too(model: Embedder) -> None:
    np.testing.assert_array_equal(model.encode(text for text in TEXTS), model.encode(TEXTS))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "texts",
    [
        pd.DataFrame({"text": TEXTS}),
        pa.table({"text": TEXTS}),
        {"text": TEXTS},
        set(TEXTS),
        frozenset(TEXTS),
        b"bytes",
        np.array([TEXTS]),
        np.array("none"),
        Path("file.txt"),
        None,
        7,
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_what_is_no_series_of_texts_is_refused(texts: Any, model: Embedder) -> None:
    for call in (model.encode, model.tokenize):
        with pytest.raises(InputTypeError, match=f"got {type(texts).__name__}: pass a list"):
            call(texts)


def test_a_missing_value_is_named(model: Embedder) -> None:
    with pytest.raises(InputTypeError, match=r"texts\[1\] is"):
        model.encode(pd.Series(["a", None]))
    with pytest.raises(InputTypeError, match=r"texts\[0\] is bytes"):
        model.encode([b"a"])  # type: ignore[list-item]


# ---- arguments, before the work


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "int4"}, "precision='int4'"),
        ({"precision": None}, "precision=None"),
        ({"dim": True}, "dim=True is bool"),
        ({"dim": 2.0}, "dim=2.0 is float"),
        ({"dim": 33}, "dim=33"),
        ({"batch_tokens": "9"}, "batch_tokens='9' is str"),
        ({"batch_tokens": True}, "batch_tokens=True is bool"),
        ({"task": 3}, "task is int"),
        ({"prefix": b"Q"}, "prefix is bytes"),
        ({"prefix": "half \ud83d"}, "prefix holds a lone surrogate"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1}, "max_tokens=1 leaves no room for a token of text: give at least 2"),
        ({"max_tokens": True}, "max_tokens=True is bool"),
        ({"max_tokens": 3.5}, "max_tokens=3.5 is float"),
        ({"max_tokens": 1025}, "max_tokens=1025: the model has positions for 1024"),
    ],
)
def test_arguments_are_checked_before_the_work(
    options: dict[str, Any], named: str, model: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.network, "hidden", lambda _: pytest.fail("texts were encoded"))
    for texts in (TEXTS, []):
        with pytest.raises(InputError) as refused:
            model.encode(texts, **options)
        assert named in str(refused.value)


@pytest.mark.parametrize("limit", [-1, 0, 1, True, 3.5])
def test_limits_are_checked_for_every_rule(limit: Any, tiny_embedder: Any) -> None:
    """NV-Embed's own dropped EOS at -1."""
    for made in (Embedder.load(RELEASED), tiny_embedder("mean"), tiny_embedder("mean", pool_prompt=True)):
        for call in (made.encode, made.tokenize):
            with pytest.raises(InputError, match=r"max_tokens="):
                call(TEXTS, max_tokens=limit)
    with pytest.raises(InputError, match=r"max_tokens="):
        tiny_embedder("mean", max_tokens=limit)


def test_a_model_is_not_made_for_more_tokens_than_it_has_positions(tiny_decoder: Any) -> None:
    with pytest.raises(InputError, match=r"max_tokens=1025: .* has positions for 1024"):
        Embedder.from_decoder(tiny_decoder("llama"), max_tokens=1025)


# ---- only finite vectors


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_a_text_that_overflows_is_named(precision: Any, tiny_embedder: Any) -> None:
    made = tiny_embedder("mean", dtype="float16")
    texts = ["how do tides work?", "~", "the moon", "the moon"]
    assert np.isfinite(made.encode([texts[0], texts[2]])).all()
    token = made.own_tokenizer.convert_tokens_to_ids("~")
    backbone = made.network.backbone
    backbone.embed_tokens.weight.data[token] = 60_000
    for layer in backbone.layers:
        layer.mlp.down_proj.weight.data *= 3000
    with pytest.raises(InputError, match=r"texts\[[01]\]: .* no finite vector .* in float16: load"):
        made.encode(texts, precision=precision)
    with torch.no_grad(), pytest.raises(InputError, match="row 0"):
        ids = torch.tensor([[token, 1]])
        made.network(ids)


# ---- tokens beyond the embedding


@pytest.fixture
def decoder(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Callable[[Callable[[Any], Any]], Path]:
    """`decoder(change)`: a copy of the tiny decoder whose tokenizer was changed."""

    def make(change: Callable[[Any], Any]) -> Path:
        import shutil

        folder = tmp_path / "changed"
        shutil.copytree(tiny_decoder("llama"), folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda t: t.add_tokens(["<a>", "<b>"]), "2 are missing"),
        (lambda t: t.add_special_tokens({"pad_token": "<pad>"}), "1 are missing"),
    ],
    ids=["added tokens", "pad"],
)
def test_tokens_that_the_model_has_no_embedding_for_are_refused(
    change: Any, missing: str, decoder: Any, tiny_embedder: Any, tmp_path: Path
) -> None:
    folder = decoder(change)
    with pytest.raises(InputError, match=missing):
        Embedder.from_decoder(folder)
    tiny_embedder("mean").save(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_text((folder / name).read_text())
    with pytest.raises(InputError, match=missing):
        Embedder.load(tmp_path / "saved")


# ---- positions

_ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"factor": 4.0},
}
_SWITCHING = {"dynamic", "longrope"}


@pytest.fixture
def of_rope(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Callable[..., Path]:
    """`of_rope("yarn", by_layer=False)`: a tiny decoder with this kind of rope; it was trained for 32 positions."""

    def make(kind: str, by_layer: bool = False) -> Path:
        base = tiny_decoder("gemma3" if by_layer else "llama")
        rope = {"rope_type": kind, "rope_theta": 10_000.0, **_ROPE[kind]}
        plain = {"rope_type": "default", "rope_theta": 10_000.0}
        config = transformers.AutoConfig.from_pretrained(base)
        config.max_position_embeddings = 32 if kind == "dynamic" else 64
        config.rope_parameters = {"full_attention": rope, "sliding_attention": plain} if by_layer else rope
        folder = tmp_path / f"{kind}-{by_layer}"
        transformers.AutoModelForCausalLM.from_pretrained(base, config=config).save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(folder)
        return folder

    return make


def test_every_kind_of_rope_is_known() -> None:
    assert {"default", *ROPE_INIT_FUNCTIONS} == _ROPE.keys()


@torch.inference_mode()
def alone(made: Embedder, folder: Path, texts: list[str], limit: int) -> NDArray[np.float32]:
    """transformers alone, one text at a time, its pooled tokens averaged."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = False
    vectors = []
    for text in texts:
        network = AutoModel.from_pretrained(folder, config=config).eval()
        states = network(input_ids=made.tokenize([text], max_tokens=limit).ids_T[None]).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("kind", _ROPE)
def test_a_text_is_read_by_its_own_length_or_refused(kind: str, of_rope: Callable[..., Path]) -> None:
    folder = of_rope(kind)
    longest = 32 if kind in _SWITCHING else 64
    if kind in _SWITCHING:
        with pytest.raises(InputError, match="32"):
            Embedder.from_decoder(folder, pooling="mean", max_tokens=48)
    made = Embedder.from_decoder(folder, pooling="mean", max_tokens=longest)
    texts = ["tides", "how do tides work? " * 2, "the moon and the sun " * 30]
    together = made.encode(texts)
    np.testing.assert_allclose(together, np.concatenate([made.encode([text]) for text in texts]), atol=1e-5)
    np.testing.assert_allclose(together, alone(made, folder, texts, longest), atol=2e-5)
    with pytest.raises(InputError, match=f"max_tokens={longest + 1}"):
        made.encode(texts, max_tokens=longest + 1)


def test_so_is_one_whose_layers_have_ropes_of_their_own(of_rope: Callable[..., Path], tmp_path: Path) -> None:
    folder = of_rope("longrope", by_layer=True)
    with pytest.raises(InputError, match="beyond 32 tokens the rotary frequencies"):
        Embedder.from_decoder(folder, pooling="mean", max_tokens=48)
    made = Embedder.from_decoder(folder, pooling="mean", max_tokens=32)
    made.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "embedwright.json").read_text())
    settings["contract"]["max_tokens"] = 48
    (tmp_path / "saved" / "embedwright.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="beyond 32 tokens the rotary frequencies"):
        Embedder.load(tmp_path / "saved")


def test_the_probe_finds_frequencies_that_go_by_the_batch(of_rope: Callable[..., Path]) -> None:
    """As of a kind that nobody knows: the limit is taken off, and the contract reads beyond it."""
    from embedwright.model.verify import probe

    network = Embedder.from_decoder(of_rope("longrope"), pooling="mean", max_tokens=32).network
    probe.check(network)
    network.longest = 1000
    network.contract = network.contract.model_copy(update={"max_tokens": 64})
    with pytest.raises(probe.ProbeError, match="a long text changes the states of others"):
        probe.check(network)


# ---- adapters


def test_experts_that_get_no_adapter_are_said(caplog: pytest.LogCaptureFixture) -> None:
    from embedwright.model.adapters.lora import add_lora

    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    backbone = AutoModel.from_config(config)
    experts = [name for name, parameter in backbone.named_parameters() if parameter.ndim == 3]
    add_lora(backbone, rank=2, alpha=4, dropout=0.0)
    said = [record.getMessage() for record in caplog.records if "get no adapter" in record.getMessage()]
    assert experts and len(said) == 1 and "layers.0.mlp" in said[0]


def test_nothing_is_said_of_plain_models(tiny_embedder: Any, caplog: pytest.LogCaptureFixture) -> None:
    tiny_embedder("latent").add_lora(2)
    assert not caplog.records
