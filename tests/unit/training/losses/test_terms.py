from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from embedwright.data.schema import Example, Passage, Task
from embedwright.text import Contract
from embedwright.training.batches.blend import Row
from embedwright.training.batches.make import make_batch
from embedwright.training.losses.terms import (
    cosent,
    cosines,
    cut,
    info_nce,
    projected,
    score_distillation,
    spread_out,
    vector_distance,
    vector_distillation,
)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def raw(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64 vectors of any length that need a gradient, for losses that normalise by themselves."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def reference(q: np.ndarray, c: np.ndarray, positive: np.ndarray, allowed: np.ndarray, temperature: float) -> float:
    losses = []
    for i in range(len(q)):
        score = [float(np.dot(q[i], c[j])) / temperature for j in range(len(c))]
        rivals = [score[j] for j in range(len(c)) if allowed[i, j] and j != positive[i]]
        losses.append(math.log(sum(math.exp(s - score[positive[i]]) for s in rivals) + 1.0))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0])
def test_equals_the_reference(temperature: float) -> None:
    random = np.random.default_rng(0)
    for trial in range(30):
        queries, candidates = random.integers(1, 9), random.integers(1, 20)
        q, c = (unit(int(n), 12, seed=trial + k, dtype=torch.float64) for k, n in ((0, queries), (99, candidates)))
        positive, allowed = random.integers(0, candidates, queries), random.random((queries, candidates)) < 0.6
        loss = info_nce(q, c, torch.from_numpy(positive), torch.from_numpy(allowed), temperature)
        assert loss.item() == pytest.approx(reference(q.numpy(), c.numpy(), positive, allowed, temperature), rel=1e-9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    q, c = unit(4, 6, dtype=torch.float64), unit(7, 6, seed=1, dtype=torch.float64)
    positive, allowed = torch.tensor([0, 3, 3, 6]), torch.rand(4, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    args = (q.requires_grad_(), c.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, positive, allowed, 0.05), args)


def test_a_query_with_no_candidate_gives_nothing() -> None:
    q, c = unit(3, 8).requires_grad_(), unit(3, 8, seed=1).requires_grad_()
    allowed = torch.zeros(3, 3, dtype=torch.bool)
    loss = info_nce(q, c, torch.arange(3), allowed, 0.02)
    loss.backward()
    assert loss.item() == 0 and not q.grad.any() and not c.grad.any()  # type: ignore[union-attr]
    allowed[1, 0] = True
    loss = info_nce(q, c, torch.arange(3), allowed, 1.0)
    loss.backward()
    assert loss.item() > 0 and q.grad[1].any() and not q.grad[[0, 2]].any()  # type: ignore[index]


def test_a_small_temperature_overflows_nothing() -> None:
    q = unit(2, 8).requires_grad_()
    loss = info_nce(q, -q.detach(), torch.arange(2), torch.ones(2, 2, dtype=torch.bool), 1e-4)
    loss.backward()
    assert math.isfinite(loss.item()) and loss.item() > 1e3 and torch.isfinite(q.grad).all()  # type: ignore[arg-type]


def test_autocast_leaves_the_scores_in_float32() -> None:
    """At temperature 0.02 a bf16 cosine is off by up to 0.2 in the score."""
    q, c, positive = unit(16, 64), unit(40, 64, seed=1), torch.arange(16)
    allowed = torch.ones(16, 40, dtype=torch.bool)
    plain = info_nce(q, c, positive, allowed, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(q, c, positive, allowed, 0.02).item() == plain.item()


def test_equals_sentence_transformers_on_a_retrieval_batch() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    n, temperature = 12, 0.02
    examples = [Example(f"{i}", "t", f"q{i}", (Passage(f"p{i}"),), (Passage(f"n{i}"),)) for i in range(n)]
    rows = [Row(example, Task(name="t")) for example in examples]
    random = np.random.default_rng(0)
    batch = make_batch(rows, Contract(eos_id=1), hard_negatives=1, in_batch="all", rng=random)
    table = {text: k for k, (_, text) in enumerate([*batch.queries, *batch.candidates])}

    def embedded() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        near = torch.randn(n, 1, 24, generator=generator, dtype=torch.float64)  # query, positive, negative resemble
        noise = torch.randn(n, 3, 24, generator=generator, dtype=torch.float64)
        flat = (near + noise).flatten(0, 1)
        order = [table[f"{kind}{i}"] for i in range(n) for kind in "qpn"]
        return torch.empty_like(flat).index_copy(0, torch.tensor(order), flat).requires_grad_()

    ours = embedded()
    q_QE, c_CE = F.normalize(ours, dim=-1).split([len(batch.queries), len(batch.candidates)])
    positive, allowed = torch.from_numpy(batch.masks.positive_Q), torch.from_numpy(batch.masks.negative_QC)
    loss = info_nce(q_QE, c_CE, positive, allowed, temperature)
    loss.backward()

    theirs = embedded()
    columns = [theirs[[table[f"{kind}{i}"] for i in range(n)]] for kind in "qpn"]
    stock = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / temperature)
    expected = stock.compute_loss_from_embeddings(columns, torch.empty(0))
    expected.backward()
    assert loss.item() > 0.1
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)


