"""A hostile folder of every format that is read: an InputError or the honest vectors; nothing written, nothing run.

`FORMATS` makes one sound folder each, `ATTACKS` spoils a copy of it. GGUF files: `test_gguf.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from embedwright.compress.weights import compress_weights
from embedwright.encoders.open import open_encoder
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.model.formats.open import outline
from embedwright.model.quantized import INT8

FIXTURES = Path(__file__).parents[3] / "parity" / "fixtures"
TEXTS = ["how do tides work?", "the moon"]
FORMATS = ["ours", "mean", "last", "adapter", "peft", "nvembed", "qwen3-embedding", "quantized"]
FORMATS += ["sentence-transformers", "base"]
ADAPTERS = {"adapter", "peft"}
NO_FAMILY_OF_OURS = {"sentence-transformers", "base"}
CODES = "backbone.layers.0.mlp.down_proj.codes"
MARKER = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


@pytest.fixture(scope="module")
def sound(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_embedder: Callable[..., Embedder],
    tiny_decoder: Callable[..., Path],
    family_folder: Callable[[str], Path],
    make_tokenizer: Callable[..., Any],
) -> dict[str, Path]:
    """Format -> a folder that opens."""
    root = tmp_path_factory.mktemp("sound")
    for pooling, name in (("latent", "ours"), ("mean", "mean"), ("last", "last")):
        tiny_embedder(pooling).save(root / name)
    compress_weights(root / "ours", root / "quantized", INT8)
    for base, name in (("ours", "adapter"), ("mean", "peft")):
        model = Embedder.load(root / base).add_lora(rank=2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter_name, parameter in model.network.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.1)
        model.save(root / name)
    for ours in ("embedwright.json", "base_samples.safetensors", "selftest.json"):
        (root / "peft" / ours).unlink()
    shutil.copytree(FIXTURES / "nvembed-tiny-v1", root / "nvembed")
    shutil.copytree(family_folder("qwen3-embedding"), root / "qwen3-embedding")
    shutil.copytree(tiny_decoder("llama"), root / "base")
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(root / "sentence-transformers")
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), pad_token="</s>").save_pretrained(
        root / "sentence-transformers"
    )
    pooling_folder = root / "sentence-transformers" / "1_Pooling"
    pooling_folder.mkdir()
    (pooling_folder / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}')
    write_json(
        root / "sentence-transformers" / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
    )
    return {name: root / name for name in FORMATS}


@pytest.fixture(scope="module")
def honest(sound: dict[str, Path]) -> dict[str, Any]:
    return {name: opened(name, folder).encode(TEXTS) for name, folder in sound.items()}


def opened(name: str, folder: Path) -> Any:
    if name == "base":
        return Embedder.from_decoder(folder, pooling="mean")
    return open_encoder(str(folder)) if name == "sentence-transformers" else Embedder.load(folder)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def edit(file: Path, **values: Any) -> None:
    write_json(file, json.loads(file.read_text()) | values)


def weights_of(folder: Path) -> Path:
    return next(file for file in folder.glob("*model.safetensors"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor], str], Any]) -> None:
    """`change` gets the tensors and the name of a matrix among them, which is not the LM head."""
    file = weights_of(folder)
    tensors = load_file(file)
    matrices = sorted(name for name, tensor in tensors.items() if tensor.dim() == 2 and name.endswith("weight"))
    change(tensors, next(name for name in matrices if not name.startswith("lm_head")))
    save_file(tensors, file, metadata={"format": "pt"})


def move_out(folder: Path, file: Path) -> Path:
    """The file moved beside the folder."""
    return file.rename(folder.parent / f"outside-{file.name}")


def link_out(folder: Path, file: Path) -> None:
    file.symlink_to(move_out(folder, file))


def index_names(folder: Path, name: Callable[[Path], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    outside = move_out(folder, folder / "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, name(outside))})


def settings_of(folder: Path) -> Path:
    """The file with our contract and pooling."""
    ours = folder / "embedwright.json"
    return ours if ours.exists() else folder / "config.json"


# name -> what is done to the folder, and the formats that have no such thing
ATTACKS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "index with ..": (lambda f: index_names(f, lambda out: f"../{out.name}"), ADAPTERS),
    "index with an absolute name": (lambda f: index_names(f, str), ADAPTERS),
    "index that is broken": (
        lambda f: (index_names(f, str), (f / "model.safetensors.index.json").write_text("{")),
        ADAPTERS,
    ),
    "weights linked out": (lambda f: link_out(f, weights_of(f)), set()),
    "config linked out": (lambda f: link_out(f, f / "config.json"), ADAPTERS),
    "adapter config linked out": (lambda f: link_out(f, f / "adapter_config.json"), set(FORMATS) - ADAPTERS),
    "tokenizer linked out": (lambda f: link_out(f, f / "tokenizer.json"), ADAPTERS),
    "no weights": (lambda f: weights_of(f).unlink(), set()),
    "a weight missing": (lambda f: edit_weights(f, lambda t, name: t.pop(name)), set()),
    # sentence-transformers opens checkpoints with heads that it does not use
    "a weight too many": (
        lambda f: edit_weights(f, lambda t, name: t.update({f"{name}.more.weight": torch.zeros(2)})),
        {"sentence-transformers"},
    ),
    "a wrong shape": (lambda f: edit_weights(f, lambda t, name: t.update({name: torch.zeros(3, 5)})), set()),
    "whole numbers": (lambda f: edit_weights(f, lambda t, name: t.update({name: t[name].long()})), set()),
    "codes that are floats": (
        lambda f: edit_weights(f, lambda t, name: t.update({CODES: t[CODES].float()})),
        set(FORMATS) - {"quantized"},
    ),
    "codes of another layer": (
        lambda f: edit_weights(f, lambda t, name: t.update({CODES: t[CODES.replace("down", "up")].clone()})),
        set(FORMATS) - {"quantized"},
    ),
    "a scheme that is none": (
        lambda f: edit(f / "config.json", quantization={"bits": 3}),
        set(FORMATS) - {"quantized"},
    ),
    "a scheme of the wrong type": (lambda f: edit(f / "config.json", quantization=8), set(FORMATS) - {"quantized"}),
    "no scheme": (lambda f: edit(f / "config.json", quantization=None), set(FORMATS) - {"quantized"}),
    "a scheme and no codes": (lambda f: edit(f / "config.json", quantization={"bits": 8}), set(FORMATS) - {"ours"}),
    "weights cut": (lambda f: weights_of(f).write_bytes(weights_of(f).read_bytes()[:-7]), set()),
    "weights that are text": (lambda f: weights_of(f).write_text("version https://git-lfs.github.com/spec/v1"), set()),
    "another model's shard": (lambda f: shutil.copy(weights_of(f), f / "model-00002-of-00002.safetensors"), ADAPTERS),
    "another model's index": (
        lambda f: write_json(f / "model.safetensors.index.json", {"weight_map": {"a": "model.safetensors"}}),
        set(),
    ),
    "an adapter's config": (
        lambda f: write_json(f / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "org/base"}),
        ADAPTERS,
    ),
    "a whole model's weights": (
        lambda f: save_file({"a": torch.zeros(2)}, f / "model.safetensors"),
        set(FORMATS) - ADAPTERS,
    ),
    "a stock folder's settings": (
        lambda f: write_json(f / "embedwright.json", {"contract": {"eos_id": 1}, "pooling": {"kind": "mean"}}),
        set(FORMATS) - ADAPTERS,
    ),
    "config that is broken": (lambda f: (f / "config.json").write_text('{"model_type": '), ADAPTERS),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), ADAPTERS),
    "config of no model": (lambda f: (f / "config.json").write_text("{}"), ADAPTERS | {"sentence-transformers"}),
    "weights named by the config": (
        lambda f: edit(f / "config.json", transformers_weights="../x.safetensors"),
        ADAPTERS,
    ),
    "sizes of the wrong type": (
        lambda f: edit(
            f / "config.json", hidden_size="x", backbone={"model_type": "llama", "hidden_size": "x"}, text_config=3
        ),
        ADAPTERS,
    ),
    "a contract of the wrong type": (
        lambda f: edit(settings_of(f), contract={"max_tokens": "many"}),
        {"peft", "nvembed", "qwen3-embedding", *NO_FAMILY_OF_OURS},
    ),
    "a pooling that is none": (
        lambda f: edit(settings_of(f), pooling={"kind": "__import__"}),
        {"peft", "nvembed", "qwen3-embedding", *NO_FAMILY_OF_OURS},
    ),
    "settings without a contract": (
        lambda f: write_json(settings_of(f), {"model_type": "embedwright"}),
        {"peft", "nvembed", "qwen3-embedding", *NO_FAMILY_OF_OURS},
    ),
    "lengths of the wrong type": (
        lambda f: write_json(f / "sentence_bert_config.json", {"max_seq_length": "long"}),
        {
            "ours",
            "quantized",
            "mean",
            "last",
            "base",
            "sentence-transformers",
            *ADAPTERS,
        },  # not read, or by others alone
    ),
    "tokenizer that is broken": (lambda f: (f / "tokenizer.json").write_text("{}"), ADAPTERS),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ADAPTERS),
    "modules elsewhere": (
        lambda f: write_json(f / "modules.json", [{"path": "../x", "type": "sentence_transformers.models.Pooling"}]),
        ADAPTERS,
    ),
    "adapter of another kind": (lambda f: edit(f / "adapter_config.json", peft_type="BONE"), set(FORMATS) - ADAPTERS),
    "adapter without a base": (
        lambda f: edit(f / "adapter_config.json", base_model_name_or_path="../../../etc"),
        set(FORMATS) - ADAPTERS,
    ),
    "adapter of itself": (
        lambda f: edit(f / "adapter_config.json", base_model_name_or_path=str(f)),
        set(FORMATS) - ADAPTERS,
    ),
    "a thousand million layers": (
        lambda f: edit(
            f / "config.json",
            num_hidden_layers=10**9,
            backbone=json.loads((f / "config.json").read_text()).get("backbone", {}) | {"num_hidden_layers": 10**9},
            text_config={"num_hidden_layers": 10**9},
        ),
        ADAPTERS,
    ),
    "a record that is broken": (
        lambda f: (f / "selftest.json").write_text('{"texts": [{"text": 3}]}'),
        {"peft", "nvembed", "qwen3-embedding", *NO_FAMILY_OF_OURS},
    ),
    "a record of wider vectors": (
        lambda f: write_json(
            f / "selftest.json",
            {"dtype": "float32", "texts": [{"text": "a", "ids": [1], "pooled": 1, "vector": [0.0] * 99}] * 4},
        ),
        {"peft", "nvembed", "qwen3-embedding", *NO_FAMILY_OF_OURS},
    ),
    "adapter of a rank that is none": (lambda f: edit(f / "adapter_config.json", r=-1), set(FORMATS) - ADAPTERS),
    "adapter of modules that are none": (
        lambda f: edit(f / "adapter_config.json", target_modules=3),
        set(FORMATS) - ADAPTERS,
    ),
}


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file and link below `root`, with size and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(root))] = (state.st_size, state.st_mtime_ns) if not path.is_dir() else (0, 0)
    return found


@pytest.fixture
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("nobody_asks")
def test_a_hostile_folder_is_refused(name: str, attack: str, sound: dict[str, Path], tmp_path: Path) -> None:
    spoil, not_for = ATTACKS[attack]
    if name in not_for:
        pytest.skip("this format has no such file")
    folder = Path(shutil.copytree(sound[name], tmp_path / "in" / name))
    spoil(folder)
    before = tree(tmp_path)
    with pytest.raises(InputError) as raised:
        opened(name, folder)
    assert len(str(raised.value)) > 20 and "Traceback" not in str(raised.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ADAPTERS])
@pytest.mark.usefixtures("nobody_asks")
def test_code_in_a_folder_is_never_run(
    name: str, sound: dict[str, Path], honest: dict[str, Any], tmp_path: Path
) -> None:
    """Under a type that transformers knows, its own code is used; under another one the folder is refused."""
    folder = Path(shutil.copytree(sound[name], tmp_path / "in" / name))
    code = MARKER.format(str(tmp_path / "marker"))
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil", "evil"):
        (folder / f"{module}.py").write_text(
            f"{code}class Evil:\n    def __init__(self, *a, **k): pass\n    @classmethod\n"
            "    def from_pretrained(cls, *a, **k): return cls()\n    load = from_pretrained\n"
        )
    auto_map = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    edit(folder / "config.json", auto_map=auto_map)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    before = tree(tmp_path)
    np.testing.assert_allclose(opened(name, folder).encode(TEXTS), honest[name], atol=1e-6)
    edit(folder / "config.json", model_type="evil", architectures=["Evil"])
    with pytest.raises(InputError, match=r"code|not an embedder|not a config"):
        opened(name, folder)
    edit(folder / "config.json", **json.loads((sound[name] / "config.json").read_text()))
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}])
    if name == "sentence-transformers":
        with pytest.raises(InputError, match="sentence-transformers"):
            opened(name, folder)
    after = tree(tmp_path)
    assert not (tmp_path / "marker").exists() and before.keys() | {f"in/{name}/modules.json"} == after.keys() | {
        f"in/{name}/modules.json"
    }


@pytest.mark.parametrize("attack", ["config that is broken", "a contract of the wrong type", "config linked out"])
@pytest.mark.parametrize("name", ["ours", "mean", "adapter", "nvembed"])
def test_what_is_told_without_weights_is_checked_too(
    name: str, attack: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    spoil, not_for = ATTACKS[attack]
    if name in not_for:
        pytest.skip("this format has no such file")
    folder = Path(shutil.copytree(sound[name], tmp_path / name))
    spoil(folder)
    with pytest.raises(InputError):
        outline(str(folder))


# ---- through other libraries


@pytest.mark.parametrize("attack", ["a weight missing", "a weight too many", "a wrong shape"])
@pytest.mark.parametrize("library", ["AutoModel", "sentence-transformers"])
def test_other_libraries_get_no_made_up_weights(
    library: str, attack: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    folder = Path(shutil.copytree(sound["ours"], tmp_path / "ours"))
    ATTACKS[attack][0](folder)
    open_there = AutoModel.from_pretrained if library == "AutoModel" else SentenceTransformer
    for options in ({}, {"ignore_mismatched_sizes": True}) if library == "AutoModel" else ({},):
        with pytest.raises(InputError, match=r"lacks|no place|has the shape"):
            open_there(str(folder), **options)
