"""Quantised weights on disk: the files read by hand, stock libraries on them, and every door of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from sentence_transformers import SentenceTransformer
from starlette.testclient import TestClient
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from embedwright.compress.weights import compress_weights
from embedwright.encoders.open import open_encoder
from embedwright.errors import InputError
from embedwright.index.build import build_index
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import check_embedder
from embedwright.model.formats.folder import SINGLE
from embedwright.model.formats.soup import soup
from embedwright.model.quantized import INT4, INT8, Bits
from embedwright.model.verify.doctor import examine
from embedwright.serve.app import create_app

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
TEXTS = ["how do tides work?", "a", "naïve café, 漢字 🙂", "The moon pulls at the sea. " * 8]
TASK = "Given a question, retrieve passages that answer it"
BITS = pytest.mark.parametrize("bits", [8, 4])

Made = Callable[[str, int], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tiny_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("mean", 4)`: the folder of a tiny model, in float32, and what it was compressed to."""

    @cache
    def saved(pooling: str) -> Path:
        folder = tmp_path_factory.mktemp("saved") / pooling
        base = tiny_decoder("llama", intermediate_size=64)
        model = Embedder.from_decoder(base, pooling=pooling, latents=6, heads=2, multiple=1)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in model.network.head.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        model.save(folder)
        return folder

    @cache
    def make(pooling: str, bits: Bits) -> tuple[Path, Path]:
        small = tmp_path_factory.mktemp("small") / f"{pooling}-{bits}"
        compress_weights(saved(pooling), small, INT8 if bits == 8 else INT4)
        return saved(pooling), small

    return make


