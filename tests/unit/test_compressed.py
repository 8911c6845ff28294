"""The page of compression is made from records that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compressed
import pytest


def record(**about: Any) -> dict[str, Any]:
    said = {"model": "flagship", "command": "embedwright compress", "date": "2026-11-30T12:00:00", "machine": {}}
    said |= {"machine": {"cores": 2, "processor": "a processor"}, "versions": {"torch": "2.13"}, **about}
    rows = []
    for step, size, mean, low in (("original", 170e6, 60.0, None), ("layers", 140e6, 58.0, -3.0)):
        difference = None if low is None else {"value": mean - 60, "low": low, "high": -1.0}
        task = {"metric": "accuracy", "score": mean, "half": 1.5, "difference": difference}
        row = {"step": step, "size": size, "parameters": 8e7, "tokens_per_second": 900.4, "peak_memory": None}
        rows.append(row | {"mean": mean, "difference": difference, "tasks": {"r8": task}})
    history = [{"step": "layers", "of": "flagship", "kept": "12 of 16"}]
    return {
        "name": "x",
        "about": said,
        "suite": "dev-mini",
        "texts": "t",
        "tokens": 9,
        "history": history,
        "rows": rows,
    }


def test_records_are_shown_with_how_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "compression.md"
    page.write_text(f"before\n{compressed.MARKS[0]}old\n{compressed.MARKS[1]}after\n")
    monkeypatch.setattr(compressed, "DOCS", tmp_path)
    monkeypatch.setattr(compressed, "RECORDS", tmp_path / "records")
    assert compressed.pages().keys() == {page}  # without a record there is no picture
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "12-layers.json").write_text(json.dumps(record()))
    made = compressed.pages()
    text = made[page]
    assert text.startswith("before\n") and text.endswith("after\n") and "old\n" not in text
    assert "| layers | 140.0 | 80.0 | 900 | not counted | 58.00 | -2.00 | -3.00 to -1.00 | 58.0 ± 1.5 (-2.00) |" in text
    assert (
        "### 12-layers" in text and "1. layers: of flagship, kept 12 of 16" in text and "2 cores of a processor" in text
    )
    assert "circle" in made[page.with_suffix(".svg")] and "compression.svg" in text
    (tmp_path / "records" / "12-layers.json").write_text(json.dumps(record(date="")))
    with pytest.raises(SystemExit, match=r"12-layers.json: about has no date"):
        compressed.pages()
