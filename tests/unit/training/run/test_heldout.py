"""A run with a masked phase before a contrastive stage: its records, its resumption, what it leaves alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedwright.config import ConfigError
from embedwright.model.embedder import Embedder
from embedwright.studies.report.run import read_run
from embedwright.training.batches.sources import heldout_texts, open_sources
from embedwright.training.dry_run import dry_run
from embedwright.training.lengths import tokens_of
from embedwright.training.plan import report
from embedwright.training.recipe import Recipe
from embedwright.training.run.heldout import measured_once
from embedwright.training.run.start import start_model
from embedwright.training.train import train

TEXTS = ["the moon pulls the sea", "a dog that does not mind"]
PAIRS = [("moon", "sea"), ("dog", "fox"), ("sun", "level"), ("tide", "rise"), ("quick", "brown"), ("lazy", "fall")]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    """A masked phase of 30 steps and a contrastive stage of 4. In the text, one word tells the next."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    texts = [" ".join(" ".join(PAIRS[i]) for i in random.integers(6, size=random.integers(3, 9))) for _ in range(80)]
    rows = [{"id": f"d{i}", "title": f"n{i}", "text": text} for i, text in enumerate(texts)]
    rows.append({"id": "bad"})
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pages").mkdir()
    for i in range(4):
        (folder / "pages" / f"{i}.txt").write_text(f"page {i} {texts[i]}")
    pairs = [{"query": text[:20], "positives": [text]} for text in texts[:20]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return {
        "name": "tiny",
        "seed": 7,
        "model": {"base": str(tiny_decoder("llama")), "latents": 8, "heads": 4, "multiple": 1, "max_tokens": 24},
        "tune": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "stages": [
            {
                "name": "masked",
                "kind": "mntp",
                "text": [{"path": str(folder / "docs.jsonl"), "licence": "MIT"}, {"path": str(folder / "pages")}],
                "mask_token": "_",
                "heldout": 12,
                "save": True,
                "optim": {"lr": 2e-2, "steps": 30, "batch_queries": 8, "warmup_steps": 3},
            },
            {
                "name": "retrieval",
                "data": [{"path": str(folder / "pairs.jsonl")}],
                "in_batch_negatives": "all",
                "hard_negatives": 0,
                "temperature": 0.1,
                "optim": {"lr": 1e-2, "steps": 4, "batch_queries": 8},
            },
        ],
        "run": {"checkpoint_every": 10, "tracker": "none"},
    }


def recipe_of(content: dict[str, Any], out: Path, **run: Any) -> Recipe:
    tree = copy.deepcopy(content)
    tree["run"] |= {"out": str(out), **run}
    return Recipe.parse(tree)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def steps(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "waited", "peak_mb")} for r in lines(out / "metrics.jsonl")
    ]


class Run:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out, self.said = recipe, Path(recipe.run.out), list[str]()
        self.model = train(recipe, on_evaluation=self.said.append)
        self.vectors = self.model.encode(TEXTS)


