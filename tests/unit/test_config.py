"""YAML files that cannot be used, and what the error says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from embedwright.config import ConfigError, load_texts, load_yaml, validate


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optim(Strict):
    lr: float = 1e-4
    warmup_steps: int = 0


class Train(Strict):
    kind: Literal["train"] = "train"
    temperature: float = Field(default=0.02, gt=0)
    optim: Optim = Optim()


class Mine(Strict):
    kind: Literal["mine"]
    margin: float = 0.95


class Run(Strict):
    name: str
    stages: list[Annotated[Train | Mine, Field(discriminator="kind")]] = []
    optim: Optim | None = None
    per_task: dict[str, Optim] = {}


def message(content: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Run, content, "run.yaml")
    return str(caught.value)


def test_a_good_file_becomes_its_model(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: größe\nstages:\n- {kind: mine, margin: 0.5}\noptim: {lr: 2.0e-4}\n", encoding="utf-8")
    run = validate(Run, load_yaml(file), "run.yaml")
    assert run == Run(name="größe", stages=[Mine(kind="mine", margin=0.5)], optim=Optim(lr=2e-4))


@pytest.mark.parametrize(
    ("content", "where", "nearest"),
    [
        ({"name": "x", "stagez": []}, "stagez", "stages"),
        ({"name": "x", "optim": {"warmup": 3}}, "optim.warmup", "warmup_steps"),
        ({"name": "x", "stages": [{"kind": "train", "temprature": 1.0}]}, "stages.0", "temperature"),
        ({"name": "x", "stages": [{"kind": "mine", "margins": 1.0}]}, "stages.0", "margin"),
        ({"name": "x", "stages": [{"kind": "train", "optim": {"lrr": 1.0}}]}, "stages.0", "lr"),
        ({"name": "x", "per_task": {"nq": {"warmup_step": 1}}}, "per_task.nq.warmup_step", "warmup_steps"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(content: dict, where: str, nearest: str) -> None:
    text = message(content)
    assert text.startswith(f"run.yaml: {where}") and f"did you mean {nearest!r}?" in text


def test_a_key_like_no_other_lists_the_known_ones() -> None:
    assert "known: ['lr', 'warmup_steps']" in message({"name": "x", "optim": {"zzz": 1}})


def test_every_wrong_key_has_its_line() -> None:
    lines = message({"stagez": 1, "optim": {"lr": "fast"}}).splitlines()
    assert len(lines) == 3 and all(line.startswith("run.yaml: ") for line in lines)
    assert any(line.startswith("run.yaml: name: ") for line in lines)
    assert any(line.startswith("run.yaml: optim.lr: ") for line in lines)


def test_a_key_given_twice_is_an_error_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\noptim:\n  lr: 1.0\n  warmup_steps: 2\n  lr: 2.0\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: line 5: key 'lr' appears twice"):
        load_yaml(file)


def test_aliases_are_not_repeats(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("a: &same {lr: 1.0}\nb: *same\nc: {<<: *same, warmup_steps: 2}\nd: {<<: *same, lr: 3.0}\n")
    content = load_yaml(file)
    assert content["b"] == {"lr": 1.0} and content["c"] == {"lr": 1.0, "warmup_steps": 2}
    assert content["d"] == {"lr": 3.0}


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: expected a mapping"):
        load_yaml(file)


@pytest.mark.parametrize(
    "content", [b"a: [1, 2\n", b"a: {b: c: d}\n", b"a: \xff\xfe\n", b"a: !!python/object:os.system {}\n"]
)
def test_bad_yaml_names_the_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        load_yaml(file)


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "{a: 1}: 2\n"])
def test_a_key_that_is_no_word_is_bad_yaml_too(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml: "):
        load_yaml(file)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        load_yaml(tmp_path / "nowhere.yaml")


def test_a_byte_order_mark_is_no_part_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert load_yaml(file) == {"name": "x"}


def test_keys_are_what_is_written(tmp_path: Path) -> None:
    """YAML 1.1 would read `no` as false and `01` as 1: labels are keys of `words`."""
    file = tmp_path / "run.yaml"
    lines = ["no: a", "Yes: b", "01: c", "1.0: d", "null: e", "2020-01-01: f", "more: &m {x: 1, y: 1}"]
    file.write_text("\n".join([*lines, "other: {<<: *m, y: 2}\n"]))
    read = load_yaml(file)
    assert list(read) == ["no", "Yes", "01", "1.0", "null", "2020-01-01", "more", "other"]
    assert read["other"] == {"x": 1, "y": 2}


def test_texts_are_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("yes: no\n1: 2.50\n'on': \"off\"\n")
    assert load_texts(file) == {"yes": "no", "1": "2.50", "on": "off"}
    file.write_text("a: [b]\n")
    with pytest.raises(ConfigError, match=r"words\.yaml: a: expected a text"):
        load_texts(file)
