"""Parts of long work: `--shard I/N` reads part I of N of the rows, and writes part I of N of a folder.

Parts are counted from 0, as Slurm's arrays are. A part is a file `part-00003-of-00010.jsonl`, written aside and
renamed, or a folder of that name. Its report follows it: a part that has one is done, and is not made again. A part
with `unanswered` questions gets none, and is made again. The file `parts.json` of the folder names what decides the
rows, and parts of other settings are refused. Together the files are one data set (`folders`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from embedwright.errors import InputError, OutputExistsError
from embedwright.files import check_folder, write_json
from embedwright.remote import RemoteFolder, local_folder

Counts = dict[str, Any]

_SETTINGS = "parts.json"
_MOST = 99_999  # five digits, by which folders of parts are known
_MAY_BE_THERE = re.compile(r"\..*|part-.*\.answers\.sqlite.*").fullmatch  # before the first part: files in the making


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads `3/10`. Raises InputError for anything else, and for 10/10: the last part of ten is 9/10."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count) <= _MOST):
            raise InputError(f"{text!r}: expected I/N, a part and how many there are, from 0/N to N-1/N, as in 0/10")
        return cls(int(index), int(count))

    def rows(self, total: int) -> range:
        """Returns the rows of this part: all parts, one after the other, are all rows in order."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def file(self, out: Path) -> Path:
        """Returns the path of this part in the folder `out`. The format is that of the folder's name, else JSONL."""
        ends = (".parquet", ".jsonl.gz", ".jsonl")
        suffix = next((end for end in ends if out.name.endswith(end)), ".jsonl")
        return out / f"part-{self.index:05d}-of-{self.count:05d}{suffix}"


def write_part(
    out: Path,
    shard: Shard,
    settings: Mapping[str, Any],
    write: Callable[[Path], Counts],
    remote: RemoteFolder | None = None,
) -> Counts:
    """Lets `write` write this part of the folder `out`, unless it is done. Several processes may write others.

    `settings` are all that decides the rows of all parts, as JSON. A `remote` folder gets them before the work, so that
    a store that cannot be written, or has parts of other settings, is known at once. Returns and raises as
    `write_once`.
    """
    check_folder(out)

    def written(file: Path) -> Counts:
        if remote:
            remote.send(_SETTINGS)
        counts = write(file)
        if remote:
            remote.fetch(_SETTINGS)  # for `write_once`, which compares them again
        return counts

    return write_once(shard.file(out), {**settings, "parts": shard.count}, written)


@contextmanager
def folder_of_part(out: str | Path, shard: Shard) -> Iterator[tuple[Path, RemoteFolder | None]]:
    """Yields a local folder for this part of `out`, and the store's folder: `out` itself and None, unless in a store.

    Of a store, the local one is temporary, with what the store says of this part. What is made there is sent when the
    block ends without an error, the report at the end. If that fails, it is kept, and the error says where. Raises
    OutputExistsError if the store's folder holds something else.
    """
    with local_folder(out) as (folder, remote):
        report = _report(file := shard.file(folder))
        if remote:
            there = remote.fetch(_SETTINGS, report.name)
            if file.name in there and report.name in there:
                file.touch()  # a sign that it is done: its rows stay in the store
        done = is_done(file)
        yield folder, remote
        if remote and not done:
            others = {path.name for path in folder.iterdir()} - {_SETTINGS, report.name}
            try:
                remote.send(*others, *([report.name] if report.is_file() else []))
            except InputError as error:
                kept = shutil.move(folder, mkdtemp(prefix="embedwright-not-sent-"))
                raise InputError(f"{error}. Its files are in {kept}: copy them there, {report.name} last") from error


def write_once(file: Path, settings: Mapping[str, Any], write: Callable[[Path], Counts]) -> Counts:
    """Lets `write` write a file, whole or not at all, unless its report says that it is done. Returns its counts.

    If `unanswered` is among the counts and not 0, the file gets no report: the same call makes it again.
    Raises InputError if the folder holds files of other settings, and OutputExistsError if it holds something else.
    """
    report = _report(file)
    claim(file.parent, settings)
    if is_done(file):
        done: Counts = json.loads(report.read_text(encoding="utf-8"))
        return done
    counts = write(file)
    try:
        claim(file.parent, settings)  # two commands with other settings may have begun at one moment
    except InputError:
        file.unlink()
        raise
    if counts.get("unanswered"):
        report.unlink(missing_ok=True)  # left by a file that was removed by hand
    else:
        write_json(report, counts)
    return counts


def is_done(file: Path) -> bool:
    """Returns whether a file is there with its report, so that it is not written again."""
    return file.exists() and _report(file).is_file()


def settings_of(out: Path) -> dict[str, Any]:
    """Returns the settings of the parts in the folder `out`, none if it is not yet a folder of parts."""
    known = out / _SETTINGS
    settings: dict[str, Any] = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    return settings


def _report(file: Path) -> Path:
    return file.with_name(f"{file.name}.report.json")


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes `out` the folder of parts of these settings. Raises as `write_part` if it is that of others."""
    known = out / _SETTINGS
    if not known.is_file():
        if out.is_dir() and (others := [entry.name for entry in out.iterdir() if not _MAY_BE_THERE(entry.name)]):
            if not known.is_file():  # else another process has made it meanwhile
                raise OutputExistsError(
                    f"{out} holds {others[0]} and no {_SETTINGS}, so it is not a folder of parts of this version: "
                    "remove it, or choose another --out"
                )
        else:
            write_json(known, settings)
    kept = ", but for its *.answers.sqlite: they are paid for" if any(out.glob("*.answers.sqlite")) else ""
    found, wanted = settings_of(out), json.loads(json.dumps(settings))
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"{out} holds parts made with {key} {found.get(key)!r:.100}, and this is {wanted.get(key)!r:.100}: "
                f"choose a new folder, or remove this one{kept}"
            )
