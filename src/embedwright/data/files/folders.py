"""Finds the data files of a folder: shards, a folder that `datasets` saved, a copy of a repository of the hub.

Hidden files, leftovers and files beside data (tasks, quarantine, reports) are never read as data.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from embedwright.data.files.rows import plain_name
from embedwright.data.schema import DataError
from embedwright.errors import NotFoundError

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_BESIDE = (".tasks.jsonl", ".quarantine.jsonl", ".leaks.jsonl", ".brainstorm.jsonl", ".report.json")
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "report.json"}
_NO_DATA |= {"manifest.json", "config.json", "parts.json"}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_PART = re.compile(r"part-(\d{5})-of-(\d{5})")  # names of the files that `parts` writes
_SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}


def is_data(path: Path) -> bool:
    """Returns whether a file has the name of a data file, and not that of a leftover or of a file beside data."""
    return plain_name(path.name).endswith(SUFFIXES) and not is_beside(path)


def is_beside(path: Path) -> bool:
    """Returns whether a file is a leftover, or belongs to a data file beside it."""
    name = path.name
    return name.startswith((".", "_", "cache-")) or name in _NO_DATA or name.endswith(_BESIDE)


def stem_of(path: Path) -> str:
    """Returns the name of a file or folder without its suffixes. It is the task of rows that name none."""
    # A link is not followed: a file of the hub's cache is one, to a file whose name is a hash.
    name = plain_name((path if path.name not in ("", "..") else path.resolve()).name)
    return next((name.removesuffix(end) for end in (*SUFFIXES, ".txt") if name.endswith(end)), name)


def is_beir(folder: Path) -> bool:
    """Returns whether a folder has the layout of BEIR: a folder `qrels`, or a `queries.jsonl`."""
    return (folder / "qrels").is_dir() or any((folder / f"queries.jsonl{end}").is_file() for end in ("", ".gz"))


def is_one_set(folder: Path) -> bool:
    """Returns whether a folder is surely one data set, and not a folder of several."""
    named = ("state.json", "dataset_dict.json")
    return (
        is_beir(folder)
        or any((folder / name).is_file() for name in named)
        or any(is_data(file) and _SHARD.fullmatch(stem_of(file)) for file in folder.iterdir())
    )


def data_files(path: Path, split: str = "train") -> list[Path]:
    """Returns the files of a data set in the order of their names: the file itself, or those of a folder.

    If a folder has several splits, these are the files of `split`. Raises FileNotFoundError, and DataError if the
    folder has no data, if none of its splits is `split`, if it may hold the same rows in two formats, or if it lacks
    some of its parts.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise NotFoundError(f"{path} does not exist")
    listed = path / "dataset_dict.json"
    if listed.is_file():
        return data_files(path / _one_of([str(name) for name in _json(listed, "splits")], split, path), split)
    if (path / "state.json").is_file():
        return [path / str(file["filename"]) for file in _json(path / "state.json", "_data_files")]
    files = sorted(file for file in path.iterdir() if file.is_file() and is_data(file))
    if not files and (path / "data").is_dir():
        return data_files(path / "data", split)
    if not files:
        raise DataError(f"{path} is a folder without data: {_content(path)}. {_EXPECTED}")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file), []).append(file)
    chosen = by_split[_one_of(list(by_split), split, path)]
    bare = [stem_of(file) for file in chosen]
    if twice := [file.name for file, name in zip(chosen, bare, strict=True) if bare.count(name) > 1]:
        raise DataError(f"{path} holds {' and '.join(twice[:2])}, which may be the same rows: name the file")
    _check_parts(path, chosen)
    return chosen


_EXPECTED = (
    "Data is a file or a folder of files (.jsonl, .json, .csv, .tsv, .parquet, .arrow, also .gz or .zst), a folder of"
    " `datasets`, or a BEIR folder (corpus.jsonl, queries.jsonl, qrels/)"
)


def _check_parts(folder: Path, files: Sequence[Path]) -> None:
    """Raises DataError if the files are parts of a whole, and some are missing, or not done: without their report."""
    ours = (folder / "parts.json").is_file()  # parts of others have no reports
    parts = [(part.groups(), file) for file in files if (part := _PART.fullmatch(stem_of(file)))]
    for count in sorted({count for (_, count), _ in parts}):
        done = {
            int(index)
            for (index, of), file in parts
            if of == count and (not ours or file.with_name(f"{file.name}.report.json").is_file())
        }
        if missing := [index for index in range(int(count)) if index not in done]:
            raise DataError(
                f"{folder} is unfinished: of {int(count)} parts, {len(missing)} are missing or have questions without "
                f"an answer (first part-{missing[0]:05d}-of-{count}): run --shard {missing[0]}/{int(count)} of the "
                "command that wrote it"
            )


def _split_of(file: Path) -> str:
    """Returns `train` for `train-00000-of-00002.parquet` and for `train.jsonl`, and nothing for any other name."""
    name = stem_of(file)
    if shard := _SHARD.fullmatch(name):
        return shard[1]
    return name if name in _SPLITS else ""


def _one_of(splits: Sequence[str], split: str, folder: Path) -> str:
    if len(splits) == 1:
        return splits[0]
    if split not in splits:
        names = ", ".join(name or "files of other names" for name in splits)
        raise DataError(f"{folder} holds several splits ({names}), and none is {split!r}: name the file of one")
    others = ", ".join(name or "files of other names" for name in splits if name != split)
    log.warning("%s: %s is read; not read: %s", folder, split, others)
    return split


def _json(file: Path, key: str) -> list[dict[str, str]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a file of the `datasets` library: {error}") from None
    return list(found)


def _content(folder: Path) -> str:
    names = sorted(file.name + ("/" if file.is_dir() else "") for file in folder.iterdir())
    return f"it holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "it is empty"
