from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np

from embedwright.evaluation.compare.compare import Candidate, compare
from embedwright.evaluation.compare.table import picture, text
from embedwright.evaluation.results import Result, Results


def candidate(name: str, seed: int, shift: float = 0.0, suites: tuple[str, ...] = ("dev",)) -> Candidate:
    score = np.random.default_rng(1).random(200) + np.random.default_rng(seed).normal(shift, 0.01, 200)
    rows = [Result("docs", "retrieval", "nDCG@10", float(score.mean()), items={"score": score, "id": np.arange(200)})]
    rows += [Result("bare", "sts", "spearman", 0.5 + shift)]
    return Candidate(name, {None: [Results(suite, tuple(rows), 1.0) for suite in suites]})


def test_the_table_shows_each_difference_with_what_may_be_said_of_it() -> None:
    comparison = compare([candidate("a", 1), candidate("b", 2, 0.02), candidate("c", 3)], equivalent=0.5)
    shown = text(comparison)
    blocks = shown.split("\n\n")
    assert [block.split("\n")[0] for block in blocks[:2]] == ["b against a", "c against a"]
    lines = blocks[0].split("\n")
    row = comparison.rows[0]
    assert " ".join(lines[1].split()) == (
        "task metric baseline score difference 95 % interval over seen p p equal claim"
    )
    assert lines[2].startswith("docs")
    assert f"{row.difference:+.2f}" in lines[2]
    assert f"{row.low:+.2f} to {row.high:+.2f}" in lines[2]
    assert lines[2].split()[-1] == "higher"
    assert lines[3].endswith("no interval")
    assert [line.split("  ")[0] for line in lines[4:]] == ["mean over 2 tasks"]
    assert "within 0.5" in blocks[1]
    assert "number of comparisons, 2 (Holm)" in blocks[-1]
    assert "p equal" not in text(compare([candidate("a", 1), candidate("b", 2)]))


def test_suites_and_what_was_left_out_are_named() -> None:
    shown = text(compare([candidate("a", 1, suites=("dev", "air")), candidate("b", 2, suites=("dev", "air", "more"))]))
    assert {"dev/docs", "air/docs", "air/mean over 2 tasks"} <= {line.split("  ")[0] for line in shown.split("\n")}
    assert "Left out:\n  b: more/docs is of b alone\n  b: more/bare is of b alone\n" in shown


def test_the_picture_has_a_dot_for_each_row() -> None:
    comparison = compare([candidate("a", 1), candidate("b", 2, 0.02), candidate("c", 3)])
    root = ElementTree.fromstring(picture(comparison))
    dots = [element.attrib["class"] for element in root.iter() if element.tag.endswith("circle")]
    assert len(dots) == len(comparison.rows)
    assert dots.count("claimed") == sum(row.claim == "higher" for row in comparison.rows) == 1
    assert "b against a, points" in picture(compare([candidate("a", 1), candidate("b", 2)]))


def test_tasks_without_items_are_named_beside_the_mean() -> None:
    sides = [candidate("a", 1), candidate("b", 2)]
    sides = [Candidate(each.name, {None: [many_tasks(each.seeds[None][0])]}) for each in sides]
    shown = text(compare(sides))
    (mean,) = [line for line in shown.split("\n") if line.startswith("mean over 5 tasks")]
    assert "  items; without bare  " in mean
    assert "\n\nwithout: the items of these tasks are not kept." in shown
    assert "without" not in text(compare([candidate("a", 1), candidate("b", 2)]))


def many_tasks(results: Results) -> Results:
    docs, bare = results.rows
    return Results(results.suite, (*(replace(docs, task=f"docs{number}") for number in range(4)), bare), 1.0)
