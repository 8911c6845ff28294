"""Draws differences with their intervals as SVG: one row each, around a line at zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABELS, VALUES, ROW, TOP = 760, 260, 70, 22, 40  # pixels; labels stand on the left, values on the right
LONGEST = 100  # letters of a text

# Its own colours for a light and a dark page. The class keeps them from the rest of a page that holds the picture.
_STYLE = """
.intervals{font:13px system-ui,sans-serif;--ink:#222;--paper:#fff;--claim:#0b62a8;background:var(--paper)}
@media(prefers-color-scheme:dark){.intervals{--ink:#ddd;--paper:#191b1f;--claim:#7cc0ff}}
.intervals text{fill:var(--ink)}.intervals path{stroke:var(--ink);fill:none}.intervals .tick{opacity:.15}
.intervals .interval{stroke-width:2;opacity:.7}.intervals circle{stroke:var(--ink);stroke-width:1.5;fill:var(--paper)}
.intervals .claimed{stroke:var(--claim);fill:var(--claim)}
"""


class Mark(NamedTuple):
    """One row: a difference, its interval if it has one, and whether a claim is made of it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    claimed: bool = False


def intervals(title: str, groups: Mapping[str, Sequence[Mark]]) -> str:
    """Returns an SVG picture of groups of rows. A claimed difference is a filled dot, any other an open one."""
    marks = [mark for group in groups.values() for mark in group]
    ends = [0.0, *(end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None)]
    step = round_step(max(ends) - min(ends))
    first, last = math.floor(min(ends) / step), math.ceil(max(ends) / step)
    height = TOP + ROW * (len(marks) + len(groups)) + 24
    scale = (WIDTH - LABELS - VALUES) / max(last - first, 1)

    def x(value: float) -> float:
        return round(LABELS + scale * (value / step - first), 1)

    lines = [_text(8, 20, title, "font-weight='600'")]
    for tick in range(first, last + 1):
        at = x(tick * step)
        lines.append(f"<path d='M{at} {TOP - 8}V{height - 24}' class='{'zero' if tick == 0 else 'tick'}'/>")
        lines.append(_text(at, height - 8, f"{tick * step:g}", "text-anchor='middle'"))
    y = TOP
    for name, group in groups.items():
        lines.append(_text(8, y := y + ROW, name, "font-weight='600'") if len(groups) > 1 else "")
        for mark in group:
            y += ROW
            lines.append(_text(20, y, mark.label))
            if mark.low is not None and mark.high is not None:
                lines.append(f"<path d='M{x(mark.low)} {y - 4}H{x(mark.high)}' class='interval'/>")
            kind = "claimed" if mark.claimed else "open"
            lines.append(f"<circle cx='{x(mark.value)}' cy='{y - 4}' r='4.5' class='{kind}'/>")
            lines.append(_text(WIDTH - 8, y, f"{mark.value:+.2f}", "text-anchor='end'"))
    head = f"<svg xmlns='http://www.w3.org/2000/svg' class='intervals' viewBox='0 0 {WIDTH} {height}' role='img'>"
    return "\n".join([head, f"<title>{escape(title)}</title><style>{_STYLE}</style>", *filter(None, lines), "</svg>\n"])


def round_step(span: float) -> float:
    """Returns a round distance between ticks, so that about six of them fit into `span`."""
    power = 10.0 ** math.floor(math.log10(max(span, 1e-3) / 6))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= max(span, 1e-3) / 6 * 0.999)


def _text(x: float, y: float, text: str, more: str = "") -> str:
    shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    return f"<text x='{x}' y='{y}' {more}>{escape(shown)}</text>"
