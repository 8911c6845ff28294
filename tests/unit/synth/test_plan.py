"""Prompts that fit their keys and placeholders, and draws that a seed decides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.config import ConfigError
from embedwright.data.schema import Task
from embedwright.synth.plan import KINDS, PROMPTS, Kind, Plan, Prompts, split_evenly


def test_placeholders_are_drawn_per_example_and_seeded() -> None:
    values = yaml.safe_load(PROMPTS.read_text())["kinds"]["short-long"]["values"]
    assert values == {
        "query_type": ["extremely long-tail", "long-tail", "common"],
        "query_length": ["less than 5 words", "5 to 15 words", "at least 10 words"],
        "difficulty": ["high school", "college", "PhD"],
        "clarity": ["clear", "understandable with some effort", "ambiguous"],
        "num_words": [50, 100, 200, 300, 400, 500],
    }
    plan = Plan({"short-long": 1}, ("a", "b"))
    draws = [plan.draw("short-long", n) for n in range(600)]
    for name, known in values.items():
        count = Counter(draw.placeholders[name] for draw in draws)
        assert set(count) == {str(value) for value in known}
        assert max(count.values()) < 1.5 * min(count.values())
    assert 250 < sum(draw.model == "a" for draw in draws) < 350
    pairs = Counter((d.placeholders["difficulty"], d.placeholders["clarity"], d.model) for d in draws)
    assert len(pairs) == 18  # drawn apart from each other
    larger, other = Plan({"short-long": 9}, ("a", "b")), Plan({"short-long": 1}, ("a", "b"), seed=1)
    assert draws == [larger.draw("short-long", n) for n in range(600)]
    assert draws != [other.draw("short-long", n) for n in range(600)]


def test_every_prompt_is_whole() -> None:
    prompts = Prompts.load()
    assert set(prompts.kinds) == set(KINDS)
    plan = Plan(dict.fromkeys(KINDS, 4), ("m",))
    for kind in KINDS:
        prompt = plan.question(kind, 0, Task(name="t", instruction="THE TASK")).prompt
        assert not re.search(r"[{}]", prompt)
        assert ("THE TASK" in prompt) == (kind not in ("sts", "bitext"))
        assert all(value in prompt for value in plan.draw(kind, 0).placeholders.values())


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(PROMPTS.read_text())
    change(content["kinds"]["sts"])
    return content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda part: part["values"].pop("unit"), "placeholder 'unit' has no values"),
        (lambda part: part["values"].update(mood=["gay"]), "placeholder 'mood' has no values, or is not used"),
        (lambda part: part["values"].update(unit=[]), "unit"),
        (lambda part: part["answer"].update(query="S9"), 'does not ask for the key "S9"'),
        (lambda part: part.update(brainstorm="{number}"), "either `brainstorm` or `instruction`"),
        (lambda part: part.update(brainstorm="give me tasks", instruction=""), "placeholder"),
        (lambda part: part.update(simmetric=True), "did you mean 'symmetric'"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(tmp_path: Path, change: Any, reason: str) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(broken(change)))
    with pytest.raises(ConfigError, match=re.escape(reason)):
        Prompts.load(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("count", "kinds", "split"),
    [
        (30, ["short-long", "long-short", "short-short"], {"short-long": 10, "long-short": 10, "short-short": 10}),
        (8, ["sts", "short-long", "bitext"], {"short-long": 3, "sts": 3, "bitext": 2}),
    ],
)
def test_a_count_is_split(count: int, kinds: list[str], split: dict[Kind, int]) -> None:
    assert split_evenly(count, kinds) == split


@pytest.mark.parametrize(
    ("count", "kinds", "reason"),
    [
        (3, ["long"], "no kind of task 'long'; known: short-long"),
        (2, ["sts", "sts"], "once"),
        (1, ["sts", "bitext"], "1"),
    ],
)
def test_a_split_that_is_refused(count: int, kinds: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        split_evenly(count, kinds)


def test_the_documentation_knows_every_kind() -> None:
    page = (Path(__file__).parents[3] / "docs" / "synthesis.md").read_text()
    for kind, part in Prompts.load().kinds.items():
        keys = [f"`{name}`" if name else "" for name in (part.answer.query, part.answer.positive, part.answer.negative)]
        family = part.family + (", symmetric" if part.symmetric else "")
        row = f"| `{kind}` | {keys[0]} | {keys[1]} | {keys[2]} | {family} |"
        assert row.replace("|  |", "| |") in page
