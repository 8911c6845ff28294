"""A hub's cache, filled and offline: repositories of data sets as huggingface_hub keeps them on disk."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants

SHA = "0123456789abcdef0123456789abcdef01234567"

Files = dict[str, tuple[str, list[dict[str, Any]]]]  # split -> (path below the config's folder, rows)


def contents(config: str, files: Files) -> dict[str, str]:
    """The files of a repository by path: a card with two configs, of which one has files, and these."""
    lines = ["---", "license: cc-by-nc-sa-4.0", "configs:"]
    for name in ("older", config):
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, (path, _) in files.items():
            lines += [f"  - split: {split}", f"    path: {name}/{path}"]
    found = {"README.md": "\n".join([*lines, "---", "# A data set", ""])}
    for path, rows in files.values():
        found[f"{config}/{path}"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return found


def put(hub: Path, repository: str, config: str, files: Files) -> Path:
    """Writes a repository into the cache `hub`, as huggingface_hub does. Returns its snapshot."""
    home = hub / f"datasets--{repository.replace('/', '--')}"
    folder = home / "snapshots" / SHA
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(SHA)
    (home / "blobs").mkdir()
    for path, content in contents(config, files).items():
        blob = home / "blobs" / hashlib.sha256(content.encode()).hexdigest()
        blob.write_text(content)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(os.path.relpath(blob, (folder / path).parent))
    return folder


def offline(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Does what HF_HUB_OFFLINE=1 and HF_HOME do when they are set before the start. A connection is an error."""

    def no_network(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a connection was opened")

    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(datasets_config, "HF_DATASETS_CACHE", home / "datasets")
    patch.setattr(socket.socket, "connect", no_network)
