"""docs/scale.md's tables are what the program says and what the records have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import scale
from transformers import MistralConfig

from embedwright.mining.mine import AT_ONCE
from embedwright.packing import batches
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
    for precision, seconds in (("float16", 4.0), ("float32", 2.0)):
        sizes = {"queries": 1000, "documents": 10_000, "width": 50, "precision": precision}
        search = RECORD | {"size": sizes, "seconds": seconds, "read": 10**9, "peak_mb": 500.0}
        (tmp_path / f"search-{precision}.json").write_text(json.dumps(search))
    lines = scale.mining(tmp_path)
    assert "Memory by the number of rows: no record yet." in lines and any("**Not run:" in line for line in lines)
    end = {"model": "flag-merged", "dtype": "float32", "texts": 7000}
    ratio = {"seconds": {"ours": [100.0], "peer": [150.0]}, "ratio": {"median": 1.5}}
    record = RECORD | ratio | {"size": end, "negatives_that_the_peer_found_too": 0.75}
    record["command"] = "python b.py --model /a/b/flag-merged --dtype float32"
    (tmp_path / "mine-end-to-end-m.json").write_text(json.dumps(record))
    memory = {"size": {"documents": 50, "width": 8, "at_once": 16}, "rows": []}
    memory["rows"] = [{"examples": 3000, "seconds": 4.2, "added_mb": 50.4, "peak_mb": 900.0}]
    (tmp_path / "mine-memory.json").write_text(json.dumps(RECORD | memory))
    lines = scale.mining(tmp_path)
    assert "| 1,000 x 10,000 x 50, float16 | 4.00 | 0.25 | 1.00 | 0.50 |" in lines
    assert "| 1,000 x 10,000 x 50, float32 | 2.00 | 0.50 | 1.00 | 0.50 |" in lines
    assert "| the flagship of 135 M, merged, float32, 7,000 texts | 100 | 150 | 1.50 | 75% |" in lines
    assert "| 3,000 | 50 | 900 |" in lines and not [line for line in lines if "/a/b" in line or "Not run" in line]
    assert "- `python b.py --model flag-merged --dtype float32`, 2026-01-02, 2 cores of Z80." in lines
    assert lines.count("- `python b.py`, 2026-01-02, 2 cores of Z80.") == 3
    days = {row[3]: float(row[6].replace(",", "")) for row in cells(lines) if row[:3] == ["10,000,000"] * 2 + ["50"]}
    assert days == {"float16": pytest.approx(2e14 * 50 / 0.25e9 / 86400, 0.01), "float32": pytest.approx(231, 0.01)}


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]


@pytest.mark.parametrize("length", scale.LENGTHS)
def test_a_step_counts_every_forward_of_training(length: int) -> None:
    """Micro-batches and forwards as the engine makes them of a GPU's 16 queries with 8 texts each."""
    recipe, sizes, _ = scale.planned()
    per_gpu = [length] * (16 * 9)
    groups = [len(group) * length for group in batches(per_gpu, recipe.run.batch_tokens)]
    forwards = sum(per_gpu) + sum(groups[1:])  # GradCache embeds all of them, and again all but the first
    shared, alone = scale.stages_of(recipe)
    count, work = scale.micro_batches(recipe, shared, length)
    assert count == len(groups) and work * sum(per_gpu) == pytest.approx(2 * forwards + 4 * sum(per_gpu))
    rows_at_once = recipe.run.batch_tokens // (9 * length)
    assert scale.micro_batches(recipe, alone, length) == (len(range(0, 16, rows_at_once)), 6)
    parameters = sizes.decoder + sizes.head
    gradients = 8 * sizes.trained / 300e9
    hours = sum(
        steps * (operations * parameters * sum(per_gpu) / 400e12 + gradients)
        for steps, operations in ((20_000, work), (18_000, 6))
    )
    [both] = [row for row in cells(scale.step(recipe, sizes)) if row[:2] == ["both", f"{length}"]]
    assert both[-1] == f"{hours / 3600:,.0f}"


def test_cost_is_that_of_the_commands_on_the_page() -> None:
    recipe, sizes, _ = scale.planned()
    text = (scale.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert {*re.findall(r"mine .*--shard \S+/(\d+)", text)} == {"77"} and 76 * AT_ONCE < 10**7 <= 77 * AT_ONCE
    assert {*re.findall(r"encode .*--shard \S+/(\d+)", text)} == {str(scale.ENCODE_PARTS)}
    rows = cells(scale.cost(recipe, sizes, scale.RESULTS))
    found = {(of, re.sub(r"\d[\d,]* ", "", what)): rest for of, what, *rest in rows}
    rate = json.loads((scale.RESULTS / "data-at-scale.json").read_text())["rows_per_second"]
    billion = "10 M rows, 1 billion passages"
    assert found[billion, "search"][0] == f"{77 * 4096 * 2 / 1000:.1f} TB read"
    assert (
        found[billion, "check passages in parts of `encode`, while a GPU waits"][2]
        == f"{64e9 / rate['read'] / 3600:.0f}"
    )
    waited = 77 * (1e7 / rate["mine_rows"] + 1e9 / rate["mine_documents"]) / 3600
    assert found[billion, "read rows and corpus in parts of `mine`, while a GPU waits"][2] == f"{waited:,.0f}"
    own = [int(rest[2].replace(",", "")) for of, _, *rest in rows if of == "the recipe" and rest[2] != "-"]
    assert abs(sum(own[:-1]) - own[-1]) <= 2 and len(own) == 5
    step = sum(float(row[-1]) for row in cells(scale.step(recipe, sizes)) if row[:2] == ["both", "150"])
    assert own[3] == pytest.approx(8 * step, abs=4)