# ---- what a stage may add to InfoNCE, against loops over single pairs


def pairs(seed: int = 0, queries: int = 6, candidates: int = 9) -> tuple[torch.Tensor, ...]:
    """Vectors that need a gradient, positives, and three random masks: of candidates, of queries, of documents."""
    q = unit(queries, 5, seed=seed, dtype=torch.float64).requires_grad_()
    c = unit(candidates, 5, seed=seed + 1, dtype=torch.float64).requires_grad_()
    random = np.random.default_rng(seed)
    positive = random.integers(0, candidates, queries)
    masks = [random.random((queries, n)) < 0.6 for n in (candidates, queries, candidates)]
    return q, c, torch.from_numpy(positive), *(torch.from_numpy(mask) for mask in masks)


def test_masks_weights_and_same_tower_equal_a_loop_over_pairs() -> None:
    temperature, above, hardness, focal = 0.3, 0.2, 3.0, 1.5
    left_out = 0
    for seed in range(20):
        q, c, positive, allowed, queries, documents = pairs(seed)
        hard = torch.rand(6, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
        loss = info_nce(
            q,
            c,
            positive,
            allowed,
            temperature,
            queries_QQ=queries,
            documents_QC=documents,
            mask_above=above,
            hardness=hardness,
            hard_QC=hard,
            focal=focal,
        )
        ours = torch.autograd.grad(loss, (q, c))
        losses = []
        for i in range(6):
            p = int(positive[i])
            good = q[i] @ c[p]
            terms = [torch.exp(good / temperature)]
            for j in range(9):
                if allowed[i, j] and j != p:
                    weight = math.exp(hardness * (q[i] @ c[j]).item()) if hard[i, j] else 1.0
                    terms += [weight * torch.exp(q[i] @ c[j] / temperature)] if q[i] @ c[j] <= good + above else []
                    left_out += int(q[i] @ c[j] > good + above)
                if documents[i, j] and c[p] @ c[j] <= good + above:
                    terms.append(torch.exp(c[p] @ c[j] / temperature))
            for j in range(6):
                if queries[i, j] and q[i] @ q[j] <= good + above:
                    terms.append(torch.exp(q[i] @ q[j] / temperature))
            share = terms[0] / torch.stack(terms).sum()
            losses.append(-torch.log(share) * (1 - share.item()) ** focal)
        expected = torch.stack(losses).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        for a, b in zip(ours, torch.autograd.grad(expected, (q, c)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert left_out > 50


def test_a_threshold_that_nothing_passes_and_one_that_all_pass() -> None:
    q, c, positive, allowed, _, _ = pairs()
    plain = info_nce(q, c, positive, allowed, 0.1)
    assert info_nce(q, c, positive, allowed, 0.1, mask_above=2.0) == plain
    assert info_nce(q, c, positive, allowed, 0.1, mask_above=-2.0) == 0
    at_the_positive = torch.zeros_like(allowed)
    at_the_positive[torch.arange(6), positive] = True  # the positive is no negative, whatever a mask says
    assert info_nce(q, c, positive, at_the_positive, 0.1, hardness=5.0, hard_QC=at_the_positive) == 0


def test_focal_weights_leave_a_finite_gradient_where_the_loss_is_zero() -> None:
    q = unit(3, 8).requires_grad_()
    c = torch.cat([q.detach(), -q.detach()])
    loss = info_nce(q, c, torch.arange(3), torch.ones(3, 6, dtype=torch.bool), 1e-3, focal=0.5)
    loss.backward()
    assert loss.item() < 1e-6 and torch.isfinite(q.grad).all()  # type: ignore[arg-type]


# ---- CoSENT


@pytest.mark.parametrize("temperature", [0.05, 0.02])
def test_cosent_equals_sentence_transformers(temperature: float) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    stock = losses.CoSENTLoss(torch.nn.Identity(), scale=1 / temperature)
    for seed, scores in ((0, [5, 1, 3, 3, 0.5]), (1, [2, 2, 2]), (2, [4]), (3, [0, 1, 2, 3, 4, 4, 1])):
        q, d = (raw(len(scores), 6, seed=seed + k) for k in (0, 50))
        score = torch.tensor(scores, dtype=torch.float64)
        loss = cosent(F.normalize(q, dim=1), F.normalize(d, dim=1), score, temperature)
        expected = stock.compute_loss_from_embeddings([q, d], score)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        ours, theirs = (torch.autograd.grad(value, (q, d)) for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        assert (loss.item() == 0) == (len(set(scores)) == 1)


# ---- spread out


def test_spread_out_is_the_mean_over_pairs_and_the_regulariser_of_sentence_transformers() -> None:
    """Which takes 1/E from the mean, as a margin; EmbeddingGemma's has none, says its own documentation."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    stock = losses.GlobalOrthogonalRegularizationLoss(torch.nn.Identity(), mean_weight=None, aggregation="sum")
    leaves = [raw(n, 6, seed=n) for n in (5, 3)]
    ours = sum((spread_out(F.normalize(leaf, dim=1)) for leaf in leaves), torch.zeros(()))
    by_hand = 0.0
    for leaf in leaves:
        unit_NE, n = F.normalize(leaf.detach(), dim=1), len(leaf)
        pairs = [float(unit_NE[i] @ unit_NE[j]) ** 2 for i in range(n) for j in range(n) if i != j]
        by_hand += sum(pairs) / (n * (n - 1))
    assert ours.item() == pytest.approx(by_hand)
    expected = stock.compute_loss_from_embeddings([F.normalize(leaf, dim=1) for leaf in leaves])["gor_second_moment"]
    assert expected > 0.01  # the margin is passed in both columns, and then the gradients are equal
    torch.testing.assert_close(ours, expected + 2 / 6, rtol=1e-9, atol=1e-12)
    mine, theirs = (torch.autograd.grad(value, leaves) for value in (ours, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    alone = raw(1, 6)
    spread_out(F.normalize(alone, dim=1)).backward()
    assert spread_out(alone) == 0 and alone.grad is not None and not alone.grad.any()


# ---- distillation


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.05, 0.05), (0.02, 0.1)])
def test_score_distillation_equals_sentence_transformers(temperature: float, teacher_temperature: float) -> None:
    """Which has every query's candidates as columns, and a factor temperature ** 2."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, ways = 5, 4
    q = unit(queries, 7, dtype=torch.float64).requires_grad_()
    c = unit(queries * ways, 7, seed=1, dtype=torch.float64).requires_grad_()
    scores = torch.rand(queries, ways, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    teacher = torch.full((queries, queries * ways), math.nan, dtype=torch.float64)
    for i in range(queries):
        teacher[i, i * ways : (i + 1) * ways] = scores[i]
    loss = score_distillation(q, c, teacher, temperature, teacher_temperature)
    stock = losses.DistillKLDivLoss(
        torch.nn.Identity(), student_temperature=temperature, teacher_temperature=teacher_temperature
    )
    expected = stock.compute_loss_from_embeddings([q, *c.view(queries, ways, -1).unbind(1)], scores)
    expected = expected / temperature**2
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, (q, c)) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_rows_without_scores_give_nothing_to_distillation() -> None:
    q = unit(4, 6, dtype=torch.float64).requires_grad_()
    c = unit(8, 6, seed=1, dtype=torch.float64).requires_grad_()
    teacher = torch.full((4, 8), math.nan, dtype=torch.float64)
    teacher[1, [0, 3, 5]] = torch.tensor([0.9, 0.2, -30.0], dtype=torch.float64)  # the last has a share of exactly 0
    teacher[2, 6] = 0.7  # one candidate: nothing to compare
    loss = score_distillation(q, c, teacher, 0.1, 0.01)
    alone = score_distillation(q[1:2], c[[0, 3, 5]], teacher[1:2, [0, 3, 5]], 0.1, 0.01)
    torch.testing.assert_close(loss, alone / 4)
    assert loss > 0
    loss.backward()
    assert q.grad is not None and q.grad[1].any() and not q.grad[[0, 2, 3]].any()
    assert c.grad is not None and not c.grad[[1, 2, 4, 6, 7]].any()
    empty = score_distillation(q, c, torch.full((4, 8), math.nan, dtype=torch.float64), 0.1, 0.1)
    assert empty == 0


def test_vector_distillation_equals_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    leaves = [raw(6, 10, seed=k) for k in range(4)]
    columns = [F.normalize(leaf, dim=1) for leaf in leaves]
    teacher = [unit(6, 10, seed=9 + k, dtype=torch.float64) for k in range(4)]
    q, c = columns[0], torch.cat(columns[1:])
    own = torch.eye(6, dtype=torch.bool).repeat(1, 3)
    distance_Q = vector_distance(q, 3 * teacher[0])  # their length does not count
    distance_C = vector_distance(c, torch.cat(teacher[1:]))
    loss = vector_distillation(distance_Q, distance_C, own)
    expected = losses.EmbedDistillLoss(torch.nn.Identity(), "cosine").compute_loss_from_embeddings(columns, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_query_counts_once_however_many_texts_it_has() -> None:
    own = torch.tensor([[True, True, True], [False, False, True]])
    loss = vector_distillation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0, 7.0]), own)
    assert loss.item() == pytest.approx(((1 + 3 + 5 + 7) / 4 + (2 + 7) / 2) / 2)


# ---- all of them


def test_cut_vectors_are_unit_vectors_of_the_first_numbers() -> None:
    stock = pytest.importorskip("sentence_transformers.sentence_transformer.losses.matryoshka")
    vectors = unit(5, 16)
    assert torch.equal(cut(vectors, 6), stock.shrink(vectors, 6))
    torch.testing.assert_close(cut(vectors, 6).norm(dim=1), torch.ones(5))
    assert torch.equal(cut(vectors, 1).sign(), vectors[:, :1].sign())


def test_autocast_leaves_every_loss_in_float32() -> None:
    q, c = unit(8, 32), unit(20, 32, seed=1)
    own = torch.rand(8, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    teacher = torch.where(own, q @ c.T, math.nan)
    scores = torch.arange(8.0) // 2
    others = ~torch.eye(8, dtype=torch.bool)
    calls = [
        lambda: info_nce(q, c, torch.arange(8), own, 0.02, queries_QQ=others, documents_QC=own, mask_above=0.1),
        lambda: info_nce(q, c, torch.arange(8), own, 0.02, hardness=5.0, hard_QC=own, focal=0.5),
        lambda: cosent(q, c[:8], scores, 0.02),
        lambda: spread_out(q),
        lambda: score_distillation(q, c, teacher, 0.02, 0.1),
        lambda: vector_distance(cut(q, 7), cut(c[:8], 7)).sum(),
        lambda: vector_distillation(q[:, 0], c[:, 0], own),
        lambda: cosines(3 * q, c).sum(),
        lambda: projected(q, 3 * c).sum(),
    ]
    for call in calls:
        plain = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert call().item() == plain.item() and call().dtype == torch.float32
