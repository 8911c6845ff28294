"""The names of classes that rows call 0, 1, ...: from what the `datasets` library writes into files and beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from embedwright.data.files.folders import data_files

Names = dict[str, str]  # the number of a class, as a text -> its name


def class_names(path: Path, column: str) -> Names | None:
    """The names of the classes in `column` of a file or folder; None where nothing says them.

    Parquet and Arrow files carry them as metadata. Else `dataset_info.json`, `dataset_infos.json` or the head of a
    `README.md` in the file's folder, or in the one above, may say them. Several configs must agree.
    """
    first = data_files(path)[0]
    found = [names for features in _all_features(first) if (names := names_of(features.get(column)))]
    return found[0] if found and all(names == found[0] for names in found) else None


def names_of(feature: Any) -> Names | None:
    """The names of a ClassLabel, or of a list of such, in any of the forms that `datasets` writes."""
    if not isinstance(feature, Mapping):
        return None
    for inner in ("feature", "sequence", "list"):
        if isinstance(feature.get(inner), Mapping):
            return names_of(feature[inner])
    names = feature.get("names")
    if names is None and isinstance(feature.get("class_label"), Mapping):
        names = feature["class_label"].get("names")
    if isinstance(names, Mapping):
        return {str(key): str(name) for key, name in names.items()}
    return {str(i): str(name) for i, name in enumerate(names)} if isinstance(names, list) and names else None


def _all_features(file: Path) -> Iterator[Mapping[str, Any]]:
    """Column -> feature, from the file itself, else from what stands beside it."""
    if (own := _metadata(file)) is not None:
        yield own
        return
    for folder in (file.absolute().parent, file.absolute().parent.parent):
        if beside := [features for features in _beside(folder) if features]:
            yield from beside
            return


def _metadata(file: Path) -> Mapping[str, Any] | None:
    with file.open("rb") as stream:
        head = stream.read(6)
    try:
        if head.startswith(b"PAR1"):
            schema = pq.read_schema(file)
        elif head.startswith(b"ARROW1"):
            schema = pa.ipc.open_file(pa.memory_map(str(file))).schema
        elif head.startswith(b"\xff\xff\xff\xff"):
            schema = pa.ipc.open_stream(pa.memory_map(str(file))).schema
        else:
            return None
    except pa.ArrowInvalid:  # the reader of its rows says what is broken
        return None
    written = (schema.metadata or {}).get(b"huggingface")
    try:
        return dict(json.loads(written)["info"]["features"]) if written else None
    except (ValueError, KeyError, TypeError):
        return None


def _beside(folder: Path) -> Iterator[Mapping[str, Any]]:
    for name in ("dataset_info.json", "dataset_infos.json"):
        info = _parsed(folder / name, json.loads)
        for part in (info, *info.values()):
            if isinstance(part, Mapping):
                yield _by_column(part.get("features"))
    text = _read(folder / "README.md")
    head = text.split("---\n", 2)[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    parts = _parsed(head, yaml.safe_load).get("dataset_info")
    for part in parts if isinstance(parts, list) else [parts]:
        if isinstance(part, Mapping):
            yield _by_column(part.get("features"))


def _by_column(features: Any) -> Mapping[str, Any]:
    """A README lists the features: `{name, dtype: {class_label: {names}}}`, or with `sequence` for `dtype`."""
    if isinstance(features, list):
        found = {}
        for feature in features:
            if isinstance(feature, Mapping):
                inner = next((feature[key] for key in ("dtype", "sequence", "list") if key in feature), None)
                found[str(feature.get("name"))] = inner.get("dtype", inner) if isinstance(inner, Mapping) else inner
        return found
    return features if isinstance(features, Mapping) else {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig") if file.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _parsed(source: Path | str, parse: Any) -> dict[str, Any]:
    """A mapping, or an empty one: what is broken names no classes."""
    try:
        found = parse(_read(source) if isinstance(source, Path) else source)
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
