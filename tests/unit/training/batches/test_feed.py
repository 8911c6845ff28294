from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE
from embedwright.text import Contract
from embedwright.training.batches.batch import Batch
from embedwright.training.batches.blend import Source
from embedwright.training.batches.feed import batch_of_step, local_batch
from embedwright.training.batches.sources import open_sources
from embedwright.training.engine.parallel import replicate
from embedwright.training.engine.step import accumulate
from embedwright.training.recipe import Recipe
from embedwright.training.run.watch import chance

CONTRACT = Contract(eos_id=1)
PREFIX = "Instruct: Find it\nQuery: "


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(data: list[dict[str, Any]], queries: int = 8, **stage: Any) -> tuple[Recipe, list[Source]]:
    optim = {"lr": 1e-3, "steps": 50, "batch_queries": queries}
    base = {"name": "s", "data": data, "in_batch_negatives": "all", "hard_negatives": 2, "optim": optim}
    content = {"name": "r", "seed": 5, "model": {"base": "b"}, "run": {"out": "o"}, "stages": [base | stage]}
    recipe = Recipe.parse(content)
    return recipe, open_sources(recipe)[0]


# ---- rows without their instruction


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., list[Batch]]:
    """`pairs(share, symmetric=False)`: 50 batches of 8 rows, each row with three positives and five negatives."""
    rows = [
        {"query": f"q{i}", "positives": [f"p{i}{k}" for k in "abc"], "negatives": [f"n{i}{k}" for k in range(5)]}
        for i in range(37)
    ]
    file = write(tmp_path / "pairs.jsonl", rows)

    def batches(share: float, symmetric: bool = False, seed: int = 5) -> list[Batch]:
        task = {"name": "own", "instruction": "Find it", "symmetric": symmetric}
        recipe, sources = opened([{"path": file, "task": task}], without_instruction=share)
        recipe = recipe.model_copy(update={"seed": seed})
        return [batch_of_step(recipe, 0, sources, CONTRACT, step) for step in range(50)]

    return batches


def texts(batch: Batch) -> list[list[str]]:
    return [[text for _, text in side] for side in (batch.queries, batch.candidates)]


def test_a_share_of_rows_has_no_instruction_and_the_same_texts_are_drawn(pairs: Callable[..., list[Batch]]) -> None:
    plain, some, all_ = (pairs(share) for share in (0.0, 0.3, 1.0))
    assert {prefix for batch in plain for prefix, _ in batch.queries} == {PREFIX}
    assert {prefix for batch in all_ for prefix, _ in batch.queries} == {""}
    bare = [[prefix == "" for prefix, _ in batch.queries] for batch in some]
    assert np.mean(bare) == pytest.approx(0.3, abs=0.05) and len(set(map(tuple, bare))) > 30  # by row and step
    for before, after, none in zip(plain, some, all_, strict=True):
        assert texts(before) == texts(after) == texts(none) and before.ids == after.ids
        for name in ("positive_Q", "negative_QC", "own_QC"):
            np.testing.assert_array_equal(getattr(before.masks, name), getattr(after.masks, name))
    assert [batch.queries for batch in pairs(0.3)] == [batch.queries for batch in some]
    assert bare != [[prefix == "" for prefix, _ in batch.queries] for batch in pairs(0.3, seed=6)]


def test_a_row_of_a_symmetric_task_leaves_it_out_on_both_sides(pairs: Callable[..., list[Batch]]) -> None:
    for batch in pairs(0.5, symmetric=True):
        for i, (prefix, _) in enumerate(batch.queries):
            own = [int(batch.masks.positive_Q[i]), *np.flatnonzero(batch.masks.own_QC[i])]
            assert {batch.candidates[c][0] for c in own} == {prefix}


def test_a_text_with_and_without_its_prefix_is_one_answer(tmp_path: Path) -> None:
    """All rows have one positive: under both prefixes it is two candidates, and neither is a negative of any query."""
    rows = [{"query": f"q{i}", "positives": ["the answer"], "negatives": [f"n{i}"]} for i in range(8)]
    task = {"name": "own", "instruction": "Find it", "symmetric": True}
    file = write(tmp_path / "one.jsonl", rows)
    recipe, sources = opened([{"path": file, "task": task}], without_instruction=0.5)
    seen = set()
    for step in range(20):
        batch = batch_of_step(recipe, 0, sources, CONTRACT, step)
        answers = [c for c, (_, text) in enumerate(batch.candidates) if text == "the answer"]
        seen.add(len(answers))
        assert not batch.masks.negative_QC[:, answers].any()
        assert batch.masks.negative_QC.sum(axis=1).tolist() == [8] * 8  # its own negative, and those of the others
    assert 2 in seen


# ---- one source a batch, and in-batch negatives by source


