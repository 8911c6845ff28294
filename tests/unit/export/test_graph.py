"""The graph in ONNX Runtime gives the model's vectors, in batches, lengths and paddings that were never traced."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from embedwright.errors import InputError
from embedwright.export import graph
from embedwright.model.embedder import Embedder
from embedwright.model.pooling import Kind
from embedwright.packing import pack
from embedwright.text import TokenizedText

pytestmark = pytest.mark.usefixtures("onnx_packages")

TOLERANCE = 1e-5
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma", "phi3", "cohere2")
ALL = [
    *itertools.product(["self"], FAMILIES, ["bidirectional", "causal"]),
    *((k, "llama", "causal") for k in get_args(Kind)),
]


def session_of(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def traced(model: Embedder, file: Path) -> Path:
    graph.write(graph.trace(model.network), file)
    return file


def padded(texts: list[TokenizedText], side: str, pad: int) -> dict[str, np.ndarray[Any, Any]]:
    """By hand, with an id that means something in place of pads."""
    longest = max(len(text.ids) for text in texts)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "pool_mask": []}
    for text in texts:
        pads = longest - len(text.ids)
        for name, values, filler in (
            ("input_ids", text.ids.tolist(), pad),
            ("attention_mask", [1] * len(text.ids), 0),
            ("pool_mask", text.pool.astype(int).tolist(), 1),  # what is no token is not pooled, whatever the mask says
        ):
            rows[name].append([filler] * pads + values if side == "left" else values + [filler] * pads)
    return {name: np.array(values, dtype=np.int64) for name, values in rows.items()}


def texts_of(lengths: list[int], seed: int) -> list[TokenizedText]:
    random = np.random.default_rng(seed)
    pools = [random.random(length) < 0.6 for length in lengths]
    for pool in pools:
        pool[random.integers(len(pool))] = True
    return [TokenizedText(random.integers(2, 400, len(pool)), pool) for pool in pools]


def check(model: Embedder, file: Path) -> None:
    """Compares the graph in `file` with the model."""
    session = session_of(file)
    for lengths, side in (([1], "right"), ([40, 1, 3, 40, 17], "right"), ([5, 64, 2], "left"), ([9, 9], "right")):
        texts = texts_of(lengths, len(lengths))
        vectors, states = session.run(None, feed := padded(texts, side, pad=7))
        with torch.inference_mode():
            expected = model.network.embed(pack(texts)).numpy()
        assert vectors.shape == expected.shape and np.abs(vectors - expected).max() <= TOLERANCE
        assert np.abs(expected - expected[:1]).max() > 0.05 or len(lengths) == 1  # the texts have different vectors
        # what a program that pools by the attention mask alone makes of the states
        mean = (states * feed["attention_mask"][..., None]).sum(1) / feed["attention_mask"].sum(1)[:, None]
        np.testing.assert_allclose(mean / np.linalg.norm(mean, axis=1)[:, None], expected, rtol=0, atol=TOLERANCE)
        # without a pool mask: what `forward` does without one, on the same padded rows
        del feed["pool_mask"]
        with torch.inference_mode():
            expected = model.network(**{k: torch.from_numpy(v) for k, v in feed.items()}).pooler_output.numpy()
        assert np.abs(session.run(["sentence_embedding"], feed)[0] - expected).max() <= TOLERANCE


def test_windows_in_both_directions_and_attention_in_the_head(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    """Tracing takes seconds: this one has the most that may go wrong."""
    model = tiny_embedder("self", "gemma3", bos=True, layers=2)
    check(model, traced(model, tmp_path / "model.onnx"))


@pytest.mark.long
@pytest.mark.parametrize(("pooling", "family", "attention"), ALL)
def test_every_family_and_every_pooling(
    pooling: str, family: str, attention: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, family, attention=attention)
    check(model, traced(model, tmp_path / "model.onnx"))


def test_the_latent_block_is_folded_and_the_model_stays_as_it_was(latent: Embedder, exported: Path) -> None:
    """And the graph names no file of this machine, which torch writes into every node."""
    import onnx

    check(latent, exported / "onnx" / "model.onnx")
    assert all(parameter.requires_grad for parameter in latent.network.parameters())
    assert type(latent.network.head).__name__ == "LatentPooling"
    written = onnx.load(exported / "onnx" / "model.onnx")
    onnx.checker.check_model(written, full_check=True)
    shapes = {tuple(tensor.dims) for tensor in written.graph.initializer}
    assert (32, 2 * 6) in shapes and (2 * 6, 32) in shapes  # width by heads times latents: the two folded matrices
    content = (exported / "onnx" / "model.onnx").read_bytes()
    assert not any(str(Path(file).parents[1]).encode() in content for file in (torch.__file__, __file__))
    names = {value.name: [size.dim_param for size in value.type.tensor_type.shape.dim] for value in written.graph.input}
    assert names["input_ids"] == names["attention_mask"] == ["batch", "sequence"]


@pytest.mark.long
def test_a_folded_model_has_the_same_graph(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("latent", "llama", bos=True).fold()
    check(model, traced(model, tmp_path / "model.onnx"))


def test_large_weights_lie_beside_the_graph(
    latent: Embedder, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    monkeypatch.setattr(graph, "INLINE", 10_000)
    graph.write(onnx_ir.load(exported / "onnx" / "model.onnx"), tmp_path / "model.onnx")
    check(latent, tmp_path / "model.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx_data"}
    weights = sum(parameter.numel() * 4 for parameter in latent.network.backbone.parameters())
    assert (tmp_path / "model.onnx_data").stat().st_size >= 0.9 * weights
    (tmp_path / "model.onnx_data").unlink()
    with pytest.raises(Exception, match=r"model\.onnx_data"):
        session_of(tmp_path / "model.onnx")


@pytest.mark.long
def test_a_decoder_that_cannot_be_traced_is_named(
    tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose computation depends on values, as that of an expert mixture may."""
    model = tiny_embedder("mean", "llama", layers=1)
    layer = type(model.network.backbone.layers[0])
    stock_forward = layer.forward

    def forward(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock_forward(self, hidden * 2 if hidden.sum() > 0 else hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(InputError, match="a 'llama' decoder cannot be traced as an ONNX graph"):
        graph.trace(model.network)
