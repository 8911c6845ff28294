"""Saved folders: the same vectors when loaded, and in sentence-transformers where this package cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from embedwright.model.embedder import Embedder
from embedwright.model.interop.save import opens_as_stock
from embedwright.model.pooling import WEIGHTLESS, Kind
from embedwright.text import BOUNDARY_TEMPLATE

POOLINGS = get_args(Kind)
TASK = "Given a question, retrieve passages"
TEXTS = [
    "how do tides work?",
    "a",
    "naïve café, Straße, 漢字かな 🙂🙂🏽",
    "\nleading newline",
    "  leading and trailing white space \n\n",
    "far too long " * 60,
    "</s> and <s> inside, then </s>",
    "Query:\nQuery:\n",
    " \n",
    "",
]
MAX_TOKENS = 40


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- there and back


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_loaded_model_is_the_saved_one(
    pooling: Any, bos: bool, attention: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, "mistral", bos, attention=attention, max_tokens=MAX_TOKENS)
    model.save(tmp_path / "new" / "folder")
    loaded = Embedder.load(tmp_path / "new" / "folder")
    assert loaded.contract == model.contract and loaded.network.pooling == model.network.pooling
    assert loaded.network.backbone.config.is_causal == (attention == "causal")
    before, after = model.network.state_dict(), loaded.network.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    for task in (None, TASK):
        np.testing.assert_allclose(loaded.encode(TEXTS, task), model.encode(TEXTS, task), atol=1e-6)
    loaded.save(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "new" / "folder")


@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_every_family_survives(
    family: str, pooling: Any, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, family, layers=2)
    model.save(tmp_path / "saved")
    loaded = Embedder.load(str(tmp_path / "saved"))
    assert loaded.network.backbone.config.num_hidden_layers == 2
    assert loaded.fingerprint() == model.fingerprint()
    np.testing.assert_allclose(loaded.encode(TEXTS, TASK), model.encode(TEXTS, TASK), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_dtype_is_the_stored_one_unless_asked(
    pooling: Any, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder(pooling, dtype="bfloat16").save(tmp_path / "saved")

    def dtype(**options: Any) -> torch.dtype:
        return Embedder.load(tmp_path / "saved", **options).network.backbone.norm.weight.dtype

    assert (dtype(), dtype(dtype="float32")) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("asked", [None, "bfloat16", "float16", "float32"])
def test_a_head_that_was_stored_in_float32_stays_in_it(
    asked: str | None, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder("latent", dtype="bfloat16")
    assert {p.dtype for p in model.network.head.parameters()} == {torch.float32}
    model.save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved", dtype=asked)
    assert loaded.network.backbone.norm.weight.dtype == getattr(torch, asked or "bfloat16")
    for name, parameter in model.network.head.named_parameters():
        assert torch.equal(loaded.network.head.get_parameter(name), parameter)
    if asked in (None, "bfloat16"):
        np.testing.assert_allclose(loaded.encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_a_head_of_the_backbones_type_goes_with_it(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("latent", dtype="bfloat16")
    model.network.head.bfloat16()
    model.save(tmp_path / "half")
    tiny_embedder("latent").save(tmp_path / "whole")

    def types(name: str, asked: str | None) -> set[torch.dtype]:
        return {p.dtype for p in Embedder.load(tmp_path / name, dtype=asked).network.parameters()}

    assert types("half", None) == types("whole", "bfloat16") == {torch.bfloat16}
    assert types("half", "float32") == types("whole", None) == {torch.float32}


def test_merged_adapters_are_in_the_saved_weights(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("latent")
    plain = model.encode(TEXTS)
    model.add_lora(rank=2, alpha=4)
    for name, parameter in model.network.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = model.encode(TEXTS)
    model.merge().save(tmp_path / "saved")
    loaded = Embedder.load(tmp_path / "saved").encode(TEXTS)
    np.testing.assert_allclose(loaded, adapted, atol=1e-5)
    assert np.abs(loaded - plain).max() > 1e-3


# ---- folders


def test_only_a_new_or_empty_folder_is_written_into(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("mean")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            model.save(tmp_path / name)
    assert files_of(tmp_path) == {"full/notes.txt", "file"}
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}  # nothing aside is left


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_saved_is_pickle_or_code(pooling: Any, tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    tiny_embedder(pooling).save(tmp_path / "saved")
    files = files_of(tmp_path / "saved")
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".jinja", ".txt"}
    assert "config.json" in files and "model.safetensors" in files
    for path in (tmp_path / "saved").rglob("*.json"):
        assert "auto_map" not in path.read_text()


@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_saving_leaves_the_model_as_it_was(
    pooling: Any, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling)
    model.tokenizer.chat_template = "{{ messages }}"
    before = model.encode(TEXTS, TASK), model.tokenizer("a")["input_ids"]
    model.save(tmp_path / "saved")
    assert model.tokenizer.chat_template == "{{ messages }}"
    assert model.tokenizer("a")["input_ids"] == before[1]
    np.testing.assert_array_equal(model.encode(TEXTS, TASK), before[0])
    assert not list((tmp_path / "saved").glob("*.jinja"))
    assert "chat_template" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bos", [False, True])
def test_the_format_is_stock_where_it_can_be(
    pooling: Any, bos: bool, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, bos=bos)
    model.save(tmp_path / "saved")
    stock = pooling in WEIGHTLESS and not bos
    assert opens_as_stock(model.network, model.text_tokenizer) == stock
    files = files_of(tmp_path / "saved")
    assert ("embedwright.json" in files) == stock
    assert {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Normalize/config.json"} <= files
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == ("llama" if stock else "embedwright")
    assert config.get("is_causal", False) is False


def test_a_template_that_melts_into_the_text_is_not_saved_as_stock(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder("mean")
    network = model.network
    network.contract = network.contract.model_copy(update={"query_template": "Instruct: {task}\nQuery: "})
    network.config.contract = network.contract.model_dump()
    assert not opens_as_stock(network, model.text_tokenizer)
    melted = Embedder(network, model.tokenizer)
    melted.save(tmp_path / "saved")
    np.testing.assert_allclose(
        Embedder.load(tmp_path / "saved").encode(TEXTS, TASK), melted.encode(TEXTS, TASK), atol=1e-6
    )


def test_automodel_opens_our_own_format(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("latent", "gemma3")
    model.save(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").model_type == "embedwright"
    opened = AutoModel.from_pretrained(tmp_path / "saved").eval()
    packed = model.tokenize(TEXTS[:3], TASK)
    with torch.no_grad():
        np.testing.assert_allclose(opened.embed(packed).numpy(), model.encode(TEXTS[:3], TASK), atol=1e-5)


# ---- plain sentence-transformers

OPEN_ELSEWHERE = """
import json, sys
sys.modules["embedwright"] = None  # importing it is an error from here on
import numpy as np
from sentence_transformers import SentenceTransformer
job = json.loads(sys.stdin.read())
for name, folder in job["folders"].items():
    model = SentenceTransformer(folder, device="cpu")
    assert model.max_seq_length == job["max_tokens"], model.max_seq_length
    found = {}
    for i, prompt in enumerate(job["prompts"]):
        prompted = {} if prompt is None else {"prompt": prompt}
        for batch_size in (1, 32):
            found[f"{i}-{batch_size}"] = model.encode(job["texts"], batch_size=batch_size, **prompted)
    np.savez(f"{folder}.npz", **found)
