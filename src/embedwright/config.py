"""YAML files into frozen pydantic models, with errors that name the file, the key and the nearest known key."""

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
    """A file that cannot be used as it is; the message names the file and the key."""


class _StrictLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence; here the second one is an error."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    """Keys are the texts that are written: YAML 1.1 would read `no` as false and `01` as 1."""
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other`: a key beside it may replace one of the other's
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a list or mapping cannot be a key")
        if key_node.value in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key_node.value!r} appears twice")
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    return {key_node.value: loader.construct_object(value, deep=True) for key_node, value in node.value}


class _TextLoader(_StrictLoader):
    """Values, too, are the texts that are written."""


_TextLoader.yaml_implicit_resolvers = {}

_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_texts(path: Path) -> dict[str, str]:
    """The mapping of texts to texts in a YAML file: `yes`, `no` and `1` stay what they are. Errors as `load_yaml`."""
    content = load_yaml(path, _TextLoader)
    for key, value in content.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{path}: {key}: expected a text")
    return content


def load_yaml(path: Path, loader: type[_StrictLoader] = _StrictLoader) -> dict[str, Any]:
    """The mapping in a YAML file. FileNotFoundError, or ConfigError for bad YAML and doubled keys, naming the file."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=loader)
    except (yaml.YAMLError, ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
    return content


Loc = tuple[int | str, ...]  # of a value, as pydantic gives it


def validate(
    model: type[Model], content: dict[str, Any], where: str, in_file: Callable[[Loc], Loc] = lambda loc: loc
) -> Model:
    """`content` as `model`. ConfigError lists every wrong key; an unknown one comes with the nearest known one.

    `in_file`: where a value stands in the file, if `content` is not quite what the file says.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        problems = error.errors()
        for problem in problems:
            loc = problem["loc"]
            if problem["type"] == "too_short" and any(p["loc"] != loc == p["loc"][: len(loc)] for p in problems):
                continue  # pydantic counts the valid items alone, and the wrong ones have lines of their own
            message = problem["msg"]
            if problem["type"] == "extra_forbidden":
                known = _known_keys(model, loc[:-1])
                nearest = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
                message = f"unknown key; did you mean {nearest[0]!r}?" if nearest else f"unknown key; known: {known}"
            lines.append(f"{where}: {'.'.join(map(str, in_file(loc)))}: {message}")
        raise ConfigError("\n".join(lines)) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, x being the nearest known word; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    models = [model]
    for part in loc:
        below = [m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields]
        if below:
            models = [m for annotation in below for m in _models_in(annotation)]
        else:  # a position in a list, a key of a dict, or the name of a union's branch
            models = [m for m in models if part in _branch_names(m)] or models
    return sorted({field.alias or key for m in models for key, field in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _branch_names(model: type[BaseModel]) -> set[Any]:
    """What pydantic calls this branch of a union: the class's name, or the value of its discriminator."""
    return {model.__name__, *(value for field in model.model_fields.values() for value in get_args(field.annotation))}
