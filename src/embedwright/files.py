"""The one way to write a file or a folder: whole or not there.

Content goes to a hidden sibling with a unique name, is synced to disk, and takes its final name in one rename. A write
that fails removes what it has made. A killed process leaves at most a hidden file or folder, which nothing reads.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedwright.errors import OutputExistsError


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to; when the block ends, the file has its final name.

    `~` is expanded, a link is followed, missing parent folders are made. A file that is replaced keeps its mode. If the
    block raises, the file that was there stays as it was. The temporary name keeps the suffixes of `path`.
    """
    final = _real(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_sibling(final)
    try:
        yield temp
        if final.exists():
            temp.chmod(final.stat().st_mode & 0o7777)
        sync(temp)
        temp.replace(final)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    sync(final.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with whole_file(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Writes indented JSON with a final newline, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: str | Path, mode: int = 0o777) -> Iterator[Path]:
    """Gives a temporary folder to fill; when the block ends, it is the folder `path`, with `mode` less the umask.

    `path` must be new or an empty folder (OutputExistsError, before anything is written). An empty folder keeps its
    mode. An empty mount point, or a folder whose parent is read-only, is filled in place: its entries are moved into it
    one by one, `config.json` and other top-level JSON files last, since a reader starts with them.
    """
    final = check_new_folder(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    stays = final.is_dir() and (os.path.ismount(final) or not os.access(final.parent, os.W_OK))
    temp = _temp_sibling(final / "folder" if stays else final)
    temp.mkdir(mode)
    try:
        yield temp
        if final.is_dir():
            temp.chmod(final.stat().st_mode & 0o7777)
        sync_tree(temp)
        if stays:
            for entry in sorted(temp.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name)):
                entry.rename(final / entry.name)
            temp.rmdir()
        else:
            if final.is_dir():
                final.rmdir()
            temp.rename(final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    sync(final if stays else final.parent)


def check_new_folder(path: str | Path) -> Path:
    """Returns the real path of a folder that may be written: `~` expanded, links followed.

    Call it before long work. OutputExistsError if `path` is a file or a folder that is not empty.
    """
    final = _real(path)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise OutputExistsError(f"{path} exists and is not an empty folder: choose a new one")
    return final


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and all that is below it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _real(path: str | Path) -> Path:
    return Path(path).expanduser().resolve()


def _temp_sibling(final: Path) -> Path:
    """A new hidden name beside `final`, with the same suffixes, which decide how some writers write."""
    suffixes = "".join(final.suffixes[-2:])
    return final.with_name(f".{final.name.removesuffix(suffixes)[:100]}.{uuid.uuid4().hex[:12]}{suffixes}")
