"""What other programs make of a saved folder: its keys, models whose prompt is pooled, and what the doctor says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from embedwright.model.embedder import Embedder
from embedwright.model.interop.readers import check_readers, sides
from embedwright.model.verify.doctor import examine_name
from embedwright.text import Contract

TEXTS = ["how do tides work?", "a", "  spaces and\na new line ", "漢字 🙂", "</s> inside", "far too long " * 40]
TASK = "Find the tide"
Make = Callable[..., Embedder]


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@torch.inference_mode()
def as_a_server(folder: Path, texts: list[str], prompt: str, limit: int) -> NDArray[np.float32]:
    """transformers alone: the prompt is part of the string, and every token is pooled."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode"]
    vectors = []
    for text in texts:
        rows = tokenizer(prompt + text, truncation=True, max_length=limit, return_tensors="pt")
        states = model(input_ids=rows["input_ids"]).last_hidden_state[0]
        vectors.append(states.mean(0) if pooling == "mean" else states[-1])
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1).numpy()


# ---- models whose prompt is pooled


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_server_that_pools_every_token_gives_our_vectors(
    pooling: str, bos: bool, tiny_embedder: Make, tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, bos=bos, pool_prompt=True, max_tokens=48)
    folder = tmp_path / "saved"
    model.save(folder)
    other = SentenceTransformer(str(folder), device="cpu")
    assert other[1].include_prompt and model.contract.mask_rule == "all"
    for task, prompt in ((TASK, model.contract.prefix(TASK)), (None, "")):
        expected = as_a_server(folder, TEXTS, prompt, 48)
        np.testing.assert_allclose(model.encode(TEXTS, task), expected, atol=1e-5)
        np.testing.assert_allclose(Embedder.load(folder).encode(TEXTS, task), expected, atol=1e-5)
        np.testing.assert_allclose(other.encode(TEXTS, prompt=prompt or None), expected, atol=1e-5)
    assert model.tokenize(TEXTS, TASK).pool_mask_T.all()
    ok, line = check_readers(folder) or (False, "")
    assert ok and "text-embeddings-inference and vLLM: queries and documents" in line


