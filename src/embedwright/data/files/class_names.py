"""Finds the names of classes that rows call 0, 1, ...: the `datasets` library writes them into files or beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from embedwright.data.files.folders import data_files
from embedwright.data.files.rows import opened_table

Names = dict[str, str]  # the number of a class, as a text -> its name


def class_names(path: Path, column: str) -> Names | None:
    """Returns the names of the classes in `column` of a file or folder, or None if nothing says them.

    Parquet and Arrow files carry them as metadata. Else `dataset_info.json`, `dataset_infos.json` or the head of a
    `README.md` in the file's folder, or in the one above, may say them. Several configs must agree.
    """
    first = data_files(path)[0].absolute()
    places = (_in_file(first), _beside(first.parent), _beside(first.parent.parent))
    features = next((found for place in places if (found := [part for part in place if part])), [])
    names = [named for part in features if (named := names_of(part.get(column)))]
    return names[0] if names and all(other == names[0] for other in names) else None


def names_of(feature: Any) -> Names | None:
    """Returns the names of a ClassLabel, or of a list of such, in any of the forms that `datasets` writes."""
    if not isinstance(feature, Mapping):
        return None
    for inner in ("feature", "sequence", "list", "dtype", "class_label"):
        if isinstance(feature.get(inner), Mapping):
            return names_of(feature[inner])
    names = feature.get("names")
    if isinstance(names, Mapping):
        return {str(key): str(name) for key, name in names.items()}
    return {str(i): str(name) for i, name in enumerate(names)} if isinstance(names, list) and names else None


def _in_file(file: Path) -> list[Mapping[str, Any]]:
    """Maps column to feature, from the metadata of a Parquet or Arrow file."""
    with opened_table(file) as table:
        written = ((table[0].metadata or {}) if table else {}).get(b"huggingface")
    try:
        return [dict(json.loads(written)["info"]["features"])] if written else []
    except (ValueError, KeyError, TypeError):
        return []


def _beside(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Maps column to feature, for each config that a file of `folder` describes. A broken file describes none."""
    infos: list[Any] = []
    for name in ("dataset_info.json", "dataset_infos.json"):
        info = _parsed(_read(folder / name), json.loads)
        infos += [info, *info.values()]
    head = _read(folder / "README.md").split("---\n", 2)
    described = _parsed(head[1], yaml.safe_load).get("dataset_info") if len(head) == 3 and not head[0] else None
    infos += described if isinstance(described, list) else [described]
    for info in infos:
        features = info.get("features") if isinstance(info, Mapping) else None
        if isinstance(features, list):  # so a README has them
            features = {str(part.get("name")): part for part in features if isinstance(part, Mapping)}
        if isinstance(features, Mapping):
            yield features


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _parsed(text: str, parse: Any) -> dict[str, Any]:
    try:
        found = parse(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
