from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from embedwright.config import ConfigError
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.training.batches.feed import batch_of_step
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.run import distill
from embedwright.training.run.distill import Teacher, projection_to, teacher_of
from embedwright.training.run.signals import Interrupted
from embedwright.training.run.start import start_model
from embedwright.training.stages import DistillPart, LossPart
from embedwright.training.train import train

ASKED = "Find its answer"


@pytest.fixture
def teacher(tiny_embedder: Callable[..., Embedder]) -> Embedder:
    return tiny_embedder("latent", seed=5)


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> Recipe:
    pairs = [{"query": f"q{i} tide", "positives": [f"p{i} the moon and {i}"], "negatives": ["a"]} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stage = {
        "name": "s",
        "data": [{"path": str(tmp_path / "pairs.jsonl"), "task": {"name": "t", "instruction": ASKED}}],
        "in_batch_negatives": "none",
        "hard_negatives": 1,
        "temperature": 1.0,
        "loss": {"distill": {"vector_weight": 100.0, "teacher": "teacher"}},
        "optim": {"lr": 1e-2, "steps": 20, "batch_queries": 8},
    }
    content: dict[str, Any] = {
        "name": "distilled",
        "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "stages": [stage],
        "run": {"out": str(tmp_path / "run"), "tracker": "none"},
    }
    return Recipe.parse(content)


class Part:
    """A teacher of another width: some of the numbers of an embedder, each text at a time."""

    def __init__(self, embedder: Embedder, width: int = 16, fails_at: int | None = None) -> None:
        self.embedder, self.width, self.fails_at, self.texts = embedder, width, fails_at, list[str]()

    def encode(self, texts: list[str], task: str | None = None) -> Any:
        self.texts += texts
        if self.fails_at is not None and len(self.texts) > self.fails_at:
            raise KeyboardInterrupt
        return np.concatenate([self.embedder.encode([text], task=task) for text in texts])[:, : self.width]

    def fingerprint(self) -> dict[str, str]:
        return self.embedder.fingerprint() | {"width": str(self.width)}


def followed(recipe: Recipe, out: Path, steps: int = 20, run: dict[str, Any] | None = None, **weights: Any) -> Recipe:
    """The recipe with another way to follow its teacher."""
    [stage] = recipe.stages
    loss = LossPart(distill=DistillPart(teacher=("teacher",), **weights))
    optim = stage.optim.model_copy(update={"steps": steps})
    change = {"stages": (stage.model_copy(update={"loss": loss, "optim": optim}),)}
    change |= {"run": recipe.run.model_copy(update={"out": str(out)} | (run or {}))}
    return recipe.model_copy(update=change)


def records_of(recipe: Recipe, stop: int | None = None) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []

    def on_step(record: dict[str, Any]) -> None:
        records.append({key: record[key] for key in ("step", "loss", "grad_norm", "ids")})
        if record["step"] == stop:
            raise Interrupted

    with pytest.raises(Interrupted) if stop else nullcontext():
        train(recipe, on_step=on_step)
    return records


# ---- the teacher


def test_a_text_is_encoded_under_the_instruction_behind_its_prefix(teacher: Embedder) -> None:
    asked = Teacher([teacher], {"Q: ": ASKED, "": None})
    found = asked.encode([("", "the moon"), ("Q: ", "the moon"), ("", "a tide")])
    expected = [teacher.encode(["the moon"]), teacher.encode(["the moon"], task=ASKED), teacher.encode(["a tide"])]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


def test_a_row_that_states_no_instruction_has_the_own_one_of_model_and_teacher(
    recipe: Recipe, teacher: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published embedders that train on have one (`model.from: qwen3-embedding:...`), and so may recipes. A row that is
    read without its instruction has none on either side.
    """
    told = Embedder(teacher.network, teacher.own_tokenizer)
    told.contract = teacher.contract.model_copy(update={"default_task": "Find theirs"})
    monkeypatch.setattr(distill, "open_encoder", lambda name: told)
    recipe = followed(recipe, Path("x"), similarity_weight=1.0)
    [stage] = recipe.stages
    [entry] = stage.data
    unstated = entry.model_copy(update={"task": None})
    for share, default, asked in ((0.0, "Find the page", "Find theirs"), (1.0, "Find the page", None), (0.0, "", None)):
        now = stage.model_copy(update={"without_instruction": share, "data": (unstated,)})
        own = recipe.model_copy(update={"stages": (now,)})
        contract = start_model(own).contract.model_copy(update={"default_task": default})
        [sources] = open_sources(own)
        batch = batch_of_step(own, 0, sources, contract, 0)
        assert {prefix for prefix, _ in batch.queries} == {contract.prefix(default if not share else "")}
        follows = teacher_of(now, sources, contract)
        assert follows is not None
        expected = told.encode([text for _, text in batch.queries], task=asked)
        np.testing.assert_allclose(follows.encode(batch.queries), expected, atol=1e-6)
        np.testing.assert_allclose(follows.encode([("", "a")]), told.encode(["a"]), atol=1e-6)


def test_the_cosine_of_several_teachers_is_the_mean_of_theirs(
    teacher: Embedder, tiny_embedder: Callable[..., Embedder]
) -> None:
    class Longer(Part):
        def encode(self, texts: list[str], task: str | None = None) -> Any:
            return 7 * super().encode(texts, task)

    other = tiny_embedder("mean", "qwen3")
    asked = Teacher([teacher, Longer(other, 8)], {"": None})
    texts = ["the moon", "a tide", "a dog"]
    found = asked.encode([("", text) for text in texts])
    assert asked.width == found.shape[1] == 40
    own, theirs = teacher.encode(texts), other.encode(texts)[:, :8]
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, (own @ own.T + theirs @ theirs.T) / 2, atol=1e-6)


def test_a_stage_that_follows_no_vectors_opens_no_teacher(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "open_encoder", None)
    plain = recipe.stages[0].model_copy(update={"loss": LossPart()})
    model = start_model(recipe)
    assert teacher_of(plain, open_sources(recipe)[0], model.contract) is None
    assert projection_to(None, recipe, 0, model) is None


def test_each_text_is_encoded_before_the_first_step_and_once_for_all_runs(
    recipe: Recipe,
    teacher: Embedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "embedwright.training.run.distill")
    first, second = Part(teacher), Part(teacher)
    runs = [followed(recipe, tmp_path / name, vector_weight=1.0, similarity_weight=1.0) for name in "ab"]
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distill, "open_encoder", lambda name: first)
    encoded: list[int] = []
    train(runs[0], on_step=lambda record: encoded.append(len(first.texts)))
    texts = [text for text in first.texts if text != "a text"]  # which tells its width
    assert len(set(texts)) == len(texts) == 41  # 20 queries and their positives, and the negative of all
    assert set(encoded) == {len(first.texts)}
    assert "encoded 41 texts in" in caplog.text and "vectors of 0 texts were kept" in caplog.text
    monkeypatch.setattr(distill, "open_encoder", lambda name: second)
    train(runs[1])
    assert second.texts == ["a text"] and "vectors of 41 texts were kept from before" in caplog.text


# ---- a teacher of another width


def test_projections_differ_by_stage_and_are_the_same_again(recipe: Recipe, teacher: Embedder) -> None:
    two = recipe.model_copy(update={"stages": recipe.stages * 2})
    wide, model = Teacher([Part(teacher)], {"": None}), start_model(recipe)
    drawn = [projection_to(wide, two, number, model) for number in (0, 1, 0)]
    assert all(one is not None and one.shape == (16, 32) for one in drawn)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])  # type: ignore[arg-type]
    assert projection_to(Teacher([teacher], {"": None}), two, 0, model) is None  # of the same width
    similar = followed(recipe, Path("x"), similarity_weight=1.0)
    assert projection_to(wide, similar, 0, model) is None


@pytest.mark.parametrize("in_batch", ["none", "all"])
def test_a_run_in_pieces_equals_the_run_in_one(
    recipe: Recipe, teacher: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_batch: str
) -> None:
    """With a cache each, and stopped while the teacher encodes too."""
    monkeypatch.setattr(distill, "_CHUNK", 9)
    [stage] = recipe.stages
    recipe = recipe.model_copy(update={"stages": (stage.model_copy(update={"in_batch_negatives": in_batch}),)})
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher))
    weights = {"vector_weight": 3.0} | ({"similarity_weight": 0.5} if in_batch == "all" else {})
    keys = {"checkpoint_every": 2, "batch_tokens": 40}
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "one-cache"))
    whole = records_of(followed(recipe, tmp_path / "one", 4, keys, **weights))
    monkeypatch.setenv("EMBEDWRIGHT_CACHE", str(tmp_path / "pieces-cache"))
    pieces = followed(recipe, tmp_path / "pieces", 4, keys, **weights)
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher, fails_at=20))
    with pytest.raises(KeyboardInterrupt):
        train(pieces)
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher))
    found = records_of(pieces, stop=3) + records_of(pieces)[1:]
    assert found == whole
    files = [
        load_file(tmp_path / name / "checkpoints" / "00-0000004" / "optimizer.safetensors")
        for name in ("one", "pieces")
    ]
    assert files[0].keys() == files[1].keys() and "projection" in files[0]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    start = projection_to(Teacher([Part(teacher)], {"": None}), pieces, 0, start_model(pieces))
    assert not torch.equal(files[0]["projection"], start)  # type: ignore[arg-type]


def test_the_projection_trains_and_is_in_no_saved_model(
    recipe: Recipe, teacher: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher))
    saving = followed(recipe, tmp_path / "followed", vector_weight=1.0)
    [stage] = saving.stages
    saving = saving.model_copy(update={"stages": (stage.model_copy(update={"save": True, "temperature": 100.0}),)})
    losses = [record["loss"] for record in records_of(saving)]
    assert losses[-1] < losses[0] - 0.3
    [file] = (tmp_path / "followed" / "stages").rglob("model.safetensors")
    train(saving).save(tmp_path / "model")
    for saved in (file, tmp_path / "model" / "model.safetensors"):
        assert not any("projection" in name for name in load_file(saved))
    assert "projection" not in load_file(tmp_path / "followed" / "checkpoints" / "00-0000020" / "weights.safetensors")


def test_a_checkpoint_of_a_teacher_of_another_width_is_refused(
    recipe: Recipe, teacher: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = followed(recipe, tmp_path / "run", 4, {"checkpoint_every": 2}, vector_weight=1.0)
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher))
    records_of(run, stop=3)
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher, 8))
    with pytest.raises(InputError, match=r"00-0000002 is of a teacher with vectors of another width"):
        train(run)


def test_a_run_goes_on_with_its_own_teacher_alone(
    recipe: Recipe, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    tiny_embedder("mean").save(folder)
    [stage] = recipe.stages
    optim = stage.optim.model_copy(update={"steps": 4})
    loss = LossPart(distill=DistillPart(teacher=(str(folder),), similarity_weight=1.0))
    run = recipe.model_copy(
        update={
            "stages": (stage.model_copy(update={"loss": loss, "optim": optim}),),
            "run": recipe.run.model_copy(update={"checkpoint_every": 2}),
        }
    )
    records_of(run, stop=3)
    folder.rename(tmp_path / "own")
    tiny_embedder("mean", "qwen3").save(folder)  # another model of the same width, in its place
    with pytest.raises(ConfigError, match=r"a run of another teacher \(.*teacher: \w+ -> \w+\)"):
        train(run)
    shutil.rmtree(folder)
    (tmp_path / "own").rename(folder)
    assert [record["step"] for record in records_of(run)] == [3, 4]


def test_threads_and_micro_batches_change_no_loss(
    recipe: Recipe, teacher: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher))
    found = []
    for number, run in enumerate(({"workers": 0}, {"workers": 3}, {"batch_tokens": 40})):
        asked = followed(recipe, tmp_path / str(number), 4, run, vector_weight=1.0, similarity_weight=1.0)
        found.append(records_of(asked))
    assert found[0] == found[1]
    assert [one["loss"] for one in found[2]] == pytest.approx([one["loss"] for one in found[0]], rel=1e-4)


# ---- what it is for


def test_a_student_takes_on_the_similarities_of_its_teacher(
    recipe: Recipe, teacher: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "open_encoder", lambda name: Part(teacher))
    similar = followed(recipe, tmp_path / "run", 40, similarity_weight=100.0, temperature=0.05)
    [stage] = similar.stages
    similar = similar.model_copy(update={"stages": (stage.model_copy(update={"temperature": 0.05}),)})
    queries, passages = [f"q{i} tide" for i in range(20)], [f"p{i} the moon and {i}" for i in range(20)]

    def cosines(model: Any) -> Any:
        return model.encode(queries, task=ASKED) @ model.encode(passages).T

    vectors = Part(teacher).encode(queries, ASKED), Part(teacher).encode(passages)
    target = np.divide(*(lambda q, c: (q @ c.T, np.outer(*(np.linalg.norm(v, axis=1) for v in (q, c)))))(*vectors))
    ranks = [
        np.mean([spearmanr(own, theirs).statistic for own, theirs in zip(cosines(model), target, strict=True)])
        for model in (start_model(similar), train(similar))
    ]
    assert 1 - ranks[1] < 0.4 * (1 - ranks[0]), ranks


@pytest.mark.parametrize("in_batch", ["none", "all"])
@pytest.mark.parametrize("batch_tokens", [40, 8192])
def test_a_student_comes_near_its_teacher(
    recipe: Recipe, teacher: Embedder, monkeypatch: pytest.MonkeyPatch, in_batch: str, batch_tokens: int
) -> None:
    monkeypatch.setattr(distill, "open_encoder", lambda name: teacher)
    stage = recipe.stages[0].model_copy(update={"in_batch_negatives": in_batch})
    run = recipe.run.model_copy(update={"batch_tokens": batch_tokens})
    recipe = recipe.model_copy(update={"stages": (stage,), "run": run})
    queries, passages = [f"q{i} tide" for i in range(20)], [f"p{i} the moon and {i}" for i in range(20)]

    def near(model: Embedder) -> float:
        own = np.concatenate([model.encode(queries, task=ASKED), model.encode(passages)])
        target = np.concatenate([teacher.encode(queries, task=ASKED), teacher.encode(passages)])
        return float((own * target).sum(1).mean())

    before, after = near(start_model(recipe)), near(train(recipe))
    assert after > before + 0.3, (before, after)