assert not any(name.startswith("embedwright.") for name in sys.modules)
"""


def test_plain_sentence_transformers_gives_the_same_vectors(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    pytest.importorskip("sentence_transformers")
    made = {
        f"{family}-{pooling}-{attention}": tiny_embedder(pooling, family, attention=attention, max_tokens=MAX_TOKENS)
        for family, pooling, attention in [
            ("llama", "mean", "bidirectional"),
            ("llama", "last", "bidirectional"),
            ("llama", "last", "causal"),
            ("mistral", "mean", "causal"),  # with its window
            ("qwen2", "mean", "bidirectional"),
            ("gemma3", "mean", "bidirectional"),
            ("cohere2", "mean", "bidirectional"),
        ]
    }
    for name, model in made.items():
        model.tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        model.save(tmp_path / name)
    prompts = [None, BOUNDARY_TEMPLATE.replace("{task}", TASK), "Query:\n", ""]
    job = {
        "folders": {name: str(tmp_path / name) for name in made},
        "texts": TEXTS,
        "prompts": prompts,
        "max_tokens": MAX_TOKENS,
    }
    ran = subprocess.run(
        [sys.executable, "-c", OPEN_ELSEWHERE],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    wrong = []
    for name, model in made.items():
        found = np.load(tmp_path / f"{name}.npz")
        for i, prompt in enumerate(prompts):
            expected = model.encode(TEXTS, prefix=prompt or "")
            for batch_size in (1, 32):
                errors = np.abs(found[f"{i}-{batch_size}"] - expected).max(axis=1)
                wrong += [(name, prompt, batch_size, TEXTS[j], errors[j]) for j in np.flatnonzero(~(errors < 1e-5))]
    assert not wrong


@pytest.mark.parametrize("pooling", ["latent", "mean"])
def test_no_path_of_this_machine_is_saved(tiny_embedder: Callable[..., Embedder], tmp_path: Path, pooling: str) -> None:
    tiny_embedder(pooling).save(tmp_path / "model")
    Embedder.load(tmp_path / "model").save(tmp_path / "again")
    for file in tmp_path.glob("*/**/*.json"):
        assert str(tmp_path) not in file.read_text() and "decoders" not in file.read_text()  # folders of model and base