@pytest.fixture(scope="module")
def run(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole recipe in one go; leave it as it is."""
    return Run(recipe_of(content, tmp_path_factory.mktemp("run") / "out"))


def test_the_loss_on_held_out_documents_falls(run: Run) -> None:
    before, after = lines(run.out / "heldout.jsonl")
    assert (before["stage"], before["step"], after["step"]) == ("masked", 0, 30)
    assert before["documents"] == after["documents"] == 12 and before["masked"] == after["masked"] > 40
    assert after["loss"] < 0.75 * before["loss"] and after["accuracy"] > before["accuracy"] + 0.05
    assert all(f"masked loss {one['loss']:.3f}" in said for one, said in zip((before, after), run.said, strict=True))
    assert all("12 held-out documents" in said for said in run.said)


def test_held_out_documents_are_never_trained_on(run: Run, content: dict[str, Any], tmp_path: Path) -> None:
    sources = open_sources(run.recipe)[0]
    held = heldout_texts(sources)
    trained = {source.table[int(row)].positives[0].text for source in sources for row in source.rows}
    assert len(held) == 12 and not trained & set(held) and len(trained) == 84 - 12
    assert all(text.startswith(("n", "page")) for text in held), "title and text"
    tree = copy.deepcopy(content)
    tree["stages"][0]["text"] = tree["stages"][0]["text"][:1]
    rows = Path(tree["stages"][0]["text"][0]["path"]).read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join(rows[:80] + [r.replace('"id": "d', '"id": "e') for r in rows[:80]]))
    tree["stages"][0]["text"][0]["path"] = str(tmp_path / "twice.jsonl")
    [twice] = open_sources(recipe_of(tree, tmp_path))[0]
    left = {twice.table[int(row)].positives[0].text for row in twice.rows}
    assert not left & set(heldout_texts([twice])), "another document of the same text is held out with it"
    tree["stages"][0]["heldout"] = 160
    with pytest.raises(ConfigError, match=r"stages\.masked\.heldout: 160 of 160 documents leave none"):
        open_sources(recipe_of(tree, tmp_path))


def test_a_step_of_the_masked_phase_has_the_record_of_any_step(run: Run) -> None:
    found = steps(run.out)
    assert [(one["stage"], one["step"]) for one in found] == [
        *(("masked", i) for i in range(1, 31)),
        *(("retrieval", i) for i in range(1, 5)),
    ]
    keys = {"stage", "step", "loss", "chance", "lr", "grad_norm", "tokens", "ids"}
    assert all(one.keys() == keys for one in found[:30]) and "head_change" in found[30]
    assert len({one["ids"] for one in found}) == 34
    assert all(one["chance"] == pytest.approx(np.log(400)) and one["tokens"] > 50 for one in found[:30])


def test_the_phase_moves_the_backbone_and_leaves_the_pooling_block(run: Run) -> None:
    saved, fresh = Embedder.load(run.out / "stages" / "masked").network, start_model(run.recipe).network
    assert all(torch.equal(a, b) for a, b in zip(saved.head.parameters(), fresh.head.parameters(), strict=True))
    moved = [
        float((a - b).detach().abs().max())
        for (name, a), b in zip(saved.backbone.named_parameters(), _decoder(run.recipe), strict=True)
        if "_proj" in name
    ]
    assert min(moved) > 1e-3
    ended = run.model.network.head.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(ended, fresh.head.parameters(), strict=True))


def _decoder(recipe: Recipe) -> list[torch.Tensor]:
    return list(Embedder.from_decoder(str(recipe.model.base), pooling="mean").network.backbone.parameters())


class Stop(Exception):  # noqa: N818
    pass


def test_a_run_in_pieces_equals_the_run_in_one(run: Run, content: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(content, tmp_path)
    for place in (("masked", 4), ("masked", 17), ("masked", 30), ("retrieval", 2)):

        def stop(record: dict[str, Any], place: tuple[str, int] = place) -> None:
            if (record["stage"], record["step"]) == place:
                raise Stop

        with pytest.raises(Stop):
            train(recipe, on_step=stop)
    assert np.array_equal(train(recipe).encode(TEXTS), run.vectors)
    assert steps(tmp_path) == steps(run.out)
    assert lines(tmp_path / "heldout.jsonl") == lines(run.out / "heldout.jsonl")
    changed = copy.deepcopy(content)
    changed["stages"][0]["mask_share"] = 0.3
    with pytest.raises(ConfigError, match=r"another recipe \(stages\.0\.mask_share: 0\.2 -> 0\.3\)"):
        train(recipe_of(changed, tmp_path))


@pytest.mark.parametrize(("tune", "precision"), [("lora", "bf16"), ("full", "bf16")], ids=lambda value: value)
def test_other_tunings_and_precisions(content: dict[str, Any], tmp_path: Path, tune: str, precision: str) -> None:
    """Micro-batches, gradient checkpointing and a decoder that ties its head are in it, too."""
    tree = copy.deepcopy(content)
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0] |= {"optim": {"lr": 5e-3, "steps": 8, "batch_queries": 8}, "save": False}
    tree["tune"] |= {"method": tune, "gradient_checkpointing": True}
    train(recipe_of(tree, tmp_path, precision=precision, batch_tokens=60))
    before, after = lines(tmp_path / "heldout.jsonl")
    assert after["loss"] < before["loss"] - 0.2


def test_plan_dry_run_report_and_card_know_the_phase(run: Run, content: dict[str, Any]) -> None:
    [masked, _] = tokens_of(run.recipe, [[True, True], [True]])
    found = steps(run.out)[:30]
    assert masked.step == np.mean([one["tokens"] for one in found]) and list(masked.kinds) == ["texts"]
    assert masked.largest == max(one["tokens"] for one in found)
    said = report(run.recipe)
    assert "stage masked: 84 rows of 2 files, 30 steps, 240 documents (2.86 passes)" in said
    absent = copy.deepcopy(content)
    absent["stages"][0]["text"] = [{"path": "to-come.jsonl"}]
    unseen = report(recipe_of(absent, run.out))
    assert "to-come.jsonl          ?" in unseen and "at most 192 tokens a step, 5,760 in all" in unseen
    absent["stages"][0]["text"] = [*content["stages"][0]["text"], {"path": "to-come.jsonl"}]
    absent["stages"][0]["heldout"] = 1000  # of all that there will be
    assert "all are like the 2 files that are there" in report(recipe_of(absent, run.out))
    assert "masked" in dry_run(run.recipe)[2]
    page = read_run(run.out)
    assert [stage["temperature"] for stage in page["stages"]] == ["-", "0.1"]
    assert page["stages"][0]["more"] == "kind mntp, mask_token _, mask_share 0.2"
    [told] = [value for name, value in page["facts"] if name == "Masked loss, held-out"]
    assert told.endswith("(masked, step 30)")
    assert [(row["licence"], row["rows"]) for row in page["data"][:2]] == [("MIT", "68"), ("not stated", "4")]
    assert "mask_share 0.2" in (run.out / "README.md").read_text()


def test_a_phase_that_its_run_cannot_do_is_refused_by_its_key(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.parallel: fsdp .* use ddp"):
        recipe_of(content, tmp_path, parallel="fsdp")
    tree = copy.deepcopy(content)
    tree["stages"][0]["mask_tokn"] = tree["stages"][0].pop("mask_token")
    with pytest.raises(ConfigError, match=r"stages\.0\.mask_tokn: unknown key; did you mean 'mask_token'"):
        recipe_of(tree, tmp_path)
    tree = copy.deepcopy(content)
    tree["stages"].insert(0, {"kind": "mine"})
    with pytest.raises(ConfigError, match=r"stages\.0: mines negatives, but the stage after it uses none"):
        recipe_of(tree, tmp_path)
    tree = copy.deepcopy(content)
    tree["strict"] = True
    with pytest.raises(ConfigError, match=r"stages\.masked\.text\.1: the text has no licence"):
        open_sources(recipe_of(tree, tmp_path))
    tree = copy.deepcopy(content)
    tree["stages"][0]["text"][0]["path"] = "none.jsonl"
    with pytest.raises(FileNotFoundError, match=r"stages\.masked\.text\.0: none\.jsonl does not exist"):
        open_sources(recipe_of(tree, tmp_path))


def test_a_point_is_measured_once(tmp_path: Path) -> None:
    from embedwright.processes import ALONE

    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"loss": len(calls)}

    assert measured_once(tmp_path, "a", 0, measure, ALONE) == {"stage": "a", "step": 0, "loss": 1}
    assert measured_once(tmp_path, "a", 0, measure, ALONE) is None
    assert measured_once(tmp_path, "a", 5, measure, ALONE) == {"stage": "a", "step": 5, "loss": 2}
    assert [one["loss"] for one in lines(tmp_path / "heldout.jsonl")] == [1, 2]
