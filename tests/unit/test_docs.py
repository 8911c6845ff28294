"""The docs: pages that the program makes are up to date, figures that can be computed are right, links lead on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import make_docs
import pytest
import torch
from torch import nn
from transformers import AutoModel, MistralConfig

from embedwright.model.pooling import FoldedLatent, LatentPooling, PoolingConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *DOCS.glob("*.md"),
    *ROOT.glob("skills/*/*.md"),
]


def test_the_made_pages_are_what_the_program_makes() -> None:
    stale = [path.name for path, text in make_docs.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python scripts/make_docs.py"


def test_a_result_without_its_command_machine_or_date_is_refused(tmp_path: Path) -> None:
    """A number is on the page of results only with what it takes to repeat it."""
    page, written = make_docs.results, sorted((DOCS / "results").glob("*/dev.json"))
    assert written
    saved = json.loads(written[0].read_text(encoding="utf-8"))
    file = tmp_path / "model" / "suite.json"
    file.parent.mkdir()
    for key in ("command", "machine", "date"):
        about = {name: value for name, value in saved["about"].items() if name != key}
        file.write_text(json.dumps(saved | {"about": about}))
        with pytest.raises(SystemExit, match=rf"{file}: about has no {key}"):
            page(tmp_path)
    file.write_text(json.dumps(saved))
    assert f"| {saved['rows'][0]['value']:.4f} |" in page(tmp_path) and saved["about"]["command"] in page(tmp_path)
    (tmp_path / "again.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit, match="a second result"):
        page(tmp_path)


def test_a_study_is_shown_with_seeds_and_command_and_a_smoke_test_is_not(tmp_path: Path) -> None:
    saved = json.loads((DOCS / "results" / "bm25" / "dev.json").read_text(encoding="utf-8"))
    cells = [
        {"arm": arm, "seed": 3, "mean": mean, "seconds": {"training": 60}} for arm, mean in (("a", 0.5), ("b", 0.4))
    ]
    for cell in cells:
        cell["folder"] = f"{cell['arm']}/seed-3"
        (tmp_path / cell["folder"]).mkdir(parents=True)
    said = {"study": "pooling", "smoke": False, "baseline": "a", "scored_on": "dev", "paper": None, "missing": []}
    said |= {"failed": {}, "cells": cells, "trials": [], "comparison": None}
    (tmp_path / "study.json").write_text(json.dumps(said))
    for cell in cells:
        (tmp_path / cell["folder"] / "scores.json").write_text(json.dumps(saved))
    text = make_docs.results(tmp_path)
    assert (
        "## Study `pooling`" in text
        and "2 cells of seeds 3, 0 trials of rates, the cells' seconds add up to 120: " in text
        and saved["about"]["command"] in text
    )
    assert re.search(r"a +1 +50\.00", text) and "## Suite" not in text
    trials = [cell | {"rate": 3} for cell in cells] + [{"arm": "b", "rate": 1, "seconds": {}, "failed": "it diverged"}]
    (tmp_path / "study.json").write_text(json.dumps(said | {"cells": [], "trials": trials}))
    text = make_docs.results(tmp_path)
    assert "0 cells of seeds none yet, 3 trials of rates, the" in text and "rates of b: x1 failed, x3 40.00" in text
    (tmp_path / "study.json").write_text(json.dumps(said))
    (tmp_path / "b" / "seed-3" / "scores.json").write_text(json.dumps(saved | {"about": {}}))
    with pytest.raises(SystemExit, match=r"b/seed-3/scores.json: about has no model, command"):
        make_docs.results(tmp_path)
    (tmp_path / "study.json").write_text(json.dumps(said | {"smoke": True}))
    with pytest.raises(SystemExit, match=r"study.json: a smoke test"):
        make_docs.results(tmp_path)


def test_a_study_shows_all_its_commands_and_days(tmp_path: Path) -> None:
    """Cells of one command that differ in --only alone are of one command, and the machine is that of a cell."""
    about = json.loads((DOCS / "results" / "bm25" / "dev.json").read_text(encoding="utf-8"))["about"]
    ran = [
        ("embedwright ablate a.yaml --only a/1 --only=a/2 --jobs 2", "2026-11-30T08:00:00"),
        ("embedwright ablate a.yaml --only a/3 --jobs 2", "2026-12-01T08:00:00"),
        ("embedwright ablate b.yaml", "2026-11-29T08:00:00"),
    ]
    cells = []
    for seed, (command, date) in enumerate(ran, 1):
        folder = tmp_path / "a" / f"seed-{seed}"
        folder.mkdir(parents=True)
        own = about | {"command": command, "date": date, "machine": about["machine"] | {"cores": 1}}
        (folder / "scores.json").write_text(json.dumps({"suite": "dev", "seconds": 1.0, "rows": [], "about": own}))
        cells.append({"arm": "a", "seed": seed, "mean": 0.5, "seconds": {"x": 1}, "folder": f"a/seed-{seed}"})
    said = {"study": "a", "smoke": False, "baseline": "a", "scored_on": "dev", "paper": None, "missing": []}
    said |= {"failed": {}, "cells": cells, "trials": [], "comparison": None}
    (tmp_path / "study.json").write_text(json.dumps(said))
    text = make_docs.results(tmp_path)
    assert (
        "add up to 3: `embedwright ablate a.yaml --jobs 2`, `embedwright ablate b.yaml`, 2026-11-29 to 2026-12-01, "
        "each cell on 1 core of "
    ) in text


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (heading and heading not in headings(file)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_docs_stay_short() -> None:
    """Words that somebody wrote, not what the program or the benchmarks make: 11,000 are the aim."""
    made = {"recipe.md", "cli.md", "performance.md", "results.md"}
    texts = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("*.md") if page.name not in made}
    between = r"(?s)<!-- (?:embedwright data list --markdown|runs|\w+, made by scripts/\w+.py) -->.*?<!-- end"
    words = {name: len(re.sub(between, "", text).split()) for name, text in texts.items()}
    assert sum(words.values()) <= 21_409, words
    assert words["concepts.md"] <= 1_200
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1125


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_memory_table_of_nv_embed() -> None:
    with torch.device("meta"):
        decoder = AutoModel.from_config(MistralConfig())  # transformers' defaults are Mistral-7B-v0.1's sizes
        head = LatentPooling(PoolingConfig(latents=512, heads=8, head_dim=4096, multiple=4), 4096)
    backbone, latent = count(decoder), count(head)
    tiny = LatentPooling(PoolingConfig(latents=3, heads=2, head_dim=8, multiple=4), 8)
    tiny.reset()  # a block is folded by its values, and new parameters are whatever lay in memory
    assert count(FoldedLatent(tiny)) == 2 * 8 * 2 * 3 + count(tiny.attention.norm) + count(tiny.feed_forward)
    small = 2 * 4096 * 8 * 512 + count(head.attention.norm) + count(head.feed_forward)
    assert (backbone, latent) == (7_110_660_096, 740_356_096)  # as released: nv-embed-checkpoints, "Weights"
    table = (DOCS / "nv-embed.md").read_text()
    assert re.search(rf"pooling block alone, parameters \| {latent:,} \| {small:,} \|", table)
    for name, width in (("float32", 4), ("float16, bfloat16", 2)):
        loaded, lean = ((backbone + block) * width / 1e9 for block in (latent, small))
        assert f"| {name} | {loaded:.2f} GB | {lean:.2f} GB |" in table
