"""A study as text: each arm's mean and its difference from the baseline, beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render(study: Mapping[str, Any]) -> str:
    """Returns the table of a study, as `study.json` has it. A smoke test has no numbers to show."""
    lines = []
    if study["smoke"]:
        lines.append(f"{study['study']}: smoke test of {len(study['cells'])} cells; its scores mean nothing")
    for name, reason in study["failed"].items():
        lines.append(f"{name}: {reason}")
    if study["missing"]:
        lines.append(f"not whole, missing: {', '.join(study['missing'])}")
    return "\n".join(lines)
