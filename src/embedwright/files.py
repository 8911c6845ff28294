"""Writes files and folders whole or not at all. All writing goes through here.

Content goes to a hidden sibling with a unique name, is synced to disk, and gets its final name in one rename. A failed
write removes what it has made. A killed process leaves at most a hidden file or folder, which nothing reads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from embedwright.errors import InputError, OutputExistsError

_TEMP = re.compile(r"\..*\.[0-9a-f]{12}(\.\w+){0,2}")  # the names that `_temp_sibling` gives


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` when the block ends.

    Expands `~`, follows a link and makes missing parent folders. A replaced file keeps its mode, a new one is
    readable by whom the umask allows. If the block raises, the old file stays as it was. The temporary name has the
    suffixes of `path`.
    """
    final = _real(path)
    parents = _make_parents(final)
    temp = _temp_sibling(final)
    try:
        usual = _usual_mode(temp)
        yield temp
        temp.chmod(final.stat().st_mode & 0o7777 if final.exists() else temp.stat().st_mode | usual)
        sync(temp)
        temp.replace(final)
    except BaseException:
        temp.unlink(missing_ok=True)
        _remove_empty(parents)
        raise
    sync(final.parent)


def file_name(text: str) -> str:
    """Turns a name, such as a model's (`org/model`, `runs/a/model`), into one that a file can have: `org__model`."""
    return re.sub(r"[^\w.-]+", "_", text.strip("./").replace("/", "__"))[-200:] or "_"


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with whole_file(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Writes indented JSON with a final newline, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: str | Path, mode: int = 0o777) -> Iterator[Path]:
    """Yields a temporary folder to fill, and renames it to `path` when the block ends. `mode` is less the umask.

    `path` must be new or an empty folder, else OutputExistsError is raised before anything is written. An empty folder
    keeps its mode. An empty mount point, or a folder whose parent is read-only, is filled in place: entries move one by
    one, and `config.json` and other top-level JSON files come last, since readers start with them.
    """
    final = check_new_folder(path)
    parents = _make_parents(final)
    stays = final.is_dir() and (os.path.ismount(final) or not os.access(final.parent, os.W_OK))
    temp = _temp_sibling(final / "folder" if stays else final)
    try:
        temp.mkdir(mode)
        usual = _usual_mode(temp / "file") & mode
        yield temp
        for file in (path for path in temp.rglob("*") if path.is_file() and not path.is_symlink()):
            file.chmod(file.stat().st_mode | usual)
        if final.is_dir():
            temp.chmod(final.stat().st_mode & 0o7777)
        sync_tree(temp)
        if stays:
            fill_folder(final, temp)
        else:
            _put(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        _remove_empty(parents)
        raise
    sync(final if stays else final.parent)


def put_folder(folder: Path, path: str | Path) -> None:
    """Renames a folder that is whole to `path`, new or an empty folder on the same disk. Raises OutputExistsError."""
    final = check_new_folder(path)
    sync_tree(folder)
    _put(folder, final)
    sync(final.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields a hidden folder beside `path`, for files on the way to it, and removes it when the block ends."""
    folder = _temp_sibling(path)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def append_line(path: str | Path, line: str) -> None:
    """Adds a line of UTF-8 text to a file that only grows. First removes a half line that a killed process left."""
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
    """Returns the lines that `append_line` has added, without a half line at the end. Empty without a file."""
    final = _real(path)
    content = final.read_bytes() if final.exists() else b""
    return content[: content.rfind(b"\n") + 1].decode().split("\n")[:-1]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds a lock that one process at a time can have. Its file is there as long as a process has or awaits it.

    The system takes the lock from a process that ends in any way. A file system without locks holds nobody back: two
    processes may then do the same work, and what they write is whole all the same.
    """
    while not (stream := _locked(file)):
        pass
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def _locked(file: Path) -> IO[bytes] | None:
    """Waits for a lock, and returns its open file. None if another process has removed the file meanwhile."""
    with suppress(FileNotFoundError), ExitStack() as opened:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = opened.enter_context(file.open("wb"))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                raise
        if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            opened.pop_all()
            return stream
    return None


class HashedFile(io.BufferedWriter):
    """A new file for writing that hashes its bytes as they come, so that nobody reads them again for it."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256, self.bytes = hashlib.sha256(), 0

    def write(self, content: Any, /) -> int:
        self.sha256.update(content)
        self.bytes += memoryview(content).nbytes
        return super().write(content)


def sha256_of(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_new_folder(path: str | Path) -> Path:
    """Checks that a new folder can be written, and returns its real path: `~` expanded, links followed.

    Call it before long work. OutputExistsError if `path` is a file or a folder with content, InputError if nothing can
    be written there.
    """
    final = check_folder(path)
    if final.exists() and any(final.iterdir()):
        raise OutputExistsError(f"{path} exists and is not an empty folder: choose a new one")
    return final


def check_folder(path: str | Path) -> Path:
    """Does the same as `check_new_folder` for a folder that may have content, such as the parts of a resumed work."""
    final = _real(path)
    if final.exists() and not final.is_dir():
        raise OutputExistsError(f"{path} exists and is not an empty folder: it is a file")
    _check_writable(path, final)
    return final


def check_file(path: str | Path) -> Path:
    """Checks that a file can be written, and returns its real path. Call it before long work.

    OutputExistsError if `path` is a folder, InputError if nothing can be written there.
    """
    final = _real(path)
    if final.is_dir():
        raise OutputExistsError(f"{path} is a folder: name a file to write")
    _check_writable(path, final.parent)
    return final


def _check_writable(path: str | Path, folder: Path) -> None:
    """Raises InputError unless files can be made in `folder`, or in its nearest parent that exists."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise InputError(f"{path} cannot be written: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: no permission to write in {there}")


def _make_parents(final: Path) -> list[Path]:
    """Makes the missing parent folders, and returns them, the innermost first."""
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
        except OSError:  # another process uses it
            return


def _put(temp: Path, final: Path) -> None:
    """Renames `temp` to `final`. Raises OutputExistsError if that name is no longer free."""
    try:
        temp.rename(final)  # replaces an empty folder in the same step
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputExistsError(f"{final} was made by another process meanwhile") from error


def fill_folder(final: Path, temp: Path) -> None:
    """Moves the entries of `temp` into the folder `final`: all of them, or none if one move fails."""
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


def _usual_mode(free: Path) -> int:
    """Returns the mode of a new file, 0o666 less the umask. Some writers, such as safetensors, keep others out.

    `free` is a path at which a file is made for a moment: a process can learn its umask only by setting it.
    """
    free.touch(exist_ok=False)
    mode = free.stat().st_mode & 0o666
    free.unlink()
    return mode


def remove_leftovers(folder: Path) -> None:
    """Removes leftovers of killed writers anywhere below `folder`. No other process may write there."""
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
    """Syncs a folder and everything below it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _real(path: str | Path) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:  # a link that leads to itself, or `~somebody` without a home folder
        raise InputError(f"{path} cannot be written: {error}") from None


def _temp_sibling(final: Path) -> Path:
    """Returns a new hidden name beside `final`, with the same suffixes, since some writers go by them."""
    suffixes = "".join(final.suffixes[-2:])
    return final.with_name(f".{final.name.removesuffix(suffixes)[:100]}.{uuid.uuid4().hex[:12]}{suffixes}")