def test_it_goes_for_our_own_format_too(tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder("latent", bos=True, pool_prompt=True, max_tokens=48)
    folder = tmp_path / "saved"
    model.save(folder)
    network, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    other = SentenceTransformer(str(folder), device="cpu")
    prompt = model.contract.prefix(TASK)
    with torch.inference_mode():
        rows = tokenizer(TEXTS, prefix=prompt)
        assert torch.equal(rows["pool_mask"], rows["attention_mask"])
        np.testing.assert_allclose(network(**rows).pooler_output, model.encode(TEXTS, TASK), atol=1e-5)
        del rows["pool_mask"]  # as another tokenizer would give them
        np.testing.assert_allclose(network(**rows).pooler_output, model.encode(TEXTS, TASK), atol=1e-5)
    np.testing.assert_allclose(other.encode(TEXTS, prompt=prompt), model.encode(TEXTS, TASK), atol=1e-5)
    ok, line = check_readers(folder) or (False, "")
    assert ok and "do not know this format" in line


def test_pooling_the_prompt_is_another_vector_of_queries_alone(tiny_embedder: Make) -> None:
    with_prompt, without = tiny_embedder("mean", pool_prompt=True), tiny_embedder("mean")
    np.testing.assert_allclose(with_prompt.encode(TEXTS), without.encode(TEXTS), atol=1e-6)
    assert np.abs(with_prompt.encode(TEXTS, TASK) - without.encode(TEXTS, TASK)).max() > 0.01


def test_a_prompt_that_fills_the_length_is_an_error_still(tiny_embedder: Make) -> None:
    with pytest.raises(ValueError, match=r"texts\[0\]: the instruction"):
        tiny_embedder("mean", pool_prompt=True).encode(["tides"], "a task", max_tokens=6)


@pytest.mark.parametrize(
    ("pooling", "contract", "expected"),
    [
        ("last", {"bos_ids": (0,), "document_template": "text: "}, "queries and documents"),
        ("mean", {"bos_ids": (0,), "document_template": "text: ", "mask_rule": "all"}, "queries and documents"),
        ("mean", {"mask_rule": "boundary"}, "documents alone"),
        ("mean", {"mask_rule": "boundary", "document_template": "text: "}, None),
        ("mean", {"bos_ids": (0,)}, None),
        ("mean", {"mask_rule": "count"}, None),
    ],
)
def test_the_sides_on_which_pooling_all_is_right(pooling: str, contract: dict[str, Any], expected: str | None) -> None:
    assert sides(Contract(eos_id=1, **contract), pooling) == expected


# ---- keys that others read


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_stock_folder_says_it_in_each_readers_key(
    family: str, attention: Any, tiny_embedder: Make, tmp_path: Path
) -> None:
    """And with that key transformers itself computes what it did: its sdpa run gives our vectors."""
    model = tiny_embedder("mean", family=family, attention=attention)
    folder = tmp_path / "saved"
    model.save(folder)
    config, bidirectional = config_of(folder), attention == "bidirectional"
    assert config["is_causal"] is not bidirectional
    by_flag = family in ("llama", "mistral", "qwen3") and bidirectional
    assert bool(config.get("use_bidirectional_attention")) is by_flag
    texts = [text for text in TEXTS if "</s>" not in text][:4]
    np.testing.assert_allclose(model.encode(texts), as_a_server(folder, texts, "", 512), atol=2e-5)
    ok, line = check_readers(folder) or (False, "")
    served = by_flag or family == "qwen2" or not bidirectional
    assert ok and ("text-embeddings-inference and vLLM: documents alone" in line) is served


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_servers_find_the_pooling_and_the_length(pooling: str, tiny_embedder: Make, tmp_path: Path) -> None:
    """As vLLM before August 2026 and text-embeddings-inference read them: by names and keys from before
    sentence-transformers 5.4."""
    tiny_embedder(pooling, max_tokens=48).save(tmp_path / "saved")
    modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
    paths = {module["type"]: module["path"] for module in modules}
    pools = json.loads((tmp_path / "saved" / paths["sentence_transformers.models.Pooling"] / "config.json").read_text())
    assert "sentence_transformers.models.Normalize" in paths
    true = [key for key, value in pools.items() if value is True]
    assert true == [{"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}[pooling]]
    assert all(pools[f"pooling_mode_{key}"] is False for key in ("cls_token", "max_tokens", "mean_sqrt_len_tokens"))
    lengths = json.loads((tmp_path / "saved" / "sentence_bert_config.json").read_text())
    assert (lengths["max_seq_length"], lengths["do_lower_case"]) == (48, False)
    assert config_of(tmp_path / "saved")["architectures"] == ["LlamaModel"]


def test_the_key_does_not_outlive_its_meaning(tiny_embedder: Make, tmp_path: Path) -> None:
    """A causal model from a bidirectional folder must not be served bidirectional."""
    tiny_embedder("mean").save(tmp_path / "both")
    again = Embedder.load(tmp_path / "both")
    assert not hasattr(again.network.backbone.config, "use_bidirectional_attention")
    again.save(tmp_path / "again")
    assert config_of(tmp_path / "again")["use_bidirectional_attention"] is True
    assert again.fingerprint() == tiny_embedder("mean").fingerprint()
    Embedder.from_decoder(tmp_path / "both", pooling="mean", attention="causal").save(tmp_path / "causal")
    assert "use_bidirectional_attention" not in config_of(tmp_path / "causal")


def test_the_doctor_names_who_reads_a_folder_wrong(tiny_embedder: Make, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    tiny_embedder("last").save(folder)

    def found() -> tuple[bool, str]:
        return next((f.ok, f.detail) for f in examine_name(str(folder)) if f.name == "other programs")

    assert found()[0] and "text-embeddings-inference and vLLM: queries and documents" in found()[1]
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": False}))
    assert not found()[0] and "read as causal" in found()[1]
    (folder / "config.json").write_text(json.dumps(config))
    pooling = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))  # as sentence-transformers 6 saves it
    assert not found()[0] and "older keys" in found()[1]
    assert check_readers(Path(__file__).parents[3] / "parity" / "fixtures" / "nvembed-tiny-v2") is None