def floats_of(folder: Path) -> dict[str, Tensor]:
    """The weights that a folder stands for, from its files alone."""
    tensors = load_file(folder / SINGLE)
    scheme = json.loads((folder / "config.json").read_text())["quantization"]
    floats = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "codes":
            whole = tensor.numpy()
            if scheme["bits"] == 4:
                codes = np.concatenate([whole % 16, whole // 16], axis=1).astype(np.int8) - 8
                whole = codes * np.repeat(tensors[f"{layer}.steps"].numpy(), 32, axis=1)
            turned, size = whole * tensors[f"{layer}.scales"].numpy(), whole.shape[1]
            block = min(scheme["rotation"], size & -size)
            turned = turned.reshape(-1, block) @ hadamard(block) / block**0.5
            floats[f"{layer}.weight"] = torch.from_numpy(turned.reshape(whole.shape).astype(np.float32))
        elif leaf not in ("scales", "steps"):
            floats[name] = tensor
    return floats


def vectors_of(model: Embedder) -> NDArray[np.float32]:
    return np.concatenate([model.encode(TEXTS, TASK), model.encode(TEXTS)])


# ---- the numbers


@BITS
def test_the_vectors_are_those_of_the_codes_times_the_scales(made: Made, tmp_path: Path, bits: Bits) -> None:
    """The codes, turned back into floats by hand, in the model's own folder, through sentence-transformers alone."""
    plain, small = made("mean", bits)
    shutil.copytree(plain, tmp_path / "by-hand")
    weights = {name.removeprefix("backbone."): tensor for name, tensor in floats_of(small).items()}
    save_file(weights, tmp_path / "by-hand" / SINGLE, metadata={"format": "pt"})
    stock = SentenceTransformer(str(tmp_path / "by-hand"), device="cpu")
    model = Embedder.load(small, backend="sdpa")  # without the faster products of a CPU, which round in other ways
    expected = [stock.encode(TEXTS, prompt=model.contract.prefix(TASK)), stock.encode(TEXTS)]
    assert np.abs(vectors_of(model) - np.concatenate(expected)).max() < 1e-5
    apart = np.abs(vectors_of(model) - vectors_of(Embedder.load(plain))).max()
    assert 1e-4 < apart < (0.02 if bits == 8 else 0.3), "quantised, and the same model all the same"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_a_model_in_few_bits_in_memory_is_the_one_on_disk(made: Made, tmp_path: Path, pooling: str, dtype: str) -> None:
    plain, small = made(pooling, 8)
    if dtype != "float32":
        Embedder.load(plain).save(tmp_path / "plain", dtype=dtype)
        plain, small = tmp_path / "plain", tmp_path / "small"
        compress_weights(plain, small, INT8)
    model, stored = Embedder.load(plain, dtype="int8"), Embedder.load(small)
    assert model.fingerprint() == stored.fingerprint()
    np.testing.assert_array_equal(vectors_of(model), vectors_of(stored))
    model.save(tmp_path / "saved")
    a, b = load_file(tmp_path / "saved" / SINGLE), load_file(small / SINGLE)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_4_bits_are_not_opened_as_8(made: Made) -> None:
    with pytest.raises(InputError, match=r"in 4 bits.*leave dtype out"):
        Embedder.load(made("mean", 4)[1], dtype="int8")
    stored = made("mean", 8)[1]
    assert Embedder.load(stored, dtype="int8").fingerprint() == Embedder.load(stored).fingerprint()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_in_few_bits_is_not_saved_in_another_type(made: Made, tmp_path: Path, dtype: str) -> None:
    """Its norms would be rounded, and its record would be of a network that no load makes."""
    with pytest.raises(InputError, match="leave dtype out"):
        Embedder.load(made("mean", 4)[1]).save(tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


# ---- the files


@BITS
@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_weights_stay_in_the_file_that_they_were_read_from(made: Made, pooling: str, bits: Bits) -> None:
    """No tensor is a copy: each lies in memory that the system maps from the file."""
    _, small = made(pooling, bits)
    model = Embedder.load(small)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"/{small.name}/{SINGLE}"):
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    state = model.network.state_dict()
    assert {name.rpartition(".")[2] for name in state} >= {"codes", "scales", "weight"}
    for name, tensor in state.items():
        first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(start <= first and last <= end for start, end in mapped), name


@BITS
def test_the_record_holds_the_quantised_weights(made: Made, tmp_path: Path, bits: Bits) -> None:
    """One wrong scale is refused when the folder is opened."""
    shutil.copytree(made("mean", bits)[1], tmp_path / "small")
    tensors = load_file(tmp_path / "small" / SINGLE)
    tensors["backbone.layers.1.mlp.up_proj.scales"][5] *= 2
    save_file(tensors, tmp_path / "small" / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="does not give the vectors that it was saved with"):
        Embedder.load(tmp_path / "small")


STOCK = """
import sys
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
for open in (AutoModel.from_pretrained, lambda folder: SentenceTransformer(folder, device="cpu")):
    try:
        open(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split())[:200])
    else:
        print("opened")
assert not any(name.startswith("embedwright") for name in sys.modules)
"""


def test_stock_libraries_refuse_the_folder(made: Made, tmp_path: Path) -> None:
    """Without this package, neither transformers nor sentence-transformers takes codes for weights."""
    small = made("mean", 4)[1]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STOCK, str(small)]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    assert len(lines) == 2 and all("`embedwright`" in line and "opened" not in line for line in lines), lines


# ---- the doors


@BITS
@pytest.mark.parametrize("pooling", ["mean", "latent"])
def test_every_proof_of_the_doctor_holds(made: Made, pooling: str, bits: Bits) -> None:
    """Among them AutoModel and sentence-transformers, once this package is imported."""
    small = made(pooling, bits)[1]
    findings = {finding.name: finding for finding in examine(Embedder.load(small), small)}
    assert {"through AutoModel", "through sentence-transformers", "as recorded when it was saved"} <= findings.keys()
    assert not [finding for finding in findings.values() if not finding.ok]


def test_a_saved_copy_has_the_same_weights(made: Made, tmp_path: Path) -> None:
    small = made("latent", 4)[1]
    model = Embedder.load(small)
    model.save(tmp_path / "again")
    a, b = load_file(small / SINGLE), load_file(tmp_path / "again" / SINGLE)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert Embedder.load(tmp_path / "again").fingerprint() == model.fingerprint()
    model.to_sentence_transformer().save(str(tmp_path / "st"))
    assert np.allclose(Embedder.load(tmp_path / "st").encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_an_index_knows_the_model_and_the_server_serves_it(made: Made, tmp_path: Path) -> None:
    plain, small = made("mean", 8)
    model = open_encoder(str(small))
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"_id": str(i), "text": t}) + "\n" for i, t in enumerate(TEXTS))
    )
    index = Index.open(build_index(model, tmp_path / "c.jsonl", tmp_path / "index"))
    (hits,) = index.search(model, TEXTS[1:2], k=1)
    assert hits[0].id == "1"
    with pytest.raises(ValueError, match="encoded by another model"):
        index.search(open_encoder(str(plain)), ["tides"])
    with TestClient(create_app(model, name="small", index=index), base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/embeddings", json={"model": "small", "input": TEXTS}).json()
    assert np.allclose([row["embedding"] for row in answer["data"]], model.encode(TEXTS), atol=1e-5)


def test_the_history_tells_what_was_done(made: Made) -> None:
    (step,) = json.loads((made("mean", 4)[1] / "config.json").read_text())["history"]
    cosine, error = step.pop("cosine"), step.pop("error")
    assert step == {"step": "weights", "of": "mean", "bits": 4} and 0.9 < cosine < 1 and 0.05 < error < 0.12


def test_a_released_nv_embed_is_compressed_with_its_head_folded(tmp_path: Path) -> None:
    plain = Embedder.load(FIXTURES / "nvembed-tiny-v2")
    compress_weights(FIXTURES / "nvembed-tiny-v2", tmp_path / "small", INT8)
    model = Embedder.load(tmp_path / "small")
    names = load_file(tmp_path / "small" / SINGLE).keys()
    assert "head.to_scores.weight" in names and not any(".to_kv." in name for name in names)
    assert (vectors_of(plain) * vectors_of(model)).sum(1).min() > 0.995


# ---- what is refused


def _trained(small: Path, root: Path) -> None:
    Embedder.load(small).add_lora(rank=2)


def _merged(small: Path, root: Path) -> None:
    soup([small, small], root / "out")


def _again(small: Path, root: Path) -> None:
    compress_weights(small, root / "out", INT8)


def _started(small: Path, root: Path) -> None:
    check_embedder(str(small))


def _retyped(small: Path, root: Path) -> None:
    Embedder.load(small, dtype="float32")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (_trained, "do not train: .* train the model that it was made from"),
        (_started, "do not train: .* train the model that it was made from"),
        (_merged, "merge the models that they were made from"),
        (_retyped, "opened as they are: leave dtype out"),
        (_again, "compress the model that they were made from"),
    ],
)
def test_what_quantised_weights_are_not_for(made: Made, tmp_path: Path, use: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        use(made("latent", 8)[1], tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(("key", "value", "words"), [("rotation", 48, "power of 2"), ("bits", 3, "8")])
def test_a_scheme_that_is_none_is_refused_by_folder(
    made: Made, tmp_path: Path, key: str, value: int, words: str
) -> None:
    odd = shutil.copytree(made("mean", 8)[1], tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text())
    settings["quantization"][key] = value
    (odd / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"(?s)odd.*{words}"):
        Embedder.load(odd)


def test_what_cannot_be_compressed(tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    model = tiny_embedder("mean")
    model.save(tmp_path / "model")
    Embedder.load(tmp_path / "model").add_lora(rank=2).save(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is an adapter: merge it into its base first"):
        compress_weights(tmp_path / "adapter", tmp_path / "out", INT8)
    with pytest.raises(InputError, match=r"down_proj.*48 inputs cannot be cut into groups of 32.*take 8"):
        compress_weights(tmp_path / "model", tmp_path / "out", INT4)
    shutil.copytree(tmp_path / "model", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / SINGLE)
    tensors["layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "broken" / SINGLE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj.weight: a weight is not finite"):
        compress_weights(tmp_path / "broken", tmp_path / "out", INT8)
    with pytest.raises(FileExistsError):
        compress_weights(tmp_path / "model", tmp_path / "adapter", INT8)
    assert not (tmp_path / "out").exists()


# ---- memory


PEAK = """
import sys
from pathlib import Path
from embedwright.model.embedder import Embedder
model = Embedder.load(sys.argv[1])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def peak(folder: Path) -> int:
    ran = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.long
@BITS
def test_a_real_model_takes_the_memory_of_its_file(smollm2_folder: Path, tmp_path: Path, bits: Bits) -> None:
    """At most a tenth more than a process that opens a tiny model with its tokenizer, by the peak of memory."""
    shutil.copytree(smollm2_folder, tmp_path / "tiny-base", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 64}
    config = AutoConfig.from_pretrained(smollm2_folder)
    config.update(sizes | {"num_attention_heads": 1, "num_key_value_heads": 1, "initializer_range": 0.2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tiny-base")
    for name, base in (("tiny", tmp_path / "tiny-base"), ("real", smollm2_folder)):
        Embedder.from_decoder(base, pooling="mean", dtype="bfloat16").save(tmp_path / name)
        compress_weights(tmp_path / name, tmp_path / f"{name}-small", INT8 if bits == 8 else INT4)
    size = (tmp_path / "real-small" / SINGLE).stat().st_size
    assert peak(tmp_path / "real-small") - peak(tmp_path / "tiny-small") < 1.1 * size
