"""Checkpoints in the released layout of sizes that no fixture has: vectors against a plain forward, and memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralModel

from embedwright.model.embedder import Embedder

FIXTURES = Path(__file__).parent / "fixtures"
DECODER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
LATENTS = "latent_attention_model.latents"
TEXTS = ["a text", "  another, with spaces", "</s> inside", "many words " * 30]


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint in the released layout, by the names of its config."""

    hidden_size: int = 48
    intermediate_size: int = 80
    num_hidden_layers: int = 2
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 8
    latents: int = 10
    cross_heads: int = 8
    cross_dim: int = 12
    multiple: int = 4

    def shapes(self) -> dict[str, tuple[int, ...]]:
        d, inner, wide = self.hidden_size, self.cross_heads * self.cross_dim, self.multiple * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding_model.embed_tokens.weight": (2000, d)}
        for n in range(self.num_hidden_layers):
            layer = f"embedding_model.layers.{n}."
            for name, heads in (("q", self.num_attention_heads), ("k", self.num_key_value_heads)):
                shapes[f"{layer}self_attn.{name}_proj.weight"] = (heads * self.head_dim, d)
            shapes[f"{layer}self_attn.v_proj.weight"] = (self.num_key_value_heads * self.head_dim, d)
            shapes[f"{layer}self_attn.o_proj.weight"] = (d, self.num_attention_heads * self.head_dim)
            for name in ("gate", "up"):
                shapes[f"{layer}mlp.{name}_proj.weight"] = (self.intermediate_size, d)
            shapes[f"{layer}mlp.down_proj.weight"] = (d, self.intermediate_size)
            shapes |= {f"{layer}{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        first, second = (f"latent_attention_model.cross_attend_blocks.{n}." for n in (0, 1))
        for norm in (f"{first}norm", f"{first}norm_context", f"{second}norm"):
            shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
        return shapes | {
            "embedding_model.norm.weight": (d,),
            LATENTS: (self.latents, d),
            f"{first}fn.to_q.weight": (inner, d),
            f"{first}fn.to_kv.weight": (2 * inner, d),
            f"{first}fn.to_out.weight": (d, inner),
            f"{second}fn.net.0.weight": (2 * wide, d),
            f"{second}fn.net.0.bias": (2 * wide,),
            f"{second}fn.net.2.weight": (d, wide),
            f"{second}fn.net.2.bias": (d,),
        }


def write_checkpoint(folder: Path, sizes: Sizes, dtype: torch.dtype, shard_elements: int = 2**62) -> int:
    """Random weights in the released layout with the tokenizer of v2; their number. One shard in memory at a time."""
    shutil.copytree(FIXTURES / "nvembed-tiny-v2", folder, ignore=shutil.ignore_patterns("expected.*", "model*", "*.md"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update({name: getattr(sizes, name) for name in DECODER_SIZES})
    config["latent_attention_config"] = {
        "model_type": "latent_attention",
        "num_latents_value": sizes.latents,
        "num_cross_heads": sizes.cross_heads,
        "cross_dim_head": sizes.cross_dim,
        "hidden_dim": sizes.hidden_size,
        "latent_dim": sizes.hidden_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shapes = sizes.shapes()
    for name, shape in shapes.items():
        deviation = shape[-1] ** -0.5 if len(shape) == 2 and name != LATENTS else 0.1
        values = torch.empty(shape, dtype=dtype).normal_(0, 1 if name == LATENTS else deviation, generator=generator)
        shard[name] = values + 1 if "norm" in name and name.endswith(".weight") else values
        if name == list(shapes)[-1] or sum(t.numel() for t in shard.values()) >= shard_elements:
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(int(np.prod(shape)) for shape in shapes.values())


def plain_forward(weights: dict[str, torch.Tensor], sizes: Sizes, ids: torch.Tensor, masked: int) -> torch.Tensor:
    """The embedding of one text, written down from the notes: stock eager Mistral, then the head, a step a line."""
    config = MistralConfig(
        **{name: getattr(sizes, name) for name in DECODER_SIZES},
        vocab_size=2000,
        rms_norm_eps=1e-5,
        sliding_window=None,
        is_causal=False,
        attn_implementation="eager",
    )
    decoder = MistralModel(config).eval()
    start = "embedding_model."
    decoder.load_state_dict({n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)})
    x = decoder(ids[None]).last_hidden_state[0]
    first, second = (f"latent_attention_model.cross_attend_blocks.{n}." for n in (0, 1))

    def norm(of: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(of, of.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    q = norm(x, f"{first}norm") @ weights[f"{first}fn.to_q.weight"].T
    k, v = (norm(weights[LATENTS], f"{first}norm_context") @ weights[f"{first}fn.to_kv.weight"].T).chunk(2, -1)
    q, k, v = (t.view(len(t), sizes.cross_heads, sizes.cross_dim).transpose(0, 1) for t in (q, k, v))
    mixed = ((q @ k.mT) / sizes.cross_dim**0.5).softmax(-1) @ v
    x = x + mixed.transpose(0, 1).flatten(1) @ weights[f"{first}fn.to_out.weight"].T
    wide = norm(x, f"{second}norm") @ weights[f"{second}fn.net.0.weight"].T + weights[f"{second}fn.net.0.bias"]
    value, gate = wide.chunk(2, -1)
    x = x + (value * F.gelu(gate)) @ weights[f"{second}fn.net.2.weight"].T + weights[f"{second}fn.net.2.bias"]
    return F.normalize(x[masked:].mean(0), dim=0)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(head_dim=16, num_attention_heads=5, num_key_value_heads=1),  # 80 wide inside a width of 48
        Sizes(num_key_value_heads=6, cross_heads=3, cross_dim=20, latents=33, multiple=2),
        Sizes(hidden_size=40, num_hidden_layers=1, num_attention_heads=4, head_dim=10, cross_heads=1, cross_dim=40),
    ],
)
def test_checkpoints_of_other_sizes(sizes: Sizes, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", sizes, torch.float32, shard_elements=20_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    model = Embedder.load(tmp_path / "model")
    for task in (None, "a task"):
        vectors = model.encode(TEXTS, task)
        for text, vector in zip(TEXTS, vectors, strict=True):
            packed = model.tokenize([text], task)
            masked = int((~packed.pool_mask_T).sum())
            with torch.no_grad():
                expected = plain_forward(weights, sizes, packed.ids_T, masked)
            np.testing.assert_allclose(vector, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("said", [{"model_type": "latent_attention"}, {}, None])
def test_without_a_word_there_are_eight_latent_heads(said: Any, tmp_path: Path) -> None:
    """As in the release, whose latent_attention_config has nothing but a model type, and no shape tells the heads."""
    for name, sizes in (("eight", Sizes()), ("four", Sizes(cross_heads=4))):
        write_checkpoint(tmp_path / name, sizes, torch.float32)
        expected = Embedder.load(tmp_path / name).encode(TEXTS, "a task")
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "latent_attention_config": said}))
        model = Embedder.load(tmp_path / name)
        assert model.network.pooling.heads == 8 and model.network.pooling.head_dim == sizes.cross_heads * 12 / 8
        # where they are not eight, they must be said
        assert np.allclose(model.encode(TEXTS, "a task"), expected, rtol=0, atol=1e-6) == (name == "eight")


# ---- memory

LOADING = """
import json, sys, threading, time
from pathlib import Path
from embedwright.model.embedder import Embedder

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

Embedder.load(sys.argv[3], device="cpu")  # of no size: what the libraries need on first use is there before
before, peak, done = anonymous(), 0, threading.Event()

def poll():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=poll)
thread.start()
model = Embedder.load(sys.argv[1], device="cpu", dtype=sys.argv[2] or None)
done.set()
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.network.parameters())
print(json.dumps({"peak": peak - before, "weights": weights, "dtype": str(next(model.network.parameters()).dtype)}))
"""


@pytest.mark.long
def test_loading_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """Anonymous memory of a process of its own, above what it had before, on 1.1 GB of float16 in several shards."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status: memory cannot be read here")
    sizes = Sizes(2048, 7168, 7, 16, 4, 128, 512, 8, 2048, 4)
    needed = 2 * sum(int(np.prod(shape)) for shape in sizes.shapes().values())
    if shutil.disk_usage(tmp_path).free < 2 * needed:
        pytest.skip(f"less than {2 * needed / 1e9:.1f} GB of disk")
    parameters = write_checkpoint(tmp_path / "large", sizes, torch.float16, shard_elements=100_000_000)
    assert parameters * 2 == needed >= 1e9
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 3
    for asked, size in (("", 2), ("float16", 2), ("bfloat16", 2), ("float32", 4)):
        tiny = FIXTURES / "nvembed-tiny-v2"
        command = [sys.executable, "-c", LOADING, str(tmp_path / "large"), asked, str(tiny)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        print(f"{asked or 'stored'}: peak {found['peak'] / 1e9:.3f} GB of {found['weights'] / 1e9:.3f} GB")
        assert found["dtype"] == f"torch.{asked or 'float16'}" and found["weights"] == parameters * size
        assert found["peak"] < 1.2 * found["weights"]
        if asked in ("bfloat16", "float32"):  # cast, so nothing of it is the mapped file: the measure does measure
            assert found["peak"] > 0.9 * found["weights"]
