"""The picture of a report: points where they belong, numbers that the legend names."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from embedwright.compress.picture import HEIGHT, WIDTH, Point, panels

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_by_their_values_and_the_legend_names_them() -> None:
    sizes = [Point(100, 60.0), Point(50, 58.0, 57.0, 59.5), Point(25, 40.0, 35.0, 45.0)]
    speeds = [Point(1000, 60.0), Point(2000, 58.0, 57.0, 59.5), Point(4000, 40.0, 35.0, 45.0)]
    picture = ElementTree.fromstring(panels("<Steps>", ["original", "layers", "weights"], {"MB": sizes, "t/s": speeds}))
    texts = ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]
    assert {"<Steps>", "MB", "t/s", "1  original", "2  layers", "3  weights", "mean score"} <= {*texts}
    assert picture.get("viewBox") == f"0 0 {2 * WIDTH} {HEIGHT + 72}"
    left, right = picture.findall(f"{SVG}g")
    assert (left.get("transform"), right.get("transform")) == ("translate(0 0)", f"translate({WIDTH} 0)")
    for plot, points in ((left, sizes), (right, speeds)):
        circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in plot.findall(f"{SVG}circle")]
        (x0, y0), (x1, y1), (x2, y2) = circles
        assert (x2 - x0) / (x1 - x0) == pytest.approx((points[2].x - points[0].x) / (points[1].x - points[0].x), 1e-2)
        assert y0 < y1 < y2 and (y2 - y0) / (y1 - y0) == pytest.approx(10, rel=2e-2)  # up is better
        assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in circles)
        assert len([line for line in plot.findall(f"{SVG}path") if line.get("class") == "interval"]) == 2


def test_one_model_alone_is_drawn() -> None:
    assert "circle" in panels("t", ["original"], {"MB": [Point(1.0, 50.0)]})
