"""The cache folder for conversions (weights, training rows, kernels): what lies there, and who may write there."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from embedwright.errors import InputError

_MADE_ASIDE = re.compile(r"\.[0-9a-f]{12}(?=\.|$)")  # what `files` adds to a name until all is written


def cache_folder(*parts: str) -> Path:
    """Returns a path in `$EMBEDWRIGHT_CACHE` or `~/.cache/embedwright`. Does not create it."""
    root = os.environ.get("EMBEDWRIGHT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "embedwright").joinpath(*parts)


class Cached(NamedTuple):
    """A file or folder of the cache: its name below the cache folder, bytes, time of its last change in seconds.

    `users` are the processes of this machine and user that have a file of it open, or are making it. Only Linux tells
    them.
    """

    name: str
    size: int
    changed: float
    users: tuple[int, ...]


def cached() -> list[Cached]:
    """Returns what lies in the cache, by name."""
    root = cache_folder().resolve()
    users = defaultdict[str, set[int]](set)
    for process, file in _open_files():
        if file.startswith(f"{root}{os.sep}"):
            users["/".join(Path(file).relative_to(root).parts[:2])].add(process)
    found = []
    for path in sorted(root.glob("*/*")):
        name = path.relative_to(root).as_posix()
        if not (stats := list(_stats(path))):
            continue  # a temporary file that has been renamed to its final name meanwhile
        if path.name.startswith("."):  # while a folder is being made, its lock file is what a process has open
            users[name] |= users[f"{_MADE_ASIDE.sub('', name)}.lock"]
        size = sum(one.st_size for one in stats if stat.S_ISREG(one.st_mode))
        found.append(Cached(name, size, max(one.st_mtime for one in stats), tuple(sorted(users[name]))))
    return found


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Yields the status of a file, or of a folder and all in it, without what is removed meanwhile."""
    for file in (path, *(Path(at, name) for at, *names in os.walk(path) for name in chain(*names))):
        with suppress(FileNotFoundError):
            yield file.lstat()


def remove(entry: Cached) -> None:
    """Removes a file or folder of the cache. It is made again when it is needed."""
    path = cache_folder(entry.name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _open_files() -> Iterator[tuple[int, str]]:
    """Yields (process, path) of files that processes have open or mapped, as far as Linux shows them to this user."""
    for folder in Path("/proc").glob("[0-9]*"):
        files = set[str]()
        with suppress(OSError):  # of another user, or it has ended
            fields = (line.split(maxsplit=5) for line in (folder / "maps").read_text(errors="replace").splitlines())
            files.update(one[5] for one in fields if len(one) > 5)
            for link in (folder / "fd").iterdir():
                with suppress(OSError):  # it is closed by now
                    files.add(str(link.readlink()))
        yield from ((int(folder.name), file) for file in files)


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
