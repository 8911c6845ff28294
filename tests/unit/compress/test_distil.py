"""Students that follow a teacher: the run that is prepared, what training gives, and what an index then accepts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sentence_transformers import SentenceTransformer

from embedwright.compress.chain import Step
from embedwright.compress.distil import alignment, distil_step, first_layers_step
from embedwright.compress.weights import compress_weights
from embedwright.config import ConfigError
from embedwright.data.schema import Example, Passage, Task
from embedwright.errors import InputError
from embedwright.fingerprint import aligned_with, space_of
from embedwright.index.build import build_index
from embedwright.index.change import add
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import INT8
from embedwright.training.batches.blend import Row
from embedwright.training.run.signals import Interrupted

WORDS = ["tides", "moon", "sea", "sun", "dog", "fox", "lazy", "names", "Ada", "Grace", "numbers", "gravity", "levels"]
ASKED = "Find its answer"
TASK = Task(name="t", instruction=ASKED)


def text(seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, 5))


@pytest.fixture
def teacher(tmp_path: Path, tiny_embedder: Callable[..., Embedder]) -> str:
    tiny_embedder("latent").save(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """It only follows, and has neither model nor folder nor teacher."""
    rows = [{"query": text(i), "positive": text(1000 + i)} for i in range(120)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "name": "follow",
        "data": [{"path": str(tmp_path / "pairs.jsonl"), "task": TASK.model_dump(include={"name", "instruction"})}],
        "in_batch_negatives": "none",
        "hard_negatives": 0,
        "loss": {"distill": {"vector_weight": 1.0}},
        "optim": {"lr": 3e-3, "steps": 60, "batch_queries": 16},
    }
    content = {"name": "student", "tune": {"method": "full"}, "stages": [stage], "run": {"tracker": "none"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def changed(recipe: Path, distill: dict[str, Any] | None = None, steps: int | None = None, **more: Any) -> Path:
    """The recipe with another way to follow, other steps and other keys."""
    content = yaml.safe_load(recipe.read_text())
    (stage,) = content["stages"]
    stage["loss"]["distill"] = distill or stage["loss"]["distill"]
    stage["optim"]["steps"] = steps or stage["optim"]["steps"]
    stage["hard_negatives"] = int("score_weight" in stage["loss"]["distill"])
    made = recipe.with_name("changed.yaml")
    made.write_text(yaml.safe_dump(content | more))
    return made


def step(recipe: Path, teacher: str, on_step: Callable[[dict[str, Any]], None] = lambda _: None, **how: Any) -> Step:
    return distil_step(recipe, teacher, lambda plan: on_step, lambda line: None, **how)


def made(step: Step, source: str | Path, out: Path) -> Embedder:
    step.make(str(source), out)
    return Embedder.load(out)


def history(model: Embedder) -> list[dict[str, Any]]:
    return model.network.config.history  # type: ignore[no-any-return]


# ---- the student, and the run that is prepared


def test_a_student_has_the_first_layers_of_its_teacher(teacher: str, tmp_path: Path) -> None:
    student, known = made(first_layers_step(2), teacher, tmp_path / "student"), Embedder.load(teacher)
    assert history(student) == [{"step": "student", "of": "teacher", "kept": "the first 2 of 3 layers"}]
    assert (student.contract, student.network.pooling) == (known.contract, known.network.pooling)
    own, whole = student.network.state_dict(), known.network.state_dict()
    assert own.keys() == {name for name in whole if ".layers.2." not in name}
    assert all((own[name] == whole[name]).all() for name in own)
    for wrong in (0, 3):
        with pytest.raises(InputError, match=f"--student {wrong}: the model has 3 layers"):
            first_layers_step(wrong).make(teacher, tmp_path / "other")


def test_a_decoder_becomes_an_embedder_like_the_teacher(
    recipe: Path, teacher: str, tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    decoder = str(tiny_decoder("qwen3"))
    model = made(step(changed(recipe, steps=1), teacher, decoder=decoder), teacher, tmp_path / "student")
    assert model.network.backbone.config.model_type == "qwen3" and model.network.pooling.kind == "latent"
    assert not model.network.backbone.config.is_causal and model.max_tokens == Embedder.load(teacher).max_tokens
    (did,) = history(model)
    assert (did["step"], did["of"], did["teacher"], did["recipe"]) == (
        "distil",
        Path(decoder).name,
        "teacher",
        "student",
    )
    assert did["loss"] == "follow: vector_weight 1.0" and "1 steps of 16" in did["stages"]
    own = {"base": "another", "layers": 2, "pooling": "last", "max_tokens": 40}  # of the recipe
    short = made(step(changed(recipe, steps=1, model=own), teacher, decoder=decoder), teacher, tmp_path / "short")
    assert short.network.backbone.config.num_hidden_layers == 2
    assert (short.network.pooling.kind, short.max_tokens) == ("last", 40)


def test_such_an_embedder_has_the_teachers_instruction_mask_and_sizes_of_pooling(
    recipe: Path, tiny_embedder: Callable[..., Embedder], tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"latents": 5, "heads": 2, "head_dim": 3, "multiple": 1}
    tiny_embedder("latent", default_task=ASKED, pool_prompt=True, **sizes).save(tmp_path / "own")
    decoder, known = str(tiny_decoder("qwen3")), Embedder.load(tmp_path / "own")
    one = changed(recipe, steps=1, model={"heads": 1})
    student = made(step(one, str(tmp_path / "own"), decoder=decoder), tmp_path / "own", tmp_path / "student")
    assert student.contract.default_task == ASKED and student.contract.mask_rule == known.contract.mask_rule == "all"
    assert student.network.pooling == known.network.pooling.model_copy(update={"heads": 1})  # the recipe's, of heads


def test_a_recipe_that_follows_nobody_or_another_one_is_refused(recipe: Path, teacher: str) -> None:
    with pytest.raises(InputError, match=f"the teacher is {teacher}, not minilm"):
        step(changed(recipe, {"vector_weight": 1.0, "teacher": "minilm"}), teacher)
    with pytest.raises(InputError, match="no stage follows a teacher"):
        step(changed(recipe, {"score_weight": 1.0}), teacher)
    with pytest.raises(ConfigError, match=r"changed\.yaml.*vector_wieght"):
        step(changed(recipe, {"vector_wieght": 1.0}), teacher)


def test_a_stopped_student_goes_on(recipe: Path, teacher: str, tmp_path: Path) -> None:
    first_layers_step(2).make(teacher, tmp_path / "first")
    short = changed(recipe, steps=6, run={"tracker": "none", "checkpoint_every": 2})
    steps: list[int] = []

    def stop(record: dict[str, Any]) -> None:
        steps.append(record["step"])
        if len(steps) == 4:
            raise Interrupted

    whole = made(step(short, teacher), tmp_path / "first", tmp_path / "whole")
    with pytest.raises(Interrupted):
        made(step(short, teacher, stop), tmp_path / "first", tmp_path / "again")
    again = made(
        step(short, teacher, lambda record: steps.append(record["step"])), tmp_path / "first", tmp_path / "again"
    )
    assert steps[:4] == [1, 2, 3, 4] and steps[-2:] == [5, 6] and len(steps) <= 8
    assert np.array_equal(again.encode(["the moon"]), whole.encode(["the moon"]))


# ---- aligned


def test_an_aligned_student_searches_its_teachers_index(
    recipe: Path, teacher: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents, queries = [text(3000 + i) for i in range(80)], [text(5000 + i) for i in range(80)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    known = Embedder.load(teacher)
    build_index(known, tmp_path / "documents.jsonl", tmp_path / "index", dim=24)
    first = made(first_layers_step(2), teacher, tmp_path / "first")
    student = made(step(recipe, teacher, aligned=True), tmp_path / "first", tmp_path / "student")
    before, after, theirs = (model.encode(queries, task=ASKED) for model in (first, student, known))
    stored = known.encode(documents)
    own = (theirs @ stored.T).argmax(1)
    untrained, trained = (float(((some @ stored.T).argmax(1) == own).mean()) for some in (before, after))
    assert trained > 0.5 and trained > 2 * untrained, (untrained, trained)  # of texts that it never trained on
    did = history(student)[-1]
    assert did["aligned_with"] == space_of(known.fingerprint()) and did["agrees"] > 0.5

    index = Index.open(tmp_path / "index")
    caplog.clear()
    hits = index.search(student, queries, 1, ASKED)
    index.search(student, queries[:1], 1, ASKED)
    said = [record for record in caplog.records if "aligned" in record.getMessage()]
    assert len(said) == 1 and said[0].levelno == logging.WARNING
    cut = [vectors[:, :24] / np.linalg.norm(vectors[:, :24], axis=1, keepdims=True) for vectors in (after, stored)]
    assert [found[0].text for found in hits] == [documents[row] for row in (cut[0] @ cut[1].T).argmax(1)]
    for change in (lambda: index.check(student), lambda: add(student, tmp_path / "documents.jsonl", index.folder)):
        with pytest.raises(InputError, match="may search there, and not add"):
            change()
    caplog.clear()
    assert Index.open(index.folder).search(known, queries[:1], 1, ASKED) and not caplog.records
    with pytest.raises(InputError, match="another model"):
        Index.open(index.folder).search(first, queries[:1], 1, ASKED)


def test_who_is_aligned_with_what(teacher: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path) -> None:
    (tmp_path / "documents.txt").write_text("tides\nthe moon\n")
    known, short, other, student = (
        Embedder.load(teacher),
        Embedder.load(teacher),
        tiny_embedder("latent"),
        tiny_embedder("latent", layers=2),
    )
    short.contract = short.contract.model_copy(update={"max_tokens": 12})
    other.network.head.latents.data += 1
    for name, model in {"known": known, "short": short, "other": other}.items():
        build_index(model, tmp_path / "documents.txt", tmp_path / name)

    def accepted(index: str, *after: dict[str, Any]) -> bool:
        student.network.config.history = [{"step": "distil", "aligned_with": space_of(known.fingerprint())}, *after]
        try:
            return Index.open(tmp_path / index).check(student, queries=True) is student
        except InputError as error:
            assert "another model" in str(error)
            return False

    assert accepted("known") and accepted("short")  # the same vectors, of fewer tokens
    assert not accepted("other")
    said = {"aligned_with": space_of(known.fingerprint())}
    assert accepted("known", {"step": "weights", "bits": 8, **said}) and not accepted("known", {"step": "weights"})
    assert not accepted("known", {"step": "layers"}) and not accepted("known", {"step": "distil", "teacher": "x"})


def trained_on(model: Embedder) -> Embedder:
    """As an optimizer may leave it."""
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    return model


TRAINED: dict[str, Callable[[str, Path], object]] = {
    "with adapters": lambda name, out: trained_on(Embedder.load(name).add_lora(2)).merge().save(out),
    "in full": lambda name, out: trained_on(Embedder.load(name)).save(out),
    "and saved in bfloat16": lambda name, out: trained_on(Embedder.load(name)).save(out, dtype="bfloat16"),
    "in sentence-transformers": lambda name, out: (
        trained_on(Embedder.load(name)).to_sentence_transformer().save(str(out))
    ),
    "in its own classes": lambda name, out: stirred(SentenceTransformer(name, device="cpu")).save(str(out)),
}
KEPT: dict[str, Callable[[str, Path], object]] = {
    "saved again": lambda name, out: Embedder.load(name).save(out),
    "through sentence-transformers": lambda name, out: Embedder.load(name).to_sentence_transformer().save(str(out)),
    "saved in bfloat16": lambda name, out: Embedder.load(name).save(out, dtype="bfloat16"),
    "opened in bfloat16": lambda name, out: Embedder.load(name, dtype="bfloat16").save(out),
    "opened in int8": lambda name, out: Embedder.load(name, dtype="int8").save(out),
    "opened in bfloat16, through sentence-transformers": lambda name, out: (
        Embedder.load(name, dtype="bfloat16").to_sentence_transformer().save(str(out))
    ),
    "in 8 bits": lambda name, out: compress_weights(name, out, INT8),
    "as it is": lambda name, out: shutil.copytree(name, out),
}


def stirred(model: SentenceTransformer) -> SentenceTransformer:
    for parameter in model.parameters():
        parameter.data += 0.01
    return model


@pytest.mark.parametrize("pooling", ["mean", "latent"])  # the two formats that keep a history
@pytest.mark.parametrize("way", [*TRAINED, *KEPT])
def test_a_student_that_was_trained_further_is_aligned_no_more(
    way: str, pooling: str, tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder(pooling, layers=1)
    model.network.config.history = [{"step": "distil", "aligned_with": "teacher"}]
    model.save(tmp_path / "student")
    (TRAINED | KEPT)[way](str(tmp_path / "student"), tmp_path / "out")
    if (pooling, way) == ("mean", "in its own classes"):
        return  # a folder without a contract, which is no embedder of ours
    dtypes: tuple[str | None, ...] = (None, "bfloat16", "int8") if way == "as it is" else (None,)
    for dtype in dtypes:
        assert aligned_with(Embedder.load(tmp_path / "out", dtype=dtype)) == ("teacher" if way in KEPT else None)


def test_in_memory_a_student_is_aligned_until_it_is_trained(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder("mean", layers=1)
    model.network.config.history = [{"step": "distil", "aligned_with": "teacher"}]
    model.save(tmp_path / "student")
    assert aligned_with(model) == "teacher"
    assert aligned_with(Embedder.load(tmp_path / "student").add_lora(2)) is None
    assert aligned_with(trained_on(Embedder.load(tmp_path / "student"))) is None
    changed = trained_on(Embedder.load(tmp_path / "student").add_lora(2)).merge()
    changed.save(tmp_path / "changed")
    assert aligned_with(changed) is None and history(Embedder.load(tmp_path / "changed"))[-1]["step"] == "changed"


def test_a_student_whose_pooling_alone_was_trained_is_aligned_no_more(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder("latent", layers=1).save(tmp_path / "model")
    student = Embedder.load(tmp_path / "model")
    student.network.config.history = [{"step": "distil", "aligned_with": "teacher"}]
    student.save(tmp_path / "student")
    loaded = Embedder.load(tmp_path / "student")
    assert aligned_with(loaded) == aligned_with(Embedder.load(tmp_path / "student").fold()) == "teacher"
    for model in (student, loaded):
        model.network.head.latents.data += 0.01
        assert aligned_with(model) is None
    loaded.save(tmp_path / "trained", dtype="bfloat16")
    assert aligned_with(Embedder.load(tmp_path / "trained")) is None


def test_a_student_whose_weights_cannot_be_checked_is_not_aligned(
    tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    tiny_embedder("mean", layers=1).save(tmp_path / "student")
    file = tmp_path / "student" / "embedwright.json"
    claim = {"step": "distil", "aligned_with": "teacher"}  # as it was written before weights were noted beside it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"history": [claim]}))
    loaded = Embedder.load(tmp_path / "student")
    assert aligned_with(loaded) is None
    loaded.save(tmp_path / "again")
    assert aligned_with(Embedder.load(tmp_path / "again")) is None


def test_what_cannot_be_aligned_is_refused_before_training(
    recipe: Path, teacher: str, tiny_decoder: Callable[..., Path]
) -> None:
    wide = str(tiny_decoder("llama", hidden_size=64))
    with pytest.raises(InputError, match=r"64 dimensions, those of .* 32"):
        step(recipe, teacher, decoder=wide, aligned=True)
    with pytest.raises(InputError, match="stage follow, the last one, does not follow the vectors"):
        step(changed(recipe, {"similarity_weight": 1.0}), teacher, aligned=True)


def test_an_alignment_is_measured_by_hand(
    tiny_embedder: Callable[..., Embedder], caplog: pytest.LogCaptureFixture
) -> None:
    teacher, student = tiny_embedder("mean"), tiny_embedder("mean", layers=1)
    rows = [Row(Example(str(i), "t", text(i), (Passage(text(500 + i % 9)),)), TASK) for i in range(30)]
    # a pair of texts that are not alike has no positive
    rows[0] = Row(Example("0", "t", text(0), (), (Passage(text(500)),), score=0.0), TASK)
    found = alignment(student, teacher, rows)
    documents = teacher.encode([text(500 + i) for i in range(9)])
    ours, theirs = (each.encode([text(i) for i in range(30)], task=ASKED) for each in (student, teacher))
    assert found["cosine"] == pytest.approx(np.mean([a @ b for a, b in zip(ours, theirs, strict=True)]), abs=1e-3)
    same = np.mean([(documents @ a).argmax() == (documents @ b).argmax() for a, b in zip(ours, theirs, strict=True)])
    assert found["agrees"] == pytest.approx(same, abs=1e-3)
    assert ("aligned_with" in found) == (same >= 0.5) and ("not aligned" in caplog.text) == (same < 0.5)
    whole = {"cosine": 1.0, "agrees": 1.0, "aligned_with": space_of(teacher.fingerprint())}
    assert alignment(teacher, teacher, rows) == whole


@pytest.mark.parametrize("symmetric", [False, True])
def test_texts_without_an_instruction_are_measured_as_training_reads_them(
    tiny_embedder: Callable[..., Embedder], symmetric: bool
) -> None:
    task, queries = Task(name="t", symmetric=symmetric), [text(i) for i in range(30)]
    rows = [Row(Example(str(i), "t", one, (Passage(text(500 + i)),)), task) for i, one in enumerate(queries)]
    teacher = tiny_embedder("mean", default_task=ASKED)
    for student in (tiny_embedder("mean", layers=1, default_task=ASKED), tiny_embedder("mean", layers=1)):
        read = student.contract.default_task or None  # what a student reads as a document, its teacher does too
        ours, theirs = (each.encode(queries, task=read) for each in (student, teacher))
        documents = teacher.encode([text(500 + i) for i in range(30)], task=read if symmetric else None)
        found = alignment(student, teacher, rows)
        assert found["cosine"] == pytest.approx((ours * theirs).sum(1).mean(), abs=1e-4)
        assert found["agrees"] == pytest.approx(
            ((ours @ documents.T).argmax(1) == (theirs @ documents.T).argmax(1)).mean(), abs=1e-4
        )
        if read:
            assert np.allclose(theirs, teacher.encode_query(queries), atol=1e-6)
