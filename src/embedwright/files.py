"""The one way to write a file or a folder: whole or not there.

Content goes to a hidden sibling with a unique name, is synced to disk, and takes its final name in one rename. A write
that fails removes what it has made. A killed process leaves at most a hidden file or folder, which nothing reads.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedwright.errors import InputError, OutputExistsError

_TEMP = re.compile(r"\..*\.[0-9a-f]{12}(\.\w+){0,2}")  # as `_temp_sibling` names it


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path to write to; when the block ends, the file has its final name.

    `~` is expanded, a link is followed, missing parent folders are made. A file that is replaced keeps its mode. If the
    block raises, the file that was there stays as it was. The temporary name keeps the suffixes of `path`.
    """
    final = _real(path)
    parents = _make_parents(final)
    temp = _temp_sibling(final)
    try:
        yield temp
        if final.exists():
            temp.chmod(final.stat().st_mode & 0o7777)
        sync(temp)
        temp.replace(final)
    except BaseException:
        temp.unlink(missing_ok=True)
        _remove_empty(parents)
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
    parents = _make_parents(final)
    stays = final.is_dir() and (os.path.ismount(final) or not os.access(final.parent, os.W_OK))
    temp = _temp_sibling(final / "folder" if stays else final)
    try:
        temp.mkdir(mode)
        yield temp
        if final.is_dir():
            temp.chmod(final.stat().st_mode & 0o7777)
        sync_tree(temp)
        if stays:
            _fill(final, temp)
        else:
            _put(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        _remove_empty(parents)
        raise
    sync(final if stays else final.parent)


def append_line(path: str | Path, line: str) -> None:
    """Adds a line of UTF-8 text to a file that only grows. First cuts off what a killed process left of a line."""
    final = _real(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.open("a+b") as file:
        file.seek(0)
        content = file.read()
        if (whole := content.rfind(b"\n") + 1) < len(content):
            file.truncate(whole)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: str | Path) -> list[str]:
    """The lines that `append_line` has added, without a torn end; none where there is no file."""
    final = _real(path)
    content = final.read_bytes() if final.exists() else b""
    return content[: content.rfind(b"\n") + 1].decode().split("\n")[:-1]


def check_new_folder(path: str | Path) -> Path:
    """Returns the real path of a folder that may be written: `~` expanded, links followed.

    Call it before long work. OutputExistsError if `path` is a file or a folder that is not empty, InputError if nothing
    can be written there.
    """
    final = check_folder(path)
    if final.exists() and any(final.iterdir()):
        raise OutputExistsError(f"{path} exists and is not an empty folder: choose a new one")
    return final


def check_folder(path: str | Path) -> Path:
    """As `check_new_folder`, for a folder that may hold something already, such as the parts of work that goes on."""
    final = _real(path)
    if final.exists() and not final.is_dir():
        raise OutputExistsError(f"{path} exists and is not an empty folder: it is a file")
    _check_writable(path, final)
    return final


def check_file(path: str | Path) -> Path:
    """Returns the real path of a file that may be written. Call it before long work.

    OutputExistsError if `path` is a folder, InputError if nothing can be written there.
    """
    final = _real(path)
    if final.is_dir():
        raise OutputExistsError(f"{path} is a folder: name a file to write")
    _check_writable(path, final.parent)
    return final


def _check_writable(path: str | Path, folder: Path) -> None:
    """InputError unless files can be made in `folder`, or in the nearest of its parents that exists."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"{path} cannot be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: no permission to write in {there}")


def _make_parents(final: Path) -> list[Path]:
    """Makes the parent folders that are missing; returns those, the innermost first."""
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except BaseException:
        _remove_empty([parent for parent in missing if parent.exists()])
        raise
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # another process uses it by now
            return


def _put(temp: Path, final: Path) -> None:
    """Gives `temp` its name. OutputExistsError where that is not free any more."""
    try:
        temp.rename(final)  # an empty folder gives way in the same step
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputExistsError(f"{final} was made by another process meanwhile") from error


def _fill(final: Path, temp: Path) -> None:
    """Moves what is in `temp` into the folder `final`: all of it, or nothing where one move fails."""
    moved = []
    try:
        for entry in sorted(temp.iterdir(), key=lambda entry: (entry.suffix == ".json", entry.name)):
            entry.rename(final / entry.name)
            moved.append(final / entry.name)
    except BaseException:
        for entry in moved:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        raise
    temp.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left anywhere below `folder`. No other process may write there."""
    for left in [path for path in folder.rglob(".*") if _TEMP.fullmatch(path.name)]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


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
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:  # a link that leads to itself, or `~somebody` without a home folder
        raise InputError(f"{path} cannot be written: {error}") from None


def _temp_sibling(final: Path) -> Path:
    """A new hidden name beside `final`, with the same suffixes, which decide how some writers write."""
    suffixes = "".join(final.suffixes[-2:])
    return final.with_name(f".{final.name.removesuffix(suffixes)[:100]}.{uuid.uuid4().hex[:12]}{suffixes}")
