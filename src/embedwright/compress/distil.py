"""The steps `student` and `distil` of `embedwright compress`: a smaller model, and its training to follow a teacher.

Q queries, D documents, E embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedwright.compress.chain import Step, save_step
from embedwright.compress.depth import check_kept, cut_layers
from embedwright.compress.heal import Listen, filled, resume_facts, train_and_load, training_facts
from embedwright.encoders.open import open_encoder
from embedwright.encoders.protocol import Encoder, as_encoder
from embedwright.errors import InputError
from embedwright.fingerprint import fingerprint_of, space_of
from embedwright.model.embedder import Embedder
from embedwright.model.formats.open import outline
from embedwright.text import Contract
from embedwright.training.batches.blend import Row, rows_at
from embedwright.training.batches.sources import open_sources
from embedwright.training.recipe import Recipe
from embedwright.training.run.start import shape_of
from embedwright.training.train import OnEvaluation
from embedwright.vectors.kept import encode_asked

logger = logging.getLogger(__name__)

_ROWS = 256  # training rows on which an alignment is measured
_AGREES = 0.5  # an aligned student finds what its teacher finds for at least this share of their queries


def first_layers_step(keep: int) -> Step:
    """Returns the step that keeps the first `keep` layers, with the pooling and the text contract."""

    def make(source: str, out: Path) -> None:
        model = Embedder.load(source)
        count = model.network.backbone.config.num_hidden_layers
        check_kept("--student", keep, count)
        cut_layers(model.network, range(keep, count))
        save_step(model, source, out, "student", kept=f"the first {keep} of {count} layers")

    return Step("student", {"layers": keep}, make)


def distil_step(
    recipe: str | Path,
    teacher: str,
    listen: Listen,
    on_evaluation: OnEvaluation,
    *,
    decoder: str | None = None,
    aligned: bool = False,
) -> Step:
    """Returns the step that trains a student by a recipe. At least one stage follows `teacher`.

    The student is the model that the step begins with. Or it is a `decoder`, by name, with the teacher's pooling,
    attention, instruction and length unless the recipe's `model` says otherwise. `aligned` students search the
    teacher's own indexes: whether they can is measured, and only then noted. `listen` and `on_evaluation` are as of
    `heal_step`.

    Raises ConfigError for a mistake in the recipe, and InputError if no stage follows the teacher, or the student
    cannot be aligned with it.
    """

    def plan_for(source: str, run: Path) -> Recipe:
        return filled(recipe, source, teacher, run, None if decoder is None else _like(teacher, decoder))

    asked = plan_for(teacher, Path("unset"))
    _check_followed(asked, teacher, recipe)
    if aligned:
        _check_alignable(asked, teacher)

    def make(source: str, out: Path) -> None:
        plan = plan_for(source, out.with_name(f"{out.name}.run"))
        model = train_and_load(plan, source, listen, on_evaluation)
        did = {**training_facts(plan), "loss": _followed(plan)}
        if aligned:
            did |= alignment(model, as_encoder(open_encoder(teacher)), _rows(plan))
        save_step(model, decoder or source, out, "distil", **did)

    return Step("distil", {**resume_facts(asked), "student": decoder, "aligned": aligned}, make)


def alignment(student: Embedder, teacher: Encoder, rows: Sequence[Row]) -> dict[str, Any]:
    """Measures how a student's queries do among the vectors of its teacher, for the student's history.

    `cosine` is the mean cosine of a query's two vectors. `agrees` is the share of queries for which both find the same
    document first, among the teacher's vectors of the documents of all rows. If that is at least half, `aligned_with`
    names the teacher; else a warning says why it does not.
    """
    asked = [_instruction(row, student.contract) for row in rows]
    queries = [(instruction, row.example.query) for instruction, row in zip(asked, rows, strict=True)]
    documents = [
        (instruction if row.task.symmetric else None, row.example.paired[0].text)
        for instruction, row in zip(asked, rows, strict=True)
    ]
    documents_DE = encode_asked(teacher, list(dict.fromkeys(documents)))
    ours_QE, theirs_QE = encode_asked(student, queries), encode_asked(teacher, queries)
    ours_Q, theirs_Q = ((vectors_QE @ documents_DE.T).argmax(1) for vectors_QE in (ours_QE, theirs_QE))
    cosine, agrees = float((ours_QE * theirs_QE).sum(1).mean()), float((ours_Q == theirs_Q).mean())
    found = {"cosine": round(cosine, 4), "agrees": round(agrees, 4)}
    if agrees < _AGREES:
        logger.warning(
            "the student is not aligned: for %.0f %% of %d queries that it trained on it finds what its teacher finds "
            "(mean cosine %.2f): train longer, or with a larger vector_weight",
            100 * agrees,
            len(rows),
            cosine,
        )
        return found
    return found | {"aligned_with": space_of(fingerprint_of(teacher) or {})}


def _instruction(row: Row, contract: Contract) -> str | None:
    """Returns the instruction that training reads a row's query under; empty for each model's own.

    None for a query that the student reads as a document: its teacher did so, too.
    """
    prefix = contract.prefix(row.task.instruction or contract.default_task)
    return None if prefix == contract.prefix(None) else row.task.instruction


def _like(teacher: str, decoder: str) -> dict[str, Any]:
    """Returns the part `model` of a recipe that makes an embedder of a decoder as the teacher is one."""
    known = outline(teacher)
    contract, pooling = known.contract, known.pooling
    return {
        "base": decoder,
        "attention": "causal" if getattr(known.decoder, "is_causal", True) else "bidirectional",
        "pooling": pooling.kind,
        **pooling.model_dump(exclude={"kind"}),
        "max_tokens": contract.max_tokens,
        "pool_prompt": contract.mask_rule == "all",
        "default_task": contract.default_task or None,
    }


def _check_followed(plan: Recipe, teacher: str, recipe: str | Path) -> None:
    followed = [name for stage in plan.stages for name in stage.loss.teachers]
    if others := sorted(set(followed) - {teacher}):
        raise InputError(f"{recipe}: the teacher is {teacher}, not {others[0]}: leave teacher out")
    if not followed:
        raise InputError(
            f"{recipe}: no stage follows a teacher: give one loss: {{distill: {{vector_weight: 1.0}}}}, or "
            "similarity_weight (docs/losses.md)"
        )


def _check_alignable(plan: Recipe, teacher: str) -> None:
    own, known = shape_of(plan.model)[0].hidden_size, outline(teacher).decoder.hidden_size
    if own != known:
        raise InputError(
            f"--aligned: the student's vectors have {own} dimensions, those of {teacher} {known}. A model's "
            "vectors are as wide as its states, which leaves no place for a projection: take layers of the teacher "
            "(--student N), or a decoder of its width"
        )
    last = plan.stages[-1]
    if last.loss.distill is None or not last.loss.distill.vector_weight:
        raise InputError(f"--aligned: stage {last.name}, the last one, does not follow the vectors: give vector_weight")


def _rows(plan: Recipe) -> list[Row]:
    """Draws rows of the last stage."""
    sources, name = open_sources(plan)[-1], plan.stages[-1].name
    return rows_at(sources, 0, batch_queries=_ROWS, batching="blended", seed=plan.seed, stage=name)


def _followed(plan: Recipe) -> str:
    """Names the terms of each stage's loss that follow the teacher."""
    lines = []
    for stage in plan.stages:
        if stage.loss.distill is not None:
            terms = stage.loss.distill.model_dump(exclude={"teacher"})
            lines.append(f"{stage.name}: " + ", ".join(f"{key} {value}" for key, value in terms.items() if value))
    return "; ".join(lines)
