"""The cache folder for conversions (weights, training rows, kernels), and the check of files others could write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from embedwright.errors import InputError


def cache_folder(*parts: str) -> Path:
    """Returns a path in `$EMBEDWRIGHT_CACHE` or `~/.cache/embedwright`. Does not create it."""
    root = os.environ.get("EMBEDWRIGHT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "embedwright").joinpath(*parts)


def check_private(path: Path) -> None:
    """Raises InputError unless this user owns the file or folder and nobody else may write to it. Links are refused.

    Call it before you trust a file that others could have placed there. Does nothing on systems without owners.
    """
    if not hasattr(os, "geteuid"):
        return
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        why = "is a link"
    elif found.st_uid != os.geteuid():
        why = f"belongs to another user (id {found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why = f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return
    raise InputError(
        f"{path} {why}, so it is not trusted: `chmod go-w` it if it is yours, else remove it to make it anew"
    )
