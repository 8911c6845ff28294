from __future__ import annotations

from xml.etree import ElementTree

import pytest

from embedwright.evaluation.compare.picture import Mark, intervals

SVG = "{http://www.w3.org/2000/svg}"
MARKS = [Mark("r8 & <more>", 1.5, 0.5, 2.5, claimed=True), Mark("sts", -1.0, -3.0, 1.0), Mark("bare", 0.25)]


def at(element: ElementTree.Element) -> list[float]:
    return [
        float(number) for number in element.attrib["d"].replace("M", "").replace("H", " ").replace("V", " ").split()
    ]


def test_dots_and_intervals_stand_on_the_axis_where_their_numbers_say() -> None:
    root = ElementTree.fromstring(intervals("b against a", {"b": MARKS}))
    paths = root.findall(f"{SVG}path")
    (zero,) = (at(path)[0] for path in paths if path.attrib["class"] == "zero")
    ticks = {
        float(text.text or ""): float(text.attrib["x"]) for text in root.findall(f"{SVG}text[@text-anchor='middle']")
    }
    unit = (max(ticks.values()) - min(ticks.values())) / (max(ticks) - min(ticks))
    assert ticks[0] == zero
    assert (min(ticks), max(ticks)) == (-3, 3)  # all is on the axis
    dots = root.findall(f"{SVG}circle")
    assert [(float(dot.attrib["cx"]) - zero) / unit for dot in dots] == pytest.approx([1.5, -1, 0.25], abs=0.01)
    assert [dot.attrib["class"] for dot in dots] == ["claimed", "open", "open"]
    drawn = [at(path) for path in paths if path.attrib["class"] == "interval"]
    assert [[(x - zero) / unit for x in (left, right)] for left, _, right in drawn] == [
        pytest.approx([0.5, 2.5], abs=0.01),
        pytest.approx([-3, 1], abs=0.01),
    ]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"b against a", "r8 & <more>", "+1.50", "-1.00"} <= {*texts}
    assert "b" not in texts  # the one group needs no name


def test_several_groups_are_named_and_nothing_to_show_is_still_a_picture() -> None:
    root = ElementTree.fromstring(intervals("x", {"one": MARKS, "two": [Mark("t" * 500, 0.0)]}))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    assert {"one", "two"} <= {*texts}
    assert max(map(len, texts)) <= 100
    heights = [float(dot.attrib["cy"]) for dot in root.iter(f"{SVG}circle")]
    assert heights == sorted(set(heights))
    assert heights[-1] < float(root.attrib["viewBox"].split()[3]) - 24  # above the axis
    ElementTree.fromstring(intervals("x", {"one": [Mark("same", 0.0, 0.0, 0.0)]}))
