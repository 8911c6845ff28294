"""The one folder where conversions are kept: converted weights, training rows as Arrow."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`$EMBEDWRIGHT_CACHE` or `~/.cache/embedwright`, with these parts below it. Not created here."""
    root = os.environ.get("EMBEDWRIGHT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "embedwright").joinpath(*parts)
