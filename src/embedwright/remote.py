"""Paths of object stores, such as `s3://bucket/folder`, through fsspec: sources are fetched, finished files are sent.

Our readers map files into memory, so a source is copied to the cache, once. A store has no rename: a file is written on
this disk and sent when it is whole, so that one that is there is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from embedwright.cache import cache_folder
from embedwright.errors import InputError, NotFoundError, OutputExistsError, as_input_error
from embedwright.files import file_name, locked, whole_folder, write_json

_BESIDE = ".tasks.jsonl"  # after the name of a data file: the tasks of its rows
_FACTS = ".facts.json"  # beside a copy: of each file, a digest of what the store says of it


def is_remote(path: str | Path) -> bool:
    """Returns whether a path is one of a store: it has `://` in it, which a `Path` never has."""
    return "://" in str(path)


def fetched(path: str | Path) -> Path:
    """Returns where a file or folder lies on this disk: a path of a store is copied to the cache, whole.

    A copy is made once, by one process of a machine, and made anew when a file has changed in the store: what has not
    changed is linked from the copy before. The tasks of a file's rows come with it.

    Raises NotFoundError if nothing is there.
    """
    if not is_remote(path):
        return Path(path)
    url = str(path)
    store, root = _opened(url)
    with as_input_error(url, "cannot be read"):
        store.invalidate_cache()
        if store.isfile(root):
            found = {name: store.info(name) for name in (root, f"{root}{_BESIDE}") if store.isfile(name)}
        else:
            # a name that ends with a slash is an empty file by which some programs mark a folder
            found = {name: info for name, info in store.find(root, detail=True).items() if not name.endswith("/")}
    if not found:
        raise NotFoundError(f"{url} does not exist")
    names = {name: PurePosixPath(name).relative_to(PurePosixPath(root).parent) for name in sorted(found)}
    if strange := [name for name, own in names.items() if ".." in own.parts]:
        raise InputError(f"{url}: the name {strange[0]!r} leads out of its folder")
    # size, and a date or a digest
    facts = {str(own): _digest([url, name, *sorted(map(str, found[name].items()))]) for name, own in names.items()}
    stem = f"{file_name(PurePosixPath(root).name)[:80]}-"
    home = cache_folder("remote", f"{stem}{_digest(facts)}")
    if not home.is_dir():
        with locked(home.with_name(f".{home.name}.lock")):
            if not home.is_dir():
                with whole_folder(home) as temp, as_input_error(url, "cannot be read"):
                    for own in names.values():
                        (temp / own).parent.mkdir(parents=True, exist_ok=True)
                    linked = _linked(facts, home.parent.glob(f"{stem}*/{_FACTS}"), temp)
                    lacking = {name: str(temp / own) for name, own in names.items() if str(own) not in linked}
                    if lacking:
                        store.get(list(lacking), list(lacking.values()))
                    write_json(temp / _FACTS, facts)
    return home / PurePosixPath(root).name


def _linked(facts: dict[str, str], copies: Iterable[Path], folder: Path) -> set[str]:
    """Links files of earlier copies into `folder`, where the facts are equal. Returns which."""
    linked = set[str]()
    for known in copies:
        with suppress(OSError):  # a copy that is removed meanwhile, or a disk without links: the store has all
            before = json.loads(known.read_text(encoding="utf-8"))
            for own in {name for name, fact in facts.items() if before.get(name) == fact} - linked:
                os.link(known.parent / own, folder / own)
                linked.add(own)
    return linked


def _digest(facts: Any) -> str:
    return hashlib.sha256(str(facts).encode()).hexdigest()[:16]


class RemoteFolder:
    """A folder of a store, and the local one from which its files are sent."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._store, self._root = _opened(url)

    def fetch(self, mark: str, *names: str) -> set[str]:
        """Copies the file `mark` and these others into the local folder, where the store has them.

        Returns the names of all files in the store; none if it lacks `mark`, which identifies the folder. Raises
        OutputExistsError if it has other files, but not `mark`. Files in `names` may exist before `mark` does.
        """
        with as_input_error(self.url, "cannot be read"):
            self._store.invalidate_cache()
            there = {PurePosixPath(file).name for file in self._store.find(self._root)}
            if mark not in there:
                if strange := there.difference(names):
                    raise OutputExistsError(f"{self.url} holds {min(strange)} and no {mark}: choose a new folder")
                return set()
            for name in there.intersection((mark, *names)):
                self._store.get_file(f"{self._root}/{name}", str(self.folder / name))
        return there

    def open(self, name: str) -> Any:
        """Opens a file of the store for reading. Only the bytes that are read travel."""
        return self._store.open(f"{self._root}/{name}", "rb")

    def send(self, *names: str) -> None:
        """Sends files of the local folder, in this order."""
        for name in names:
            with as_input_error(f"{self.url}/{name}", "cannot be written"):
                self._store.put_file(str(self.folder / name), f"{self._root}/{name}")


@contextmanager
def local_folder(out: str | Path) -> Iterator[tuple[Path, RemoteFolder | None]]:
    """Yields the local folder to write to: `out` itself, or for a store a temporary one, with the store's own."""
    if not is_remote(out):
        yield Path(out), None
        return
    with TemporaryDirectory(prefix="embedwright-") as temp:
        folder = Path(temp) / PurePosixPath(str(out)).name  # whose end may say the format of files
        folder.mkdir()
        try:
            yield folder, RemoteFolder(str(out), folder)
        except InputError as error:
            error.args = (str(error).replace(str(folder), str(out)),)  # the path that the user knows
            raise


def _opened(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it. Raises MissingPackageError, which names what to install."""
    import fsspec  # here, since every command imports this module

    with as_input_error(url):
        store, root = fsspec.core.url_to_fs(url)
    return store, root.rstrip("/")
