"""Reads YAML files into frozen pydantic models. Errors name the file, the key and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from embedwright.errors import InputError, NotFoundError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(InputError):
    """A file with bad content. The message names the file and the key."""


class _StrictLoader(yaml.SafeLoader):
    """Raises an error for a key that appears twice. Plain YAML silently keeps the last one."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    """Builds a mapping whose keys are the written texts. YAML 1.1 would read `no` as false and `01` as 1."""
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`: other keys may override its keys
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a list or mapping cannot be a key")
        if key_node.value in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key_node.value!r} appears twice")
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    return {key_node.value: loader.construct_object(value, deep=True) for key_node, value in node.value}


class _TextLoader(_StrictLoader):
    """Keeps values, too, as the written texts."""


_TextLoader.yaml_implicit_resolvers = {}

_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_texts(path: Path) -> dict[str, str]:
    """Reads a mapping of texts to texts, in which `yes`, `no` and `1` stay texts. Errors as in `load_yaml`."""
    content = load_yaml(path, _TextLoader)
    for key, value in content.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{path}: {key}: expected a text")
    return content


def load_yaml(path: Path, loader: type[_StrictLoader] = _StrictLoader) -> dict[str, Any]:
    """Reads the mapping in a YAML file. Raises FileNotFoundError, or ConfigError for bad YAML and repeated keys."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=loader)
    except (yaml.YAMLError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
    return content


Loc = tuple[int | str, ...]  # path of a value, as in pydantic's errors


def validate(
    model: type[Model], content: dict[str, Any], where: str, in_file: Callable[[Loc], Loc] = lambda loc: loc
) -> Model:
    """Makes a `model` of `content`. ConfigError lists every wrong key, an unknown one with the nearest known key.

    `in_file` maps the path of a value in `content` to its path in the file, if they differ.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        problems = error.errors()
        for problem in problems:
            loc = problem["loc"]
            if problem["type"] == "too_short" and any(p["loc"] != loc == p["loc"][: len(loc)] for p in problems):
                continue  # pydantic counts valid items only, and the wrong ones have their own lines
            message = problem["msg"]
            if problem["type"] == "extra_forbidden":
                known = _known_keys(model, loc[:-1])
                nearest = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
                message = f"unknown key; did you mean {nearest[0]!r}?" if nearest else f"unknown key; known: {known}"
            lines.append(f"{where}: {'.'.join(map(str, in_file(loc)))}: {message}")
        raise ConfigError("\n".join(lines)) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` with the nearest known word x, or an empty text if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    models = [model]
    for part in loc:
        below = [m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields]
        if below:
            models = [m for annotation in below for m in _models_in(annotation)]
        else:  # an index of a list, a key of a dict, or the name of a union's branch
            models = [m for m in models if part in _branch_names(m)] or models
    return sorted({field.alias or key for m in models for key, field in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _branch_names(model: type[BaseModel]) -> set[Any]:
    """Returns pydantic's names for this branch of a union: the class name, or the value of its discriminator."""
    return {model.__name__, *(value for field in model.model_fields.values() for value in get_args(field.annotation))}
