"""What is masked, against counts and a plain tokenizer; a pure function of seed, stage, step and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright.config import ConfigError
from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE, Processes
from embedwright.training.batches.sources import open_sources
from embedwright.training.masked.batch import Masker, batch_of_step, heldout_batch
from embedwright.training.recipe import Recipe

WORDS = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox", "lazy", "quick", "brown"]
MASK = "_"


def recipe(path: Path, **change: Any) -> Recipe:
    stage = {
        "name": "masked",
        "kind": "mntp",
        "text": [{"path": str(path)}],
        "mask_token": MASK,
        "heldout": 5,
        "optim": {"lr": 1e-3, "steps": 4, "batch_queries": 6},
    }
    content = {"name": "r", "seed": 3, "model": {"base": "b"}, "run": {"out": "o"}, "stages": [stage | change]}
    return Recipe.parse(content)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of 3 to 300 words."""
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "docs.jsonl"
    rows = [{"id": f"d{i}", "title": f"t{i}", "text": " ".join(random.choice(WORDS, 3 + i**2 // 5))} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(params=[False, True], ids=["plain", "bos"], scope="module")
def model(request: pytest.FixtureRequest, tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent", bos=request.param, max_tokens=64)


def masker(made: Recipe, model: Embedder) -> Masker:
    return Masker(made.stages[0], model.text_tokenizer, model.contract)  # type: ignore[arg-type]


def test_masked_texts_are_windows_of_the_documents_with_their_own_tokens_as_targets(
    documents: Path, model: Embedder
) -> None:
    made = recipe(documents)
    rows = {row["id"]: row for row in map(json.loads, documents.read_text().splitlines())}
    bos, [mask] = list(model.contract.bos_ids), model.text_tokenizer.plain.encode(MASK, add_special_tokens=False).ids
    begins = set()
    for step in range(4):
        batch = batch_of_step(made, 0, open_sources(made)[0], masker(made, model), step)
        assert len(batch.texts) == len(batch.ids) == 6
        for id, text in zip(batch.ids, batch.texts, strict=True):
            ids = text.tokens.ids.copy()
            assert len(ids) <= 64 and len(text.positions) > 0
            changed = ids[text.positions] != text.targets
            ids[text.positions] = text.targets
            body = ids[len(bos) : -1].tolist()
            assert ids[: len(bos)].tolist() == bos and ids[-1] == 1  # BOS as the contract has it, EOS at the end
            assert min(text.positions) >= max(len(bos), 1) and max(text.positions) < len(ids) - 1
            whole = f"{rows[id]['title']} {rows[id]['text']}"
            told = model.text_tokenizer.plain.encode(whole, add_special_tokens=False).ids
            found = [i for i in range(len(told)) if told[i : i + len(body)] == body]
            assert found and (len(ids) == 64 or body == told)  # only what is too long is cut
            begins.add(found[0])
            assert changed.any() or len(changed) < 12
            assert set(text.tokens.ids[text.positions][changed]) - {mask} == set() or len(changed) > 2
    assert len(begins) > 3, "windows begin anywhere"


def test_the_shares_are_those_of_bert(documents: Path, model: Embedder) -> None:
    """Of the tokens one in five; of these 80 % are the mask, 10 % others, 10 % as they were."""
    made = recipe(documents)
    text = " ".join(np.random.default_rng(1).choice(WORDS, 400))
    ours = masker(made, model)([text] * 600, [[9, i] for i in range(600)])
    mask = model.text_tokenizer.plain.token_to_id(MASK)
    stood = np.concatenate([one.tokens.ids[one.positions] for one in ours])
    own = np.concatenate([one.targets for one in ours])
    body = 64 - 1 - max(len(model.contract.bos_ids), 1) if not model.contract.bos_ids else 64 - 2
    assert len(own) / (600 * body) == pytest.approx(0.2, abs=0.01)
    assert np.mean(stood == mask) == pytest.approx(0.8, abs=0.02)
    assert np.mean(stood == own) == pytest.approx(0.1, abs=0.01)
    rest = stood[(stood != own) & (stood != mask)]
    assert len(np.unique(rest)) > 300, "any token of the vocabulary"
    more = masker(recipe(documents, mask_share=0.5), model)([text] * 50, [[9, i] for i in range(50)])
    assert sum(len(one.positions) for one in more) / (50 * body) == pytest.approx(0.5, abs=0.05)


def test_masks_follow_from_seed_stage_step_and_row_alone(documents: Path, model: Embedder) -> None:
    made = recipe(documents)
    sources = open_sources(made)[0]

    def texts(recipe: Recipe, number: int = 0, step: int = 2, processes: Processes = ALONE) -> list[str]:
        found = batch_of_step(recipe, number, sources, masker(made, model), step, processes)
        return sorted(f"{one.tokens.ids.tolist()} {one.positions.tolist()}" for one in found.texts)

    plain = texts(made)
    assert texts(made) == plain
    assert texts(made, step=3) != plain
    assert texts(made.model_copy(update={"stages": made.stages * 2}), number=1) != plain
    assert texts(made.model_copy(update={"seed": 4})) != plain
    halves = [texts(made, processes=Processes(rank, 2)) for rank in (0, 1)]
    assert all(halves) and sorted(halves[0] + halves[1]) == plain
    held = [heldout_batch(made, 0, ["a tide of the sea"] * 3, masker(made, model)) for _ in range(2)]
    assert str(held[0]) == str(held[1]) and len({str(one) for one in held[0]}) > 1


def test_short_and_empty_texts(documents: Path, model: Embedder) -> None:
    """Each text teaches, if it has a token with one before it."""
    made = masker(recipe(documents), model)
    one, none, long = made(["e", "", "tide" * 4000], [[1], [2], [3]])
    assert len(one.positions) == len(model.contract.bos_ids) and len(none.positions) == 0
    assert len(long.tokens.ids) == 64
    assert min(len(text.positions) for text in made(["a tide"] * 200, [[i] for i in range(200)])) == 1


def test_a_mask_token_that_is_none_is_refused_with_one_that_is_near(documents: Path, model: Embedder) -> None:
    with pytest.raises(ConfigError, match=r"masked\.mask_token: '\[MASK\]' is \d tokens.*must be one.*`_`"):
        masker(recipe(documents, mask_token="[MASK]"), model)
    with pytest.raises(ConfigError, match="did you mean '</s>'"):
        masker(recipe(documents, mask_token="<//s>"), model)
    ours = masker(recipe(documents, mask_token=" tides"), model)  # a text that the tokenizer reads as one token
    assert model.text_tokenizer.plain.id_to_token(ours.token) == "Ġtides"
