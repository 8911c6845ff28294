from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedwright.data.example import Example, Passage, Task
from embedwright.text import Contract
from embedwright.training.batch import Batch, make_batch
from embedwright.training.blend import Row

CONTRACT = Contract(eos_id=1)
PLAIN = Task(name="plain")


def row(query: str, positives: Any, negatives: Any = (), task: Task = PLAIN, id: str = "") -> Row:
    """Texts alone, or `text@document id`."""
    made = [
        tuple(Passage(*item.split("@")) for item in ([items] if isinstance(items, str) else items))
        for items in (positives, negatives)
    ]
    return Row(Example(id or query, task.name, query, *made), task)


def batch_of(*rows: Row, in_batch: Any = "all", hard_negatives: int = 99, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    return make_batch(rows, CONTRACT, hard_negatives=hard_negatives, in_batch=in_batch, rng=random)


def negatives(batch: Batch) -> list[set[str]]:
    """The texts that stand against each query."""
    return [{batch.candidates[c][1] for c in np.flatnonzero(allowed)} for allowed in batch.allowed_QC]


# ---- against a brute-force reference


def reference(rows: list[Row], batch: Batch, in_batch: str) -> list[list[bool]]:
    """The rule of design section 4, pair by pair. Every negative is drawn; the drawn positive is the batch's word."""

    def behind(r: Row) -> str:
        return f"Instruct: {r.task.instruction}\nQuery: " if r.task.symmetric and r.task.instruction else ""

    brought = [[*r.example.negatives] for r in rows]
    for i, r in enumerate(rows):
        text = batch.candidates[batch.positive_Q[i]][1]
        brought[i] += [p for p in r.example.positives if p.text == text][:1]

    def lends(i: int, j: int) -> bool:
        a, b = (rows[k].task.in_batch_negatives or in_batch for k in (i, j))
        if a == "none" or b == "none":
            return False
        return True if a == b == "all" else rows[i].task.name == rows[j].task.name

    def stands(i: int, prefix: str, text: str) -> bool:
        example = rows[i].example
        bringers = [j for j in range(len(rows)) if behind(rows[j]) == prefix and text in {p.text for p in brought[j]}]
        known_as = {p.id for j in bringers for p in brought[j] if p.text == text and p.id}
        if text == example.query or text in {p.text for p in example.positives}:
            return False
        if known_as & {p.id for p in example.positives}:
            return False
        return i in bringers or any(lends(i, j) for j in bringers)

    return [[stands(i, *candidate) for candidate in batch.candidates] for i in range(len(rows))]


def random_rows(random: np.random.Generator) -> list[Row]:
    """Few texts and few ids, so that most rows collide in one way or another."""
    modes = [None, "none", "same_task", "all"]
    tasks = [
        Task(name="t0", in_batch_negatives=random.choice(modes)),
        Task(name=random.choice(["t0", "t1"]), instruction="find", in_batch_negatives=random.choice(modes)),
        Task(name="t2", instruction="find", symmetric=True, in_batch_negatives=random.choice(modes)),
    ]

    def passages(low: int) -> list[str]:
        texts = dict.fromkeys(random.integers(0, 14, random.integers(low, 4)).tolist())
        return [f"text {t}" + random.choice(["", f"@d{t % 5}", f"@e{t % 4}"]) for t in texts]

    return [
        row(f"text {random.integers(0, 30)}", passages(1), passages(0), tasks[random.integers(0, 3)], id=f"r{i}")
        for i in range(random.integers(1, 9))
    ]


@pytest.mark.parametrize("in_batch", ["none", "same_task", "all"])
def test_equals_brute_force(in_batch: str) -> None:
    random = np.random.default_rng(len(in_batch))
    seen = 0
    for trial in range(300):
        rows = random_rows(random)
        batch = batch_of(*rows, in_batch=in_batch, seed=trial)
        assert batch.allowed_QC.tolist() == reference(rows, batch, in_batch)
        assert len(set(batch.candidates)) == len(batch.candidates)
        for i, r in enumerate(rows):
            instruction = f"Instruct: {r.task.instruction}\nQuery: " if r.task.instruction else ""
            assert batch.queries[i] == (instruction, r.example.query)
            prefix, text = batch.candidates[batch.positive_Q[i]]
            assert prefix == (instruction if r.task.symmetric else "")
            assert text in {p.text for p in r.example.positives}
            assert not batch.allowed_QC[i, batch.positive_Q[i]]
        seen += int(batch.allowed_QC.sum())
    assert seen > 1000


# ---- the rule, case by case


def test_all_takes_everything_and_none_only_its_own() -> None:
    rows = [row("q1", "p1", ["n1"]), row("q2", "p2", ["n2", "m2"])]
    assert negatives(batch_of(*rows)) == [{"n1", "p2", "n2", "m2"}, {"n2", "m2", "p1", "n1"}]
    assert negatives(batch_of(*rows, in_batch="none")) == [{"n1"}, {"n2", "m2"}]


def test_a_none_row_neither_uses_nor_gives() -> None:
    off = Task(name="off", in_batch_negatives="none")
    rows = [row("q1", "p1", ["n1"]), row("q2", "p2", ["n2"], off), row("q3", "p3")]
    assert negatives(batch_of(*rows)) == [{"n1", "p3"}, {"n2"}, {"p1", "n1"}]


def test_a_task_may_switch_on_what_the_stage_has_off() -> None:
    on = Task(name="on", in_batch_negatives="all")
    rows = [row("q1", "p1", ["n1"], on), row("q2", "p2", ["n2"]), row("q3", "p3", ["n3"], on)]
    assert negatives(batch_of(*rows, in_batch="none")) == [{"n1", "p3", "n3"}, {"n2"}, {"p1", "n1", "n3"}]


def test_same_task_on_either_side_asks_for_the_same_task() -> None:
    a, b = Task(name="a", in_batch_negatives="same_task"), Task(name="b")
    rows = [row("q1", "p1", (), a), row("q2", "p2", (), a), row("q3", "p3", (), b), row("q4", "p4", (), b)]
    assert negatives(batch_of(*rows)) == [{"p2"}, {"p1"}, {"p4"}, {"p3"}]


def test_what_answers_the_query_is_never_its_negative() -> None:
    rows = [
        row("q1", ["p1@d1", "also p1"], ["n1"]),
        row("q2", "same document, other words@d1"),
        row("q3", "also p1"),  # a positive of q1 that was perhaps not drawn
        row("q4", "q1"),  # the query's own text
        row("q5", "p5", ["n1", "p1"]),
    ]
    for seed in range(8):  # either of q1's positives is drawn
        assert negatives(batch_of(*rows, seed=seed))[0] == {"n1", "p5"}


def test_ids_of_equal_texts_are_put_together() -> None:
    rows = [row("q1", "p1@d1"), row("q2", "twin@d1"), row("q3", "twin")]
    batch = batch_of(*rows)
    assert len(batch.candidates) == 2
    assert negatives(batch) == [set(), {"p1"} - {"p1"}, {"p1"}]


def test_own_negatives_always_stand() -> None:
    off = Task(name="off", in_batch_negatives="none")
    rows = [row("q1", "p1", ["shared", "p2"], off), row("q2", "p2", ["shared"], off), row("q3", "p3")]
    assert negatives(batch_of(*rows)) == [{"shared", "p2"}, {"shared"}, set()]


def test_own_negatives_that_answer_the_query_do_not_stand() -> None:
    rows = [row("q1", ["p1@d1", "p2"], ["p1", "p2", "q1", "words of d1@d1", "n1@d2"])]
    for seed in range(6):
        assert negatives(batch_of(*rows, seed=seed)) == [{"n1"}]


def test_symmetric_tasks_have_their_instruction_on_both_sides() -> None:
    both = Task(name="sts", instruction="Retrieve similar", symmetric=True)
    one = Task(name="qa", instruction="Answer")
    batch = batch_of(row("q1", "p1", ["n1"], both), row("q2", "p1", ["n1"], one), row("q3", "p3"))
    sts, qa = "Instruct: Retrieve similar\nQuery: ", "Instruct: Answer\nQuery: "
    assert batch.queries == [(sts, "q1"), (qa, "q2"), ("", "q3")]
    assert batch.candidates == [(sts, "p1"), (sts, "n1"), ("", "p1"), ("", "n1"), ("", "p3")]
    # each stands against the other's negative, in either form, and never against the text of its positive
    assert batch.allowed_QC.astype(int).tolist() == [[0, 1, 0, 1, 1], [0, 1, 0, 1, 1], [1, 1, 1, 1, 0]]


# ---- what is drawn


def test_hard_negatives_limits_and_draws_without_repetition() -> None:
    example = row("q", "p", [f"n{i}" for i in range(6)])
    for limit in (0, 1, 4, 6, 7):
        found = [negatives(batch_of(example, hard_negatives=limit, seed=seed))[0] for seed in range(60)]
        assert all(len(texts) == min(limit, 6) for texts in found)
        if limit:
            assert set().union(*found) == {f"n{i}" for i in range(6)}
    assert batch_of(example, hard_negatives=0).candidates == [("", "p")]


def test_every_positive_is_drawn_now_and_then() -> None:
    example = row("q", ["p0", "p1", "p2"])
    found = [batch_of(example, seed=seed).candidates for seed in range(30)]
    assert {candidates[0][1] for candidates in found} == {"p0", "p1", "p2"}
    assert all(len(candidates) == 1 for candidates in found)


def test_the_same_random_state_draws_the_same() -> None:
    rows = [row(f"q{i}", [f"p{i}", f"r{i}"], [f"n{i}.{k}" for k in range(5)]) for i in range(6)]
    once, again = (batch_of(*rows, hard_negatives=2, seed=5) for _ in range(2))
    assert once.candidates == again.candidates and (once.positive_Q == again.positive_Q).all()
    assert once.candidates != batch_of(*rows, hard_negatives=2, seed=6).candidates


# ---- split


def test_take_keeps_each_query_its_positive_and_its_negatives() -> None:
    random = np.random.default_rng(1)
    for trial in range(150):
        batch = batch_of(*random_rows(random), in_batch=["none", "all"][trial % 2], seed=trial)
        rows = list(random.permutation(len(batch.queries))[: random.integers(1, len(batch.queries) + 1)])
        part = batch.take(rows)
        assert part.queries == [batch.queries[i] for i in rows] and part.ids == [batch.ids[i] for i in rows]
        used = set()
        for k, i in enumerate(rows):
            against = {batch.candidates[c] for c in np.flatnonzero(batch.allowed_QC[i])}
            positive = batch.candidates[batch.positive_Q[i]]
            assert {part.candidates[c] for c in np.flatnonzero(part.allowed_QC[k])} == against
            assert part.candidates[part.positive_Q[k]] == positive
            used |= against | {positive}
        assert sorted(part.candidates) == sorted(used)


def test_alone_is_true_where_no_candidate_serves_two_queries() -> None:
    random = np.random.default_rng(2)
    outcomes = []
    for trial in range(300):
        rows = random_rows(random)[: 1 + trial % 4]
        batch = batch_of(*rows, in_batch=["none", "all"][trial % 2], hard_negatives=trial % 3, seed=trial)
        users: dict[int, set[int]] = {}
        for i in range(len(rows)):
            for c in {*np.flatnonzero(batch.allowed_QC[i]), batch.positive_Q[i]}:
                users.setdefault(int(c), set()).add(i)
        outcomes.append(batch.alone())
        assert batch.alone() == all(len(who) == 1 for who in users.values())
    assert 30 < sum(outcomes) < 270


def test_the_hash_of_ids_follows_the_rows_and_their_order() -> None:
    rows = [row(f"q{i}", "p") for i in range(3)]
    batch = batch_of(*rows)
    hashes = {b.ids_hash() for b in (batch, batch.take([0, 2, 1]), batch.take([0, 1]), replace(batch, ids=["q0q1"]))}
    assert len(hashes) == 4 and batch.ids_hash() == batch_of(*rows, seed=9).ids_hash()
    assert all(len(bytes.fromhex(text)) == 8 for text in hashes)
