"""Draws scores against sizes or speeds as SVG: panels side by side, with numbered points that a legend names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from embedwright.evaluation.compare.picture import round_step

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, ROW = 400, 300, 56, 44, 48, 20  # pixels, of a panel; of a row of the legend

_STYLE = """
.points{font:13px system-ui,sans-serif;--ink:#222;--paper:#fff;--dot:#0b62a8;background:var(--paper)}
@media(prefers-color-scheme:dark){.points{--ink:#ddd;--paper:#191b1f;--dot:#7cc0ff}}
.points text{fill:var(--ink)}.points path{stroke:var(--ink);opacity:.15}.points circle{fill:var(--dot)}
.points .interval{stroke:var(--dot);stroke-width:2;opacity:.6}.points .number{fill:var(--paper);font-size:10px}
"""


class Point(NamedTuple):
    """Where a model lies, and the interval of `y` if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def panels(title: str, names: Sequence[str], plots: Mapping[str, Sequence[Point]]) -> str:
    """Returns an SVG picture. `plots` maps what `x` is to a point for each name; axes of `x` begin at zero."""
    size = WIDTH * len(plots), HEIGHT + ROW * len(names) + 12
    lines = ["<svg xmlns='http://www.w3.org/2000/svg' class='points' viewBox='0 0 {} {}' role='img'>".format(*size)]
    lines += [f"<title>{escape(title)}</title><style>{_STYLE}</style>", _text(8, 20, title, "font-weight='600'")]
    for number, (x, points) in enumerate(plots.items()):
        lines += [f"<g transform='translate({number * WIDTH} 0)'>", *_panel(x, points), "</g>"]
    lines += [_text(LEFT, HEIGHT + ROW * number, f"{number}  {name}") for number, name in enumerate(names, start=1)]
    return "\n".join([*lines, "</svg>\n"])


def _panel(what: str, points: Sequence[Point]) -> list[str]:
    foot, right = HEIGHT - BOTTOM, WIDTH - 28  # half of the last number stands beyond
    xs = _Axis([0.0, *(point.x for point in points)], LEFT, right)
    ys = _Axis([end for point in points for end in point[1:] if end is not None], foot, TOP)
    lines = [_text((LEFT + WIDTH) / 2, HEIGHT - 10, what, "text-anchor='middle'"), _text(LEFT, TOP - 8, "mean score")]
    for tick, at in xs.ticks:
        lines += [f"<path d='M{at} {TOP}V{foot}'/>", _text(at, foot + 16, f"{tick:,g}", "text-anchor='middle'")]
    for tick, at in ys.ticks:
        lines += [f"<path d='M{LEFT} {at}H{right}'/>", _text(LEFT - 6, at + 4, f"{tick:g}", "text-anchor='end'")]
    for point in points:
        if point.low is not None and point.high is not None:
            lines.append(f"<path d='M{xs(point.x)} {ys(point.low)}V{ys(point.high)}' class='interval'/>")
    for number, point in enumerate(points, start=1):
        x, y = xs(point.x), ys(point.y)
        lines.append(f"<circle cx='{x}' cy='{y}' r='8'/>")
        lines.append(_text(x, y + 3.5, str(number), "class='number' text-anchor='middle'"))
    return lines


class _Axis:
    """Maps values to pixels between `start` and `end`. `ticks` are round values with their pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        step = round_step(max(values) - min(values))
        first, last = math.floor(min(values) / step), math.ceil(max(values) / step)
        self._zero, self._start, self._scale = first * step, start, (end - start) / (max(last - first, 1) * step)
        ticks = [round(tick * step, 9) for tick in range(first, max(last, first + 1) + 1)]
        self.ticks = [(tick, self(tick)) for tick in ticks]

    def __call__(self, value: float) -> float:
        return round(self._start + self._scale * (value - self._zero), 1)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' {more}>{escape(text)}</text>"
