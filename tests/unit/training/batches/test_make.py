from __future__ import annotations

import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedwright.data.labels import label_triples
from embedwright.data.schema import Example, Passage, Task
from embedwright.text import Contract
from embedwright.training.batches.batch import Batch, Targets
from embedwright.training.batches.blend import Row
from embedwright.training.batches.make import make_batch
from embedwright.training.stages import LossPart

CONTRACT = Contract(eos_id=1)
PLAIN = Task(name="plain")


def row(query: str, positives: Any, negatives: Any = (), task: Task = PLAIN, id: str = "") -> Row:
    """Texts alone, or `text@document id`."""
    made = [
        tuple(Passage(*item.split("@")) for item in ([items] if isinstance(items, str) else items))
        for items in (positives, negatives)
    ]
    return Row(Example(id or query, task.name, query, *made), task)


def batch_of(*rows: Row, in_batch: Any = "all", hard_negatives: int = 99, seed: int = 0, **loss: Any) -> Batch:
    """`loss`: keys of the stage's loss."""
    random = np.random.default_rng(seed)
    wanted = LossPart(**loss) if loss else None
    return make_batch(rows, CONTRACT, hard_negatives=hard_negatives, in_batch=in_batch, rng=random, loss=wanted)


def negatives(batch: Batch) -> list[set[str]]:
    """The texts that stand against each query."""
    return [{batch.candidates[c][1] for c in np.flatnonzero(allowed)} for allowed in batch.masks.negative_QC]


# ---- against a brute-force reference


