"""The process of a program that uses the package is after each public call what it was before."""

from __future__ import annotations

import json
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from embedwright import Embedder, Recipe, evaluate, mine, train
from embedwright.data.schema import Example, Passage
from embedwright.host import loading
from embedwright.index.faiss_file import write_faiss
from embedwright.index.index import Index
from embedwright.model.formats.nvembed_export import export_nvembed
from embedwright.model.verify.doctor import examine_name
from embedwright.vectors.corpus import encode_corpus

TEXTS = [f"text {i} of the moon and of {i * i} tides" for i in range(12)]
NVEMBED = Path(__file__).parents[1] / "parity" / "fixtures" / "nvembed-tiny-v2"


def state() -> dict[str, Any]:
    """What a program may have set, and would miss."""
    return {
        "environment": dict(os.environ),
        "cores": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "random": random.getstate(),
        "numpy": json.dumps(np.random.get_state(legacy=False), default=lambda array: array.tolist()),
        "torch": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": dict(ALL_ATTENTION_FUNCTIONS),
        "warnings": list(warnings.filters),
        "logging": [logging.root.level, list(logging.root.handlers), transformers_logging.get_verbosity()],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "hooks": (sys.excepthook, threading.excepthook, list(sys.path)),
        "folder": Path.cwd(),
        "umask": _umask(),
        "locale": locale.setlocale(locale.LC_ALL),
    }


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


def changed(before: dict[str, Any]) -> list[str]:
    after = state()
    return [name for name in before if before[name] != after[name]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for pooling in ("latent", "mean"):
        tiny_embedder(pooling).save(folder / pooling)
    tiny_embedder("latent").add_lora(2).save(folder / "adapter")
    rows = [{"query": text, "positives": [f"answer {text}"], "negatives": ["no"]} for text in TEXTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "suite").mkdir()
    pairs = [{"text1": a, "text2": b, "score": i % 6} for i, (a, b) in enumerate(pairwise(TEXTS))]
    (folder / "suite" / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    labels = [{"text": text, "label": f"l{i % 2}"} for i, text in enumerate(TEXTS)]
    (folder / "suite" / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return folder


def recipe(saved: Path, base: Path, out: Path) -> Recipe:
    task = {"name": "rows", "instruction": "Find it", "licence": "none"}
    stage = {
        "name": "only",
        "data": [{"path": str(saved / "rows.jsonl"), "task": task}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "temperature": 0.1,
        "optim": {"lr": 1e-2, "steps": 2, "batch_queries": 4},
    }
    return Recipe.parse(
        {
            "name": "tiny",
            "model": {"base": str(base), "latents": 4, "heads": 2, "multiple": 1, "max_tokens": 32},
            "tune": {"rank": 2, "alpha": 4, "dropout": 0.1},
            "stages": [stage],
            "run": {"out": str(out), "tracker": "none"},
            "eval": {"suites": [str(saved / "suite")]},
        }
    )


def merged(model: Embedder) -> Embedder:
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    return model.merge()


CALLS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "from_decoder": lambda saved, base, out: Embedder.from_decoder(base, latents=4, heads=2, multiple=1),
    "load": lambda saved, base, out: Embedder.load(saved / "latent"),
    "load in bfloat16": lambda saved, base, out: Embedder.load(saved / "mean", dtype="bfloat16"),
    "load an adapter": lambda saved, base, out: Embedder.load(saved / "adapter"),
    "save": lambda saved, base, out: Embedder.load(saved / "latent").save(out / "saved"),
    "encode": lambda saved, base, out: Embedder.load(saved / "latent").encode(TEXTS, "Find it", precision="int8"),
    "tokenize": lambda saved, base, out: Embedder.load(saved / "latent").tokenize(TEXTS, "Find it"),
    "add_lora": lambda saved, base, out: Embedder.load(saved / "latent").add_lora(2),
    "merge": lambda saved, base, out: merged(Embedder.load(saved / "latent").add_lora(2)),
    "fold": lambda saved, base, out: Embedder.load(saved / "latent").fold().encode(TEXTS),
    "mine": lambda saved, base, out: mine(
        [Example(id=str(i), task="t", query=t, positives=(Passage(f"answer {t}"),)) for i, t in enumerate(TEXTS)],
        {str(i): text for i, text in enumerate(TEXTS)},
        Embedder.load(saved / "latent"),
        negatives=1,
    ),
    "evaluate": lambda saved, base, out: evaluate(Embedder.load(saved / "latent"), saved / "suite"),
    "encode_corpus": lambda saved, base, out: encode_corpus(
        Embedder.load(saved / "latent"), saved / "texts.jsonl", out / "corpus"
    ),
    "search": lambda saved, base, out: (
        encode_corpus(Embedder.load(saved / "latent"), saved / "texts.jsonl", out / "index"),
        write_faiss(out / "index"),
        Index.open(out / "index").search(Embedder.load(saved / "latent"), TEXTS[:2]),
    ),
    "export": lambda saved, base, out: export_nvembed(Embedder.load(NVEMBED), out / "export"),
    "doctor": lambda saved, base, out: examine_name(str(saved / "latent")),
    "to_sentence_transformer": lambda saved, base, out: (
        Embedder.load(saved / "latent").to_sentence_transformer().encode(TEXTS)
    ),
    "train": lambda saved, base, out: train(recipe(saved, base, out / "run")),
}


@pytest.fixture(scope="module")
def warm(saved: Path, tiny_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Other libraries set what they set when they are imported; that is theirs."""
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401
    import sklearn.linear_model  # noqa: F401


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_the_process_as_it_was(
    name: str, warm: None, saved: Path, tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    before = state()
    CALLS[name](saved, tiny_decoder("llama"), tmp_path)
    assert changed(before) == []


def test_eight_threads_leave_the_process_as_it_was(
    warm: None, saved: Path, tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    names, base = [name for name in CALLS if name not in ("train", "export", "doctor")], tiny_decoder("llama")
    before = state()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: CALLS[name](saved, base, tmp_path / name.replace(" ", "_")), names))
    assert changed(before) == []


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps what was freed")
def test_memory_that_loading_has_freed_goes_back_to_the_system() -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

    with loading():
        blocks = [b"x" * 50_000 for _ in range(4000)]  # from the heap: larger ones would be mapped, each by itself
        full, last = resident(), blocks.pop()  # which lies above the others
        blocks.clear()
    assert last and full - resident() > 150