@pytest.fixture
def shown_in_the_docs(tmp_path: Path) -> Callable[..., tuple[Recipe, list[Source]]]:
    """The second block of docs/losses.md over 40 pairs with three negatives and 60 texts of four classes."""
    page = (Path(__file__).parents[4] / "docs" / "losses.md").read_text(encoding="utf-8")
    stage = yaml.safe_load(page.split("```yaml\n")[2].split("```")[0])
    docs = [
        {"query": f"q{i}", "positives": [f"p{i}"], "negatives": [f"n{i}{k}" for k in range(3)], "id": f"d{i}"}
        for i in range(40)
    ]
    topics = [{"text": f"text {i}", "label": f"kind{i % 4}", "id": f"t{i}"} for i in range(60)]
    files = [write(tmp_path / "docs.jsonl", docs), write(tmp_path / "topics.jsonl", topics)]
    data = [entry | {"path": file} for entry, file in zip(stage.pop("data"), files, strict=True)]

    def make(**change: Any) -> tuple[Recipe, list[Source]]:
        return opened(data, **stage | change)

    return make


def test_a_retrieval_batch_has_in_batch_negatives_and_a_label_batch_none(
    shown_in_the_docs: Callable[..., tuple[Recipe, list[Source]]],
) -> None:
    recipe, sources = shown_in_the_docs()
    assert [len(source.rows) for source in sources] == [40, 60]
    seen = {"d": 0, "t": 0}
    for step in range(50):
        batch = batch_of_step(recipe, 0, sources, CONTRACT, step)
        [kind] = {id_[0] for id_ in batch.ids}
        seen[kind] += 1
        own, all_ = batch.masks.own_QC.sum(axis=1), batch.masks.negative_QC.sum(axis=1)
        assert (own == 2).all()
        if kind == "d":  # and the positives and negatives of the seven other rows
            assert (all_ == 2 + 7 * 3).all() and not batch.separable()
            assert chance(batch) == pytest.approx(math.log(24))
        else:
            np.testing.assert_array_equal(batch.masks.negative_QC, batch.masks.own_QC)
            classes = {f"text {i}": i % 4 for i in range(60)}
            for (_, query), row_C in zip(batch.queries, batch.masks.negative_QC, strict=True):
                assert all(classes[batch.candidates[c][1]] != classes[query] for c in np.flatnonzero(row_C))
            assert chance(batch) == pytest.approx(math.log(3))
    assert seen == {"d": 20, "t": 30}
    mixed, blended = shown_in_the_docs(batching="blended")
    batch = batch_of_step(mixed, 0, blended, CONTRACT, 0)
    assert {id_[0] for id_ in batch.ids} == {"d", "t"}
    assert len(set(batch.masks.negative_QC.sum(axis=1).tolist())) == 2  # both kinds, each under its own rule


def test_the_loss_of_either_batch_is_over_the_negatives_that_it_has(
    shown_in_the_docs: Callable[..., tuple[Recipe, list[Source]]], tiny_decoder: Callable[..., Path]
) -> None:
    recipe, sources = shown_in_the_docs(temperature=0.1)
    model = Embedder.from_decoder(tiny_decoder("llama"), pooling="mean")
    for step in (0, 1, 2):
        batch = batch_of_step(recipe, 0, sources, model.contract, step)
        local = local_batch(batch, model.text_tokenizer, model.contract, ALONE)
        model.network.train()
        loss, _ = accumulate(replicate(ALONE, model.network), local, recipe.stages[0], batch_tokens=4096, seed=0)
        model.network.eval()
        q_QE, c_CE = (model.encode([text for _, text in side]) for side in (batch.queries, batch.candidates))
        by_hand = []
        for i, row_id in enumerate(batch.ids):
            if row_id[0] == "d":  # all other texts of the batch
                rivals = [c for c in range(len(c_CE)) if c != batch.masks.positive_Q[i]]
            else:
                rivals = list(np.flatnonzero(batch.masks.own_QC[i]))
            scores = q_QE[i] @ c_CE[[batch.masks.positive_Q[i], *rivals]].T / 0.1
            by_hand.append(float(np.log(np.exp(scores - scores[0]).sum())))
        assert loss == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_many_small_sources_take_turns_by_their_shares(tmp_path: Path) -> None:
    """Sizes from 1 to 40 under alpha 0.5; a source that is smaller than the batch comes round within one."""
    sizes = [1, 2, 3, 5, 8, 13, 21, 40]
    data = [
        {"path": write(tmp_path / f"s{n}.jsonl", [{"query": f"q{n}.{i}", "positive": f"p{n}.{i}"} for i in range(n)])}
        for n in sizes
    ]
    recipe, sources = opened(data, batching="homogeneous", sampling_alpha=0.5, hard_negatives=0)
    counts = dict.fromkeys(sizes, 0)
    for step in range(400):
        batch = batch_of_step(recipe, 0, sources, CONTRACT, step)
        [size] = {int(id_.partition(":")[0][1:]) for id_ in batch.ids}
        counts[size] += 1
        assert len(batch.ids) == 8
        per_row = [batch.ids.count(id_) for id_ in set(batch.ids)]
        assert max(per_row) <= -(-8 // size) + 1  # the end of one epoch and the beginning of the next
        assert len(set(batch.candidates)) == len(batch.candidates) == len(per_row)
        for i, (_, query) in enumerate(batch.queries):  # equal rows are one question: its answer is no negative
            against = {batch.candidates[c][1] for c in np.flatnonzero(batch.masks.negative_QC[i])}
            assert against == {text for _, text in batch.candidates} - {query.replace("q", "p")}
    shares = np.sqrt(sizes) / np.sqrt(sizes).sum()
    assert np.abs(np.array(list(counts.values())) - 400 * shares).max() < 2
