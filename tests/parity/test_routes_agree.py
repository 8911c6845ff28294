"""One forward path, many doors: the same texts through each of them give the same vectors, to 1e-5 in float32.

Doors: the library in other batches, sentence-transformers, mteb, AutoModel with its tokenizer, and ONNX Runtime with
tokenizers alone; each on the saved folder, in shuffled order. Against: the library on the model that was saved. The
largest difference of each is printed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from embedwright.evaluation.mteb import MtebEncoder
from embedwright.export.onnx import export_onnx
from embedwright.model.embedder import Embedder

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5
MAX_TOKENS = 96
TASK = "Given a question, retrieve passages that answer the question"
TEMPLATES = {
    "space": "Instruct: {task}\nQuery: ",
    "colon": "Instruct: {task}\nQuery:",
    "newline": "Instruct: {task}\nQuery:\n",
    "none": "",
}
SOME = {"space": (1,), "colon": (7,), "newline": (32,), "none": (7,)}  # batch sizes of each
ALL = dict.fromkeys(TEMPLATES, (1, 7, 32))

_WORDS = "the moon's gravity pulls oceans while bread rises, because yeast makes 3.5 g of CO2; naïve 漢字 🙂"
_ODD = [
    "a",
    "",
    " ",
    "\n",
    "\t\ttabs",
    "  leading spaces",
    "trailing spaces   ",
    "\nleading newline",
    "Query:",
    "Instruct: a\nQuery: b",
    "</s>",
    "</s> in front, <s> inside, at the end </s>",
    "▁piece",
    "é",
    "e\u0301",  # composed of two
    "漢字かな交じり文",
    "مرحبا بالعالم",
    "👩‍👩‍👧‍👦🏽",
    "\u200b",  # zero width space
    "\x00",
    "far beyond every limit " * 100,
    "한" * 300,
]


@cache
def texts() -> list[str]:
    """200 texts: odd ones, and words in lengths from one to more than fit."""
    random = np.random.default_rng(0)
    lengths = np.geomspace(1, 120, 200 - len(_ODD)).round().astype(int)
    return _ODD + [" ".join(random.choice(_WORDS.split(), n)) for n in lengths]


# ---- models: what was opened, and the folder that it was saved into


@pytest.fixture(scope="module", params=["v1", "v2"])
def nvembed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, Path]:
    model = Embedder.load(FIXTURES / f"nvembed-tiny-{request.param}", dtype="float32", device="cpu")
    assert model.contract.mask_rule == "count"
    folder = tmp_path_factory.mktemp("routes") / request.param
    model.save(folder)
    return model, folder


@pytest.fixture(scope="module")
def tuned_smollm2(smollm2: Embedder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, Path]:
    """With random weights in its head, which is the identity when new."""
    model = Embedder(copy.deepcopy(smollm2.network), smollm2.tokenizer)
    assert model.contract.mask_rule == "offsets"
    torch.manual_seed(0)
    for parameter in model.network.head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("routes") / "smollm2"
    model.save(folder)
    return model, folder


# ---- doors: folder -> texts, template -> vectors

Encode = Callable[[list[str], str, int], NDArray[np.float32]]


def prefix_of(template: str) -> str:
    return template.replace("{task}", TASK)


def library(folder: Path, limit: int | None = MAX_TOKENS) -> Encode:
    model = Embedder.load(folder, device="cpu")
    return lambda texts, template, size: model.encode(
        texts, prefix=prefix_of(template), max_tokens=limit, batch_tokens=size * 16
    )


def sentence_transformers(folder: Path, limit: int | None = MAX_TOKENS) -> Encode:
    model = SentenceTransformer(str(folder), device="cpu")
    if limit is not None:
        model.max_seq_length = limit
    return lambda texts, template, size: model.encode(
        texts, batch_size=size, **({"prompt": prefix_of(template)} if template else {})
    )


def mteb(folder: Path, limit: int | None = MAX_TOKENS) -> Encode:
    model = Embedder.load(folder, device="cpu")
    metadata: Any = SimpleNamespace(name="Novel", type="Classification", prompt=TASK)

    def encode(texts: list[str], template: str, size: int) -> NDArray[np.float32]:
        model.contract = model.contract.model_copy(update={"query_template": template or "{task}"})
        encoder = MtebEncoder(model, {} if template else {"Novel": ""}, max_tokens=limit, batch_tokens=size * 16)
        batches = [{"text": texts[i : i + size]} for i in range(0, len(texts), size)]
        return encoder.encode(batches, task_metadata=metadata, hf_split="test", hf_subset="default")

    return encode


def automodel(folder: Path, limit: int | None = MAX_TOKENS) -> Encode:
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def encode(texts: list[str], template: str, size: int) -> NDArray[np.float32]:
        def vectors() -> Iterator[NDArray[np.float32]]:
            for start in range(0, len(texts), size):
                rows = tokenizer(texts[start : start + size], prefix=prefix_of(template), max_length=limit)
                yield model(**rows).pooler_output.numpy()

        return np.concatenate(list(vectors()))

    return encode


@cache
def exported(folder: Path) -> Path:
    out = folder.with_name(f"{folder.name}-onnx")
    export_onnx(Embedder.load(folder, device="cpu", dtype="float32"), out)
    return out


def onnxruntime(folder: Path, limit: int | None = MAX_TOKENS) -> Encode:
    import onnxruntime

    out = exported(folder)
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    counts = json.loads((out / "embedwright.json").read_text())["contract"]["mask_rule"] == "count"
    tokenizer.encode_special_tokens = not counts
    if limit is not None:
        tokenizer.enable_truncation(limit)

    def batch(texts: list[str], prefix: str) -> NDArray[np.float32]:
        rows = tokenizer.encode_batch([prefix + text + "</s>" * counts for text in texts])
        feed = {name: np.array([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask")}
        end = np.array([row.offsets for row in rows])[..., 1]
        front = len(tokenizer.encode(prefix, add_special_tokens=False).ids) if counts and prefix else 0
        unpooled = np.arange(end.shape[1]) < front if counts else (end > 0) & (end <= len(prefix))
        feed = {"input_ids": feed["ids"], "attention_mask": feed["attention_mask"]}
        feed["pool_mask"] = np.where(np.broadcast_to(unpooled, end.shape), 0, -1)
        vectors: NDArray[np.float32] = session.run(["sentence_embedding"], feed)[0]
        return vectors

    return lambda texts, template, size: np.concatenate(
        [batch(texts[i : i + size], prefix_of(template)) for i in range(0, len(texts), size)]
    )


DOORS = {door.__name__: door for door in (library, sentence_transformers, mteb, automodel, onnxruntime)}


TRACED = pytest.param("onnxruntime", marks=pytest.mark.long)  # a graph takes seconds to trace


@pytest.fixture(params=[*(name for name in DOORS if name != "onnxruntime"), TRACED])
def door(request: pytest.FixtureRequest) -> str:
    """Each door in turn."""
    if request.param == "onnxruntime":
        request.getfixturevalue("onnx_packages")
    return str(request.param)


@cache
def expected(model: Embedder, template: str, every: int) -> NDArray[np.float32]:
    return model.encode(texts()[::every], prefix=prefix_of(template), max_tokens=MAX_TOKENS)


def differences(model: Embedder, encode: Encode, sizes: dict[str, tuple[int, ...]], every: int = 1) -> dict[str, float]:
    """The largest for each template, over its batch sizes, on every so many-th text, each time in another order."""
    chosen = texts()[::every]
    found = {}
    for name, template in TEMPLATES.items():
        right = expected(model, template, every)
        orders = {size: np.random.default_rng(size).permutation(len(chosen)) for size in sizes[name]}
        found[name] = max(
            float(np.abs(encode([chosen[i] for i in order], template, size) - right[order]).max())
            for size, order in orders.items()
        )
    return found


def test_the_texts_are_of_all_lengths(nvembed: Any, tuned_smollm2: Any) -> None:
    assert len(texts()) == 200
    for model, _ in (nvembed, tuned_smollm2):
        lengths = model.tokenize(texts(), max_tokens=MAX_TOKENS).lengths_N
        assert lengths.min() <= 2 and (lengths == MAX_TOKENS).sum() > 10 and len(lengths.unique()) > 40


def test_nvembed(door: str, nvembed: tuple[Embedder, Path]) -> None:
    model, folder = nvembed
    found = differences(model, DOORS[door](folder), SOME)
    print(f"nvembed-tiny-{folder.name} {door}: {found}")
    assert max(found.values()) <= TOLERANCE


@pytest.mark.usefixtures("onnx_packages")
def test_onnxruntime(tmp_path: Path) -> None:
    model = Embedder.load(FIXTURES / "nvembed-tiny-v2", dtype="float32", device="cpu")
    model.save(tmp_path / "v2")
    found = differences(model, onnxruntime(tmp_path / "v2"), SOME)
    print(f"nvembed-tiny-v2 onnxruntime: {found}")
    assert max(found.values()) <= TOLERANCE


def test_smollm2(door: str, tuned_smollm2: tuple[Embedder, Path]) -> None:
    model, folder = tuned_smollm2
    found = differences(model, DOORS[door](folder), SOME, every=8)
    print(f"smollm2 {door}, every 8th text: {found}")
    assert max(found.values()) <= TOLERANCE


@pytest.mark.long
def test_nvembed_in_all_batch_sizes(door: str, nvembed: tuple[Embedder, Path]) -> None:
    model, folder = nvembed
    found = differences(model, DOORS[door](folder), ALL)
    print(f"nvembed-tiny-{folder.name} {door}: {found}")
    assert max(found.values()) <= TOLERANCE


@pytest.mark.long
def test_smollm2_on_all_texts_in_all_batch_sizes(door: str, tuned_smollm2: tuple[Embedder, Path]) -> None:
    model, folder = tuned_smollm2
    found = differences(model, DOORS[door](folder), ALL)
    print(f"smollm2 {door}: {found}")
    assert max(found.values()) <= TOLERANCE


def test_the_stored_limit_cuts_in_every_door(door: str, nvembed: tuple[Embedder, Path]) -> None:
    model, folder = nvembed
    if model.max_tokens > 4096:
        pytest.skip("too long for a test")
    text = "far beyond " * model.max_tokens
    assert model.tokenize([text]).longest == model.max_tokens
    found = DOORS[door](folder, None)([text], TEMPLATES["space"], 1)
    np.testing.assert_allclose(found, model.encode([text], TASK), rtol=0, atol=TOLERANCE)


def test_the_head_matters(tuned_smollm2: tuple[Embedder, Path], smollm2: Embedder) -> None:
    assert np.abs(tuned_smollm2[0].encode(_ODD[:12]) - smollm2.encode(_ODD[:12])).max() > 1e-2


def test_the_prompts_matter(nvembed: tuple[Embedder, Path], tuned_smollm2: tuple[Embedder, Path]) -> None:
    """Were they dropped or cut, the doors would still agree: no two of them give the same vectors."""
    for model, _ in (nvembed, tuned_smollm2):
        vectors = [model.encode(["how do tides work?"], prefix=prefix_of(t))[0] for t in TEMPLATES.values()]
        for i, one in enumerate(vectors):
            assert all(np.abs(one - other).max() > 1e-4 for other in vectors[:i])
