"""docs/scale.md's tables are what the program says and what the records have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import scale
from transformers import MistralConfig

from embedwright.training.plan import report
from embedwright.training.recipe import Recipe

RECORD = {"command": "python b.py --folder /x/y", "date": "2026-01-02", "machine": {"cores": 2, "cpu": "Z80"}}


def test_memory_is_what_the_plan_of_the_recipe_says(tmp_path: Path) -> None:
    MistralConfig().save_pretrained(tmp_path)
    recipe = Recipe.load(scale.ROOT / "recipes" / "nv-embed-v2.yaml")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(tmp_path)})})
    said = re.findall(r"GPU, each of 8 \((\w+)\) +(.*)", report(recipe, processes=8))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scale.memory(*scale.planned())[2:]]
    shown = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert [way for way, _ in said] == ["ddp", "fsdp"] and len(shown) == 6
    for way, line in said:
        found = shown[f"`lora`, gradient checkpointing, `{way}`"]
        assert max(abs(a - float(b)) for a, b in zip(found, line.split(), strict=True)) <= 0.051


def test_mining_shows_records_and_how_they_were_made(tmp_path: Path) -> None:
    assert scale.mining(tmp_path) == ["Not measured yet."]
    sizes = {"queries": 1000, "documents": 10_000, "width": 50, "precision": "float16"}
    search = RECORD | {"size": sizes, "seconds": 2.0, "read": 10**9, "peak_mb": 500.0, "table": ["first", "derived"]}
    (tmp_path / "search-x.json").write_text(json.dumps(search))
    end = {"model": "m", "dtype": "float32", "texts": 7000}
    ratio = {"seconds": {"ours": [100.0], "peer": [150.0]}, "ratio": {"median": 1.5}}
    (tmp_path / "mine-end-to-end-m.json").write_text(
        json.dumps(RECORD | ratio | {"size": end, "negatives_that_the_peer_found_too": 0.75})
    )
    head = "| queries | documents | width | stored as | days |"
    for kept, days in (("float16", 3), ("float32", 2)):  # each row has the rate of its own search
        rows = [f"| 10 | 20 | 7 | {name} | {days} |" for name in ("float32", "float16")]
        found = search | {"size": sizes | {"precision": kept}, "table": ["first", head, *rows, "derived"]}
        (tmp_path / f"search-y-{kept}.json").write_text(json.dumps(found))
    lines = scale.mining(tmp_path)
    at = lines.index(head)
    assert lines[at + 1 : at + 3] == ["| 10 | 20 | 7 | float32 | 2 |", "| 10 | 20 | 7 | float16 | 3 |"]
    for kept in ("float16", "float32"):
        (tmp_path / f"search-y-{kept}.json").unlink()
    lines = scale.mining(tmp_path)
    assert "| 1,000 x 10,000 x 50, float16 | 2.00 | 0.50 | 1.00 | 0.50 |" in lines and lines[-1] == "derived"
    assert "| m, float32, 7,000 texts | 100 | 150 | 1.50 | 75% |" in lines
    assert lines.count("- `python b.py`, 2026-01-02, 2 cores of Z80.") == 2


def test_a_step_by_hand() -> None:
    """Forward, forward again and the gradient: 6 operations; GradCache, in 20,000 of 38,000 steps, 2 more."""
    recipe, sizes, _ = scale.planned()
    own = 1152 * 512 / 8  # tokens of a GPU, of which a micro-batch has 16,384
    forwards = 6 + 2 * (own - 16_384) / own * 20 / 38
    expected = forwards * own * (sizes.decoder + sizes.head) / 400e12
    assert abs(scale.seconds_a_step(recipe, sizes, 512) / expected - 1) < 1e-9
    assert scale.seconds_a_step(recipe, sizes, 1) == 6 * 1152 / 8 * (sizes.decoder + sizes.head) / 400e12