def same(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def answers_of(rows: list[Row], i: int) -> tuple[set[str], set[tuple[str, str]]]:
    """Texts and documents that answer row i by any of these rows, and its own query, by reading all of them."""
    asked, task = same(rows[i].example.query), rows[i].example.task
    texts, documents = {asked}, set()
    for example in (r.example for r in rows if r.example.task == task):
        if same(example.query) == asked:
            texts |= {same(p.text) for p in example.positives}
            documents |= {(task, p.id) for p in example.positives if p.id}
        if asked in {same(p.text) for p in example.positives}:
            texts.add(same(example.query))
    for example in (r.example for r in rows):  # every negative is drawn here
        known = (*example.positives, *example.negatives)
        texts |= {same(p.text) for p in known if (example.task, p.id) in documents}
    return texts, documents


def lends(rows: list[Row], in_batch: str, i: int, j: int) -> bool:
    a, b = (rows[k].task.in_batch_negatives or in_batch for k in (i, j))
    if i == j or a == "none" or b == "none":
        return False
    return True if a == b == "all" else rows[i].task.name == rows[j].task.name


def reference(rows: list[Row], batch: Batch, in_batch: str) -> list[list[bool]]:
    """The rule, pair by pair. Every negative is drawn; the drawn positive is the batch's word."""

    def behind(r: Row) -> str:
        return f"Instruct: {r.task.instruction}\nQuery: " if r.task.symmetric and r.task.instruction else ""

    brought = [{p.text for p in r.example.negatives} for r in rows]
    for i in range(len(rows)):
        brought[i].add(batch.candidates[batch.masks.positive_Q[i]][1])
    answers = [answers_of(rows, i)[0] for i in range(len(rows))]

    def stands(i: int, prefix: str, text: str) -> bool:
        bringers = [j for j in range(len(rows)) if behind(rows[j]) == prefix and text in brought[j]]
        return same(text) not in answers[i] and (i in bringers or any(lends(rows, in_batch, i, j) for j in bringers))

    return [[stands(i, *candidate) for candidate in batch.candidates] for i in range(len(rows))]


LOOKS = [str, str, str.upper, lambda t: f" {t}\n", lambda t: t.replace(" ", "  ").replace("é", "e\u0301")]


def random_rows(random: np.random.Generator) -> list[Row]:
    """Few texts in many looks and few ids, so that most rows collide in one way or another."""
    modes = [None, "none", "same_task", "all"]
    tasks = [
        Task(name="t0", in_batch_negatives=random.choice(modes)),
        Task(name=random.choice(["t0", "t1"]), instruction="find", in_batch_negatives=random.choice(modes)),
        Task(name="t2", instruction="find", symmetric=True, in_batch_negatives=random.choice(modes)),
    ]

    def look(number: int) -> str:
        return str(LOOKS[random.integers(len(LOOKS))](f"texté {number}"))

    def passages(low: int) -> list[str]:
        texts = dict.fromkeys(random.integers(0, 14, random.integers(low, 4)).tolist())
        return [look(t) + random.choice(["", f"@d{t % 5}", f"@e{t % 4}"]) for t in texts]

    return [
        row(look(random.integers(0, 30)), passages(1), passages(0), tasks[random.integers(0, 3)], id=f"r{i}")
        for i in range(random.integers(1, 9))
    ]


@pytest.mark.parametrize("in_batch", ["none", "same_task", "all"])
def test_equals_brute_force(in_batch: str) -> None:
    random = np.random.default_rng(len(in_batch))
    seen = others = 0
    for trial in range(300):
        rows = random_rows(random)
        batch = batch_of(*rows, in_batch=in_batch, seed=trial)
        assert batch.masks.negative_QC.tolist() == reference(rows, batch, in_batch)
        assert len(set(batch.candidates)) == len(batch.candidates)
        for i, r in enumerate(rows):
            instruction = f"Instruct: {r.task.instruction}\nQuery: " if r.task.instruction else ""
            assert batch.queries[i] == (instruction, r.example.query)
            prefix, text = batch.candidates[batch.masks.positive_Q[i]]
            assert prefix == (instruction if r.task.symmetric else "")
            assert text in {p.text for p in r.example.positives}
            assert not batch.masks.negative_QC[i, batch.masks.positive_Q[i]]
            others += len(answers_of(rows, i)[0] - answers_of([r], 0)[0])
        seen += int(batch.masks.negative_QC.sum())
    assert seen > 1000 and others > 100


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


@pytest.mark.parametrize("in_batch", ["all", "same_task"])
def test_answers_of_one_question_do_not_stand_against_each_other(in_batch: str) -> None:
    other = Task(name="other")
    rows = [
        row("how do tides work", "the moon", ["n1"]),
        row("How do  tides work", "gravity@7", ["n2", "The Moon "]),
        row("how do tides work", "a film", (), other),
        row("q4", "words of document 7@7"),
    ]
    of_others = {"a film"} if in_batch == "all" else set()
    found = negatives(batch_of(*rows, in_batch=in_batch))
    assert found[0] == found[1] == {"n1", "n2"} | of_others
    assert found[2] == ({"the moon", "The Moon ", "gravity", "n1", "n2", "words of document 7"} if of_others else set())


def test_a_judged_pair_holds_in_both_directions() -> None:
    rows = [row("a", "b"), row("B", "c"), row("d", "A"), row("e", "f", ["a"])]
    assert negatives(batch_of(*rows)) == [{"c", "f"}, {"f"}, {"b", "c", "f"}, {"b", "c", "A", "a"}]


def test_looks_of_one_text_are_one_answer() -> None:
    rows = [row("q1", "Café"), row("q2", "cafe\u0301 "), row("q3", "CAFÉ"), row("q4", "tea")]
    assert negatives(batch_of(*rows))[:3] == [{"tea"}] * 3


def test_equal_ids_of_two_tasks_are_two_documents() -> None:
    rows = [row("q1", "p1@42", (), Task(name="a")), row("q2", "p2@42", (), Task(name="b"))]
    assert negatives(batch_of(*rows)) == [{"p2"}, {"p1"}]


def test_a_document_of_a_collection_is_the_same_in_all_tasks() -> None:
    rows = [row("q1", "p1@wiki::42", (), Task(name="a")), row("q2", "p2@wiki::42", ("p3@wiki::7",), Task(name="b"))]
    assert negatives(batch_of(*rows)) == [{"p3"}, {"p3"}]


def test_no_text_of_a_rows_class_stands_against_it() -> None:
    named = ["cat", "dog", "cow", "hen"]
    label_of = {f"{label} {n}": (label,) for label in named for n in range(8)}
    label_of |= {f"{label} and {also} {n}": (label, also) for label in named for also in ("pet", "farm") for n in "ab"}
    several = [(text, labels) for text, labels in label_of.items()]
    for given, least in ((several[:32], 1.0), (several, 0.3)):
        examples, _ = label_triples(given, task="animals", negatives=3)
        batch = batch_of(*(Row(example, Task(name="animals")) for example in examples))
        valid = stands = 0
        for i, (_, query) in enumerate(batch.queries):
            for c, (_, text) in enumerate(batch.candidates):
                if {*label_of[query]} & {*label_of[text]}:
                    assert not batch.masks.negative_QC[i, c]
                else:
                    valid += 1
                    stands += int(batch.masks.negative_QC[i, c])
        assert stands >= least * valid > 200


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


def test_a_contrast_stands_against_its_own_row_and_no_other_of_its_document() -> None:
    other = Task(name="other")
    rows = [
        row("q1", "p1@c::d1", ["n1@c::d1 contrast"]),
        row("q2", "p2@c::d1", ["n2@c::d1 contrast", "n1@c::d1 contrast"]),
        row("q3", "p3@c::d1", task=other),
        row("q4", "p4@c::d2"),
        row("q5", "p5@c::d3", ["n1"]),
        row("q5", "n2@c::d3", ["n2@c::d3 contrast"]),  # listed as an answer
    ]
    given = {"p1", "p2", "p3", "p4", "p5", "n1", "n2"}
    assert negatives(batch_of(*rows)) == [
        {"p4", "p5", "n1"},
        {"p4", "p5", "n1", "n2"},
        {"p4", "p5"},
        given - {"p4"},
        given - {"p5", "n2"},
        given - {"p5", "n2"},
    ]


def test_symmetric_tasks_have_their_instruction_on_both_sides() -> None:
    both = Task(name="sts", instruction="Retrieve similar", symmetric=True)
    one = Task(name="qa", instruction="Answer")
    batch = batch_of(row("q1", "p1", ["n1"], both), row("q2", "p1", ["n1"], one), row("q3", "p3"))
    sts, qa = "Instruct: Retrieve similar\nQuery: ", "Instruct: Answer\nQuery: "
    assert batch.queries == [(sts, "q1"), (qa, "q2"), ("", "q3")]
    assert batch.candidates == [(sts, "p1"), (sts, "n1"), ("", "p1"), ("", "n1"), ("", "p3")]
    # each stands against the other's negative, in either form, and never against the text of its positive
    assert batch.masks.negative_QC.astype(int).tolist() == [[0, 1, 0, 1, 1], [0, 1, 0, 1, 1], [1, 1, 1, 1, 0]]


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
    assert once.candidates == again.candidates and (once.masks.positive_Q == again.masks.positive_Q).all()
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
            against = {batch.candidates[c] for c in np.flatnonzero(batch.masks.negative_QC[i])}
            positive = batch.candidates[batch.masks.positive_Q[i]]
            assert {part.candidates[c] for c in np.flatnonzero(part.masks.negative_QC[k])} == against
            assert part.candidates[part.masks.positive_Q[k]] == positive
            used |= against | {positive}
        assert sorted(part.candidates) == sorted(used)


def test_a_batch_is_separable_where_no_query_needs_what_another_row_brought() -> None:
    """A text that several rows brought may serve all of them."""
    random = np.random.default_rng(2)
    outcomes = []
    for trial in range(300):
        rows = random_rows(random)[: 1 + trial % 4]
        batch = batch_of(*rows, in_batch=["none", "all"][trial % 2], hard_negatives=trial % 3, seed=trial)
        users: dict[int, set[int]] = {}
        brought: dict[int, set[int]] = {}
        for i in range(len(rows)):
            positive = int(batch.masks.positive_Q[i])
            for c in {*np.flatnonzero(batch.masks.negative_QC[i]), positive}:
                users.setdefault(int(c), set()).add(i)
            for c in {*np.flatnonzero(batch.masks.own_QC[i]), positive}:
                brought.setdefault(int(c), set()).add(i)
        assert batch.separable() == all(len(who) == 1 or who == brought[c] for c, who in users.items())
        outcomes.append((batch.separable(), all(len(who) == 1 for who in users.values())))
    counts = {outcome: outcomes.count(outcome) for outcome in set(outcomes)}
    assert counts.keys() == {(True, True), (True, False), (False, False)} and min(counts.values()) > 5


def test_the_hash_of_ids_follows_the_rows_and_their_order() -> None:
    rows = [row(f"q{i}", "p") for i in range(3)]
    batch = batch_of(*rows)
    hashes = {b.ids_hash() for b in (batch, batch.take([0, 2, 1]), batch.take([0, 1]), replace(batch, ids=["q0q1"]))}
    assert len(hashes) == 4 and batch.ids_hash() == batch_of(*rows, seed=9).ids_hash()
    assert all(len(bytes.fromhex(text)) == 8 for text in hashes)


# ---- what a stage's loss asks for beside


def with_scores(plain: Row, score: float | None = None) -> Row:
    """A teacher's scores: the number behind the first space of each text."""

    def read(passages: tuple[Passage, ...]) -> tuple[float, ...]:
        return tuple(float(p.text.split()[1]) for p in passages)

    example = plain.example
    given = {"positive_scores": read(example.positives), "negative_scores": read(example.negatives)}
    return Row(replace(example, score=score, **given), plain.task)


def test_own_negatives_are_those_of_the_row_that_stand() -> None:
    rows = [row("q1", ["p1@d1"], ["n1", "p1", "q1", "twin@d1", "p2"]), row("q2", "p2", ["n2", "n1"])]
    for in_batch in ("all", "none"):
        batch = batch_of(*rows, in_batch=in_batch)
        own = [{batch.candidates[c][1] for c in np.flatnonzero(mine)} for mine in batch.masks.own_QC]  # type: ignore[union-attr]
        assert own == [{"n1", "p2"}, {"n2", "n1"}]


def other_queries(*rows: Row, **options: Any) -> list[set[str]]:
    batch = batch_of(*rows, same_tower="queries", **options)
    assert batch.masks.queries_QQ is not None
    return [{batch.queries[j][1] for j in np.flatnonzero(against)} for against in batch.masks.queries_QQ]


def test_other_queries_stand_under_the_rules_of_candidates() -> None:
    off = Task(name="off", in_batch_negatives="none")
    a = Task(name="a", in_batch_negatives="same_task")
    rows = [row("q1", "p1"), row("q2", "p2", (), off), row("q3", "p3"), row("q4", "p4", (), a), row("q5", "p5", (), a)]
    assert other_queries(*rows) == [{"q3"}, set(), {"q1"}, {"q5"}, {"q4"}]
    assert other_queries(*rows, in_batch="none") == [set(), set(), set(), {"q5"}, {"q4"}]
    assert batch_of(*rows).masks.queries_QQ is None and batch_of(*rows, focal=1.0).masks.queries_QQ is None


def test_a_query_that_is_related_is_no_negative() -> None:
    rows = [
        row("q1", ["p1@d1", "also p1"]),
        row("q2", "also p1"),  # a positive in common, by text
        row("q3", "other words@d1"),  # by document
        row("q1", "p4", (), Task(name="t", instruction="find")),  # the same text behind an instruction
        row("also p1", "p5"),  # answers q1 and q2, which answer it
        row("q6", "q1"),  # is answered by q1, as "also p1" is
        row("q7", "p7"),
    ]
    assert other_queries(*rows) == [
        {"q7"},
        {"q1", "q3", "q6", "q7"},
        {"q1", "q2", "also p1", "q6", "q7"},
        {"q2", "q3", "q7"},
        {"q3", "q7"},
        {"q2", "q3", "q7"},
        {"q1", "q2", "q3", "also p1", "q6"},
    ]


@pytest.mark.parametrize("in_batch", ["same_task", "all"])
def test_other_queries_equal_brute_force(in_batch: str) -> None:
    random = np.random.default_rng(5)
    seen = 0
    for trial in range(200):
        rows = random_rows(random)
        batch = batch_of(*rows, in_batch=in_batch, seed=trial, same_tower="both")
        answers = [answers_of(rows, i) for i in range(len(rows))]

        assert batch.masks.queries_QQ is not None
        for i in range(len(rows)):
            for c, query in enumerate(batch.queries):
                equal = [j for j in range(len(rows)) if batch.queries[j] == query]
                related = any(a & b for j in equal for a, b in zip(answers[i], answers[j], strict=True))
                stands = c == equal[0] and not related and any(lends(rows, in_batch, i, j) for j in equal)
                assert batch.masks.queries_QQ[i, c] == stands
                seen += stands
    assert seen > 500


def test_equal_queries_of_others_count_once() -> None:
    rows = [row("q1", "p1"), row("twice", "p2", id="a"), row("twice", "p3", id="b"), row("q4", "p4")]
    batch = batch_of(*rows, same_tower="queries")
    assert batch.masks.queries_QQ is not None
    assert batch.masks.queries_QQ.astype(int).tolist() == [[0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0]]


def test_teacher_scores_are_at_the_columns_of_their_texts() -> None:
    rows = [
        with_scores(row("q1", ["p .9@d", "r .8"], ["n .1", "m .2", "o .3", "s .4@d"])),  # the last answers it
        row("q2", "p .9", ["n .1"]),
        with_scores(row("q3", "s .7", ["n .1"])),
    ]
    rows[2] = Row(replace(rows[2].example, negative_scores=None), PLAIN)
    seen = set()
    for seed in range(8):
        batch = batch_of(*rows, seed=seed, hard_negatives=3, distill={"score_weight": 1.0})
        assert batch.targets.teacher_QC is not None and np.isnan(batch.targets.teacher_QC[1:]).all()
        known = np.flatnonzero(~np.isnan(batch.targets.teacher_QC[0]))
        texts = [batch.candidates[c][1] for c in known]
        assert batch.targets.teacher_QC[0, known].tolist() == pytest.approx([float(t.split()[1]) for t in texts])
        assert {*known} == {*np.flatnonzero(batch.masks.own_QC[0]), batch.masks.positive_Q[0]} and len(known) > 2
        seen |= {*texts}
    assert seen == {"p .9", "r .8", "n .1", "m .2", "o .3"}
    assert batch_of(*rows).targets.teacher_QC is None


def test_rows_of_cosent_have_no_negatives_and_still_give() -> None:
    other = Task(name="other")
    rows = [
        with_scores(row("q0", "p 0", ["n 0"]), 4.0),
        row("q1", "p 1", ["n 1"]),
        with_scores(row("q2", "p 2", ["n 2"], other), 1.0),
        with_scores(row("q3", "p 3", ["n 3"]), 2.5),
    ]
    batch = batch_of(*rows, scored="cosent", same_tower="queries")
    assert (
        batch.targets.group_Q is not None and batch.targets.score_Q is not None and batch.masks.queries_QQ is not None
    )
    assert batch.targets.group_Q.tolist() == [0, -1, 1, 0]
    assert batch.targets.score_Q[[0, 2, 3]].tolist() == [4.0, 1.0, 2.5] and np.isnan(batch.targets.score_Q[1])
    assert {text for _, text in batch.candidates} == {"p 0", "p 1", "n 1", "p 2", "p 3"}
    assert negatives(batch) == [set(), {"p 0", "n 1", "p 2", "p 3"}, set(), set()]
    assert batch.masks.queries_QQ.sum(axis=1).tolist() == [0, 3, 0, 0]
    as_before = batch_of(*rows)
    assert as_before.targets.group_Q is None and negatives(as_before)[0] == {
        "n 0",
        *negatives(batch)[1],
        "p 1",
        "n 2",
        "n 3",
    } - {"p 0"}
    drawn = [batch_of(*rows, row("q4", ["p 4", "r 4"], ["a", "b"]), hard_negatives=1, seed=seed) for seed in range(9)]
    again = [
        batch_of(*rows, row("q4", ["p 4", "r 4"], ["a", "b"]), hard_negatives=1, seed=seed, scored="cosent")
        for seed in range(9)
    ]
    for a, b in zip(drawn, again, strict=True):  # the other rows draw what they would draw without it
        assert a.candidates[-2:] == b.candidates[-2:]


def test_a_pair_below_the_threshold_is_compared_by_cosent_and_answers_nothing() -> None:
    low = Row(Example("low", "plain", "q0", (), (Passage("n 0"),), score=1.0), PLAIN)
    rows = [low, with_scores(row("q1", "p 1"), 4.5), row("q0", "p 2", "n 2")]
    batch = batch_of(*rows, scored="cosent", distill={"score_weight": 1.0})
    assert batch.targets.group_Q is not None and batch.targets.score_Q is not None
    assert batch.candidates[batch.masks.positive_Q[0]][1] == "n 0" and batch.targets.score_Q[0] == 1.0
    assert batch.targets.group_Q.tolist() == [0, 0, -1]
    assert negatives(batch) == [set(), set(), {"n 0", "p 1", "n 2"}]  # its own question, and n 0 is no answer to it
    with pytest.raises(ValueError, match="high <= 0"):
        batch_of(*rows)  # InfoNCE has no use for it: sources leave it out


def test_queries_that_a_loss_joins_are_not_alone() -> None:
    plain = [row(f"q{i}", f"p {i}", [f"n {i}"]) for i in range(3)]
    scored = [with_scores(some, float(i)) for i, some in enumerate(plain)]
    off = {"in_batch": "none", "hard_negatives": 1}
    assert batch_of(*plain, **off, focal=1.0, mask_above=0.1).separable()
    assert not batch_of(*plain, same_tower="queries", hard_negatives=0).separable()
    assert batch_of(*plain, **off, same_tower="both").separable()  # nobody shares: there are no other queries
    assert batch_of(*scored, **off).separable() and not batch_of(*scored, **off, scored="cosent").separable()
    assert batch_of(scored[0], *plain[1:], **off, scored="cosent").separable()  # one has nothing to be ordered with
    elsewhere = Row(scored[1].example, Task(name="elsewhere"))
    assert batch_of(scored[0], elsewhere, plain[2], **off, scored="cosent").separable()
    q_only = [row("q1", "p"), row("q2", "p 2")]
    batch = batch_of(*q_only, same_tower="queries")
    none_QC = np.zeros_like(batch.masks.negative_QC)
    only_queries = replace(batch, masks=replace(batch.masks, negative_QC=none_QC))
    assert not only_queries.separable()


def test_texts_to_be_spread_out_are_those_that_differ_whatever_their_prefix() -> None:
    asked = Task(name="plain", instruction="Find it", symmetric=True)
    rows = [
        row("q1", "p 1", "n 1"),
        row("Q1 ", "p 2", "n 2", asked),  # one query in two looks, with and without instruction
        row("q3", "P 1", "p 2", asked),
        row("q4", "p 4"),
    ]
    batch = batch_of(*rows, spread_out=1.0)
    assert batch.masks.distinct is not None
    distinct_Q, distinct_C = batch.masks.distinct
    assert distinct_Q.tolist() == [True, False, True, True]
    assert {batch.candidates[c][1] for c in np.flatnonzero(distinct_C)} == {"p 1", "p 2", "p 4"}
    for some in (rows[:2], rows[::2], rows[2:]):  # one query or one positive alone has nothing to be compared with
        assert not batch_of(*some, in_batch="none", hard_negatives=0, spread_out=1.0).separable()
    assert batch_of(rows[0], spread_out=1.0).separable()


def test_take_keeps_what_the_loss_needs() -> None:
    rows = [with_scores(row(f"q{i}", f"p {i}", [f"n {i}", f"m {i}"]), float(i) if i % 2 else None) for i in range(6)]
    batch = batch_of(*rows, same_tower="both", scored="cosent", spread_out=1.0, distill={"score_weight": 1.0})
    chosen = [4, 1, 2]
    part = batch.take(chosen)
    columns = [batch.candidates.index(c) for c in part.candidates]
    both = np.ix_(chosen, columns)
    np.testing.assert_array_equal(part.masks.own_QC, batch.masks.own_QC[both])
    np.testing.assert_array_equal(part.targets.teacher_QC, batch.targets.teacher_QC[both])  # type: ignore[index,arg-type]
    np.testing.assert_array_equal(part.masks.queries_QQ, batch.masks.queries_QQ[np.ix_(chosen, chosen)])  # type: ignore[index]
    for ours, whole, places in zip(part.masks.distinct, batch.masks.distinct, (chosen, columns), strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(ours, whole[places])
    for name in ("group_Q", "score_Q"):
        np.testing.assert_array_equal(getattr(part.targets, name), getattr(batch.targets, name)[chosen])
    bare = batch_of(*rows).take(chosen)
    assert bare.masks.queries_QQ is bare.masks.distinct is None and bare.targets == Targets()
