from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedwright.config import ConfigError
from embedwright.data.schema import Example, Passage, Task
from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE
from embedwright.text import Contract
from embedwright.training.batches.batch import Batch
from embedwright.training.batches.blend import Row
from embedwright.training.batches.feed import local_batch
from embedwright.training.batches.make import make_batch
from embedwright.training.engine.parallel import replicate
from embedwright.training.engine.step import accumulate
from embedwright.training.losses import total as losses
from embedwright.training.losses.total import check_widths
from embedwright.training.parts import OptimPart
from embedwright.training.stages import ContrastiveStage, DataPart, LossPart

E = 16
EVERYTHING: dict[str, Any] = {
    "mask_above": 0.1,
    "hardness": 5.0,
    "focal": 0.5,
    "same_tower": "both",
    "spread_out": 3.0,
    "dims": [8, 4],
    "scored": "cosent",
    "distill": {
        "score_weight": 0.5,
        "temperature": 0.1,
        "vector_weight": 2.0,
        "similarity_weight": 1.5,
        "teacher": ["t", "u"],
    },
}


def stage(loss: dict[str, Any] | None = None, **change: Any) -> ContrastiveStage:
    content: dict[str, Any] = {"name": "s", "data": [DataPart(path="x")], "in_batch_negatives": "all"}
    content |= {"hard_negatives": 3, "temperature": 0.05, "loss": loss or {}}
    return ContrastiveStage(**content | {"optim": OptimPart(lr=1e-3, steps=1, batch_queries=1)} | change)


def rows(n: int, kinds: str = "qpn") -> list[Row]:
    """Query, positive and negatives of row i are the texts q.i, p.i, n.i, m.i ..."""
    made = []
    for i in range(n):
        negatives = tuple(Passage(f"{kind}.{i}") for kind in kinds[2:])
        made.append(Row(Example(f"{i}", "t", f"q.{i}", (Passage(f"p.{i}"),), negatives), Task(name="t")))
    return made


def batch_of(some: Sequence[Row], asked: ContrastiveStage, loss: LossPart | None = None) -> Batch:
    return make_batch(
        some,
        Contract(eos_id=1),
        hard_negatives=asked.hard_negatives,
        in_batch=asked.in_batch_negatives,
        rng=np.random.default_rng(0),
        loss=loss or asked.loss,
    )


def batch_loss(
    q_QE: Tensor,
    c_CE: Tensor,
    batch: Batch,
    asked: ContrastiveStage,
    total: int,
    *,
    teacher_QE: Tensor | None = None,
    teacher_CE: Tensor | None = None,
    projection_TE: Tensor | None = None,
) -> Tensor:
    teacher = None if teacher_QE is None or teacher_CE is None else (teacher_QE, teacher_CE)
    return losses.batch_loss(
        q_QE, c_CE, batch.masks, batch.targets, asked, total=total, teacher=teacher, projection_TE=projection_TE
    )


def raw(n: int, kinds: str = "qpn", seed: int = 0, width: int = E) -> Tensor:
    """A leaf (n, kinds, width); the texts of a row resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(n, 1, width, generator=generator)
    return (near + torch.randn(n, len(kinds), width, generator=generator)).requires_grad_()


def vectors(leaf: Tensor, batch: Batch, kinds: str = "qpn") -> tuple[Tensor, Tensor]:
    unit = F.normalize(leaf, dim=-1)

    def of(texts: list[tuple[str, str]]) -> Tensor:
        places = [text.split(".") for _, text in texts]
        return unit[[int(i) for _, i in places], [kinds.index(kind) for kind, _ in places]]

    return of(batch.queries), of(batch.candidates)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, leaf, retain_graph=True)
    return found


@pytest.fixture(scope="module")
def stock() -> ModuleType:
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")  # type: ignore[no-any-return]


class Ready(nn.Module):
    """A model of sentence-transformers whose texts are their vectors."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return E


# ---- nothing chosen


def test_nothing_chosen_is_the_plain_loss_bit_for_bit() -> None:
    asked = stage()
    for n, total in ((1, 1), (7, 7), (12, 64)):
        batch, leaf = batch_of(rows(n), asked), raw(n)
        q_QE, c_CE = vectors(leaf, batch)
        loss = batch_loss(q_QE, c_CE, batch, asked, total)
        positive_Q = torch.from_numpy(batch.masks.positive_Q)
        stands_QC = torch.from_numpy(batch.masks.negative_QC).scatter(1, positive_Q[:, None], True)
        scores_QC = (q_QE @ c_CE.T / 0.05).masked_fill(~stands_QC, float("-inf"))
        plain = n / total * F.cross_entropy(scores_QC, positive_Q)
        assert torch.equal(loss, plain) and torch.equal(gradient(loss, leaf), gradient(plain, leaf))


# ---- against sentence-transformers


@pytest.mark.parametrize(
    ("loss", "theirs"),
    [
        ({"same_tower": "queries"}, {"directions": ("query_to_doc", "query_to_query")}),
        ({"same_tower": "both"}, {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")}),
        ({"hardness": 5.0}, {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
    ],
)
def test_equals_the_ranking_loss(stock: ModuleType, loss: dict[str, Any], theirs: dict[str, Any]) -> None:
    asked, kinds = stage(loss), "qpnm"
    batch, leaf = batch_of(rows(9, kinds), asked), raw(9, kinds)
    ours = batch_loss(*vectors(leaf, batch, kinds), batch, asked, 9)
    ranking = stock.MultipleNegativesRankingLoss(nn.Identity(), scale=20.0, **theirs)
    expected = ranking.compute_loss_from_embeddings(list(leaf.unbind(1)), torch.empty(0))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)
    plain = batch_loss(*vectors(leaf, batch, kinds), batch, stage(), 9)
    assert abs(ours.item() - plain.item()) > 0.01


@pytest.mark.parametrize(("same_tower", "kinds"), [("none", "qpn"), ("queries", "qpn"), ("both", "qp")])
def test_masking_equals_a_guide_that_is_the_model_itself(stock: ModuleType, same_tower: str, kinds: str) -> None:
    asked = stage({"mask_above": 0.1, "same_tower": same_tower})
    batch, leaf = batch_of(rows(12, kinds), asked), raw(12, kinds)
    ours = batch_loss(*vectors(leaf, batch, kinds), batch, asked, 12)
    guided = stock.GISTEmbedLoss.__new__(stock.GISTEmbedLoss)  # its own constructor wants two models with tokenizers
    nn.Module.__init__(guided)
    guided.model = guided.guide = Ready()
    guided.similarity_fct, guided.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    guided.temperature, guided.margin_strategy, guided.margin = 0.05, "absolute", -0.1
    guided.must_retokenize = guided.gather_across_devices = False
    guided.contrast_anchors, guided.contrast_positives = same_tower != "none", same_tower == "both"
    expected = guided([{"vectors": column} for column in leaf.unbind(1)], torch.empty(0))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)
    open_to_all = batch_loss(*vectors(leaf, batch, kinds), batch, stage({"same_tower": same_tower}), 12)
    assert ours.item() < open_to_all.item() - 0.01


def test_dims_equal_the_matryoshka_loss(stock: ModuleType) -> None:
    asked = stage({"dims": [4, 8]})
    batch, leaf = batch_of(rows(9), asked), raw(9)
    ours = batch_loss(*vectors(leaf, batch), batch, asked, 9)
    model: Any = Ready()
    ranking = stock.MultipleNegativesRankingLoss(model, scale=20.0)
    nested = stock.MatryoshkaLoss(model, ranking, [E, 4, 8])
    expected = nested([{"vectors": column} for column in leaf.unbind(1)], torch.empty(0)) / 3
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)


def test_distillation_equals_theirs_beside_the_contrastive_loss(stock: ModuleType) -> None:
    wanted = {"score_weight": 0.7, "temperature": 0.2, "vector_weight": 3.0, "teacher": "t"}
    asked, kinds = stage({"distill": wanted}), "qpnm"
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    some = [
        Row(replace(row.example, positive_scores=(s[0],), negative_scores=tuple(s[1:])), row.task)
        for row, s in zip(rows(6, kinds), scores.tolist(), strict=True)
    ]
    batch, leaf, teacher = batch_of(some, asked), raw(6, kinds), raw(6, kinds, seed=5).detach()
    teacher_QE, teacher_CE = vectors(teacher, batch, kinds)
    ours = batch_loss(*vectors(leaf, batch, kinds), batch, asked, 6, teacher_QE=teacher_QE, teacher_CE=teacher_CE)
    unit = list(F.normalize(leaf, dim=-1).unbind(1))
    expected = batch_loss(*vectors(leaf, batch, kinds), batch, stage(), 6)
    kl = stock.DistillKLDivLoss(nn.Identity(), student_temperature=0.05, teacher_temperature=0.2)
    expected = expected + 0.7 * kl.compute_loss_from_embeddings(unit, scores) / 0.05**2
    targets = list(F.normalize(teacher, dim=-1).unbind(1))
    expected = expected + 3.0 * stock.EmbedDistillLoss(nn.Identity(), "cosine").compute_loss_from_embeddings(
        unit, targets
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_similarities_of_a_query_and_all_candidates_follow_the_teachers(temperature: float | None) -> None:
    wanted = {"similarity_weight": 0.7, "temperature": temperature, "teacher": "t"}
    asked, kinds = stage({"distill": wanted, "dims": [8]}), "qpn"
    batch, leaf, teacher = batch_of(rows(6), asked), raw(6, kinds), 3 * raw(6, kinds, seed=5, width=24).detach()
    teacher_QE, teacher_CE = vectors(teacher, batch, kinds)
    ours = batch_loss(*vectors(leaf, batch, kinds), batch, asked, 6, teacher_QE=teacher_QE, teacher_CE=teacher_CE)

    cosine = nn.CosineSimilarity(dim=-1)
    texts = [(row, kind) for row in range(6) for kind in (1, 2)]  # all positives and negatives of the batch
    terms = []
    for query in range(6):
        theirs = torch.stack([cosine(teacher[query, 0], teacher[text]) for text in texts]) / (temperature or 0.05)
        for width in (E, 8):
            own = torch.stack([cosine(leaf[query, 0, :width], leaf[text][:width]) for text in texts]) / 0.05
            terms.append(F.kl_div(own.log_softmax(0), theirs.softmax(0), reduction="sum"))
    expected = batch_loss(*vectors(leaf, batch, kinds), batch, stage({"dims": [8]}), 6)
    expected = expected + 0.7 * torch.stack(terms).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)


def test_a_teacher_of_another_width_is_followed_through_the_projection() -> None:
    asked, kinds = stage({"distill": {"vector_weight": 3.0, "teacher": "t"}}), "qpn"
    batch, leaf, teacher = batch_of(rows(6), asked), raw(6, kinds), raw(6, kinds, seed=5, width=24).detach()
    teacher_QE, teacher_CE = vectors(teacher, batch, kinds)
    projection = torch.randn(24, E, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours = batch_loss(
        *vectors(leaf, batch), batch, asked, 6, teacher_QE=teacher_QE, teacher_CE=teacher_CE, projection_TE=projection
    )
    distances = 1 - nn.CosineSimilarity(dim=-1)(leaf @ projection.T, teacher)  # (6, kinds): all are a row's own
    expected = batch_loss(*vectors(leaf, batch), batch, stage(), 6) + 3.0 * distances.mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for trained in (leaf, projection):
        torch.testing.assert_close(gradient(ours, trained), gradient(expected, trained), rtol=1e-4, atol=1e-6)


def test_scored_rows_go_to_cosent_by_task_and_the_others_to_info_nce(stock: ModuleType) -> None:
    asked = stage({"scored": "cosent"})
    plain, off = Task(name="plain"), Task(name="off", in_batch_negatives="none")
    tasks, scores = [plain, off, off, plain, plain, off, off], [None, 1.0, 4.5, None, 2.0, 3.0, 3.0]
    some = [
        Row(replace(row.example, task=task.name, score=score), task)
        for row, task, score in zip(rows(7), tasks, scores, strict=True)
    ]
    batch, leaf = batch_of(some, asked), raw(7)
    ours = batch_loss(*vectors(leaf, batch), batch, asked, 7)
    unit, together = F.normalize(leaf, dim=-1), [1, 2, 5, 6]
    pairs = [unit[together, 0], unit[together, 1]]
    ordered = stock.CoSENTLoss(nn.Identity(), scale=20.0).compute_loss_from_embeddings(
        pairs, torch.tensor([1.0, 4.5, 3.0, 3.0])
    )
    rivals = {0: [(0, 2), (3, 1), (3, 2), (4, 1)], 3: [(3, 2), (0, 1), (0, 2), (4, 1)]}  # row 4 still gives its text
    contrastive = []
    for i, others in rivals.items():
        against = torch.stack([unit[i, 1], *(unit[row, kind] for row, kind in others)])
        contrastive.append(-(unit[i, 0] @ against.T / 0.05).log_softmax(0)[0])
    expected = (4 * ordered + contrastive[0] + contrastive[1]) / 7  # row 4, alone in its task, has nothing to order
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)
    as_before = batch_loss(*vectors(leaf, batch_of(some, stage())), batch_of(some, stage()), stage(), 7)
    assert as_before.item() != ours.item()


def test_spread_out_adds_the_mean_of_different_queries_and_that_of_different_positives() -> None:
    """Against a loop; rows 2 and 3 ask and answer what row 0 does, and no hard negative counts."""
    asked = stage({"spread_out": 3.0, "dims": [8]}, in_batch_negatives="none")
    some = rows(6)
    for i in (2, 3):
        some[i] = Row(replace(some[i].example, query="q.0", positives=some[0].example.positives), some[0].task)
    batch, plain = batch_of(some, asked), batch_of(some, stage({"dims": [8]}, in_batch_negatives="none"))
    assert not batch.separable() and plain.masks.distinct is None
    leaf, kept, widths = raw(6), [0, 1, 4, 5], []
    for width in (E, 8):
        unit = F.normalize(F.normalize(leaf, dim=-1)[..., :width], dim=-1)
        sums = [(unit[i, k] @ unit[j, k]) ** 2 for k in (0, 1) for i in kept for j in kept if i != j]
        widths.append(torch.stack(sums).sum() / (4 * 3))
    own = vectors(leaf, batch)
    ours = batch_loss(*own, batch, asked, 6)
    expected = batch_loss(*own, plain, stage({"dims": [8]}), 6) + 3.0 * (widths[0] + widths[1]) / 2
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(ours, leaf), gradient(expected, leaf), rtol=1e-4, atol=1e-6)


# ---- parts and micro-batches


def scored_rows(kinds: str = "qpnm") -> list[Row]:
    """Rows with scores of a teacher; every third is a scored pair."""
    random = np.random.default_rng(0)
    made = []
    for i, row in enumerate(rows(9, kinds)):
        a, b = random.random(1).tolist(), random.random(len(kinds) - 2).tolist()
        example = replace(row.example, positive_scores=tuple(a), negative_scores=tuple(b))
        made.append(Row(replace(example, score=float(i % 4)) if i % 3 == 0 else example, row.task))
    return made


ALONE_TOO = {key: EVERYTHING[key] for key in ("mask_above", "hardness", "focal", "dims")}
ALONE_TOO["distill"] = {"score_weight": 0.5, "temperature": 0.1, "vector_weight": 2.0, "teacher": "t"}


@pytest.mark.parametrize("width", [E, 24, 7])
def test_parts_of_a_batch_that_shares_nothing_add_up(width: int) -> None:
    """With a teacher of the model's width, and of others."""
    asked, kinds = stage(ALONE_TOO, in_batch_negatives="none"), "qpnm"
    batch, leaf, teacher = batch_of(scored_rows(), asked), raw(9, kinds), raw(9, kinds, seed=5, width=width).detach()
    projection = None if width == E else torch.eye(width, E).requires_grad_()

    def loss_of(part: Batch) -> Tensor:
        teacher_QE, teacher_CE = vectors(teacher, part, kinds)
        own = vectors(leaf, part, kinds)
        return batch_loss(*own, part, asked, 9, teacher_QE=teacher_QE, teacher_CE=teacher_CE, projection_TE=projection)

    assert batch.separable()
    whole = loss_of(batch)
    parts = sum((loss_of(batch.take(some)) for some in ([4, 0], [1, 2, 3, 8], [5], [7, 6])), torch.zeros(()))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for trained in (leaf, *([] if projection is None else [projection])):
        torch.testing.assert_close(gradient(parts, trained), gradient(whole, trained), rtol=1e-4, atol=1e-6)


def test_every_key_of_the_loss_is_tried_here() -> None:
    assert EVERYTHING.keys() == LossPart.model_fields.keys()


@pytest.mark.parametrize("chosen", ["alone", "joined", *EVERYTHING])
def test_a_budget_of_tokens_changes_no_gradient(tiny_decoder: Callable[..., Path], chosen: str) -> None:
    """Through the step: one forward against many, with a teacher of another width. Each key also by itself."""
    keys = {"alone": ALONE_TOO, "joined": EVERYTHING}.get(chosen, {chosen: EVERYTHING.get(chosen)})
    asked = stage(keys, in_batch_negatives="all" if chosen == "joined" else "none")
    model = Embedder.from_decoder(tiny_decoder("qwen3"), pooling="mean")
    model.network.train()
    batch = batch_of(scored_rows(), asked)
    if chosen in ("alone", "joined"):
        assert batch.separable() == (chosen == "alone")
    projection = nn.Parameter(torch.randn(24, model.embedding_dim, generator=torch.Generator().manual_seed(0)))

    def teach(texts: Sequence[tuple[str, str]]) -> Tensor:
        seeds = [int.from_bytes("".join(text).encode()) % 2**32 for text in texts]
        return torch.stack([torch.randn(24, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    found = []
    for budget in (10_000, 30):
        local = local_batch(batch, model.text_tokenizer, model.contract, ALONE, teach)
        replica = replace(replicate(ALONE, model.network), projection=projection)
        value, _ = accumulate(replica, local, asked, batch_tokens=budget, seed=0)
        gradients = [p.grad for p in (*model.network.parameters(), projection) if p.grad is not None]
        assert (projection.grad is not None and bool(projection.grad.any())) == ("distill" in keys)
        found.append((value, torch.cat([g.flatten() for g in gradients])))
        model.network.zero_grad(set_to_none=True)
        projection.grad = None
    (whole, expected), (split, ours) = found
    assert split == pytest.approx(whole, rel=1e-5)
    assert (ours - expected).norm() < 2e-5 * expected.norm()


# ---- what is refused


def test_a_batch_made_without_the_loss_is_refused() -> None:
    leaf = raw(4)
    needing = ({"same_tower": "queries"}, {"scored": "cosent"}, {"distill": {"score_weight": 1.0}}, {"spread_out": 1.0})
    for loss in needing:
        asked = stage(loss)
        batch = batch_of(rows(4), asked, LossPart())
        with pytest.raises(ValueError, match="make_batch needs the stage's loss"):
            batch_loss(*vectors(leaf, batch), batch, asked, 4)


def test_missing_vectors_and_widths_that_are_too_large_are_named() -> None:
    asked = stage({"distill": {"vector_weight": 1.0, "teacher": "big"}})
    batch = batch_of(rows(4), asked)
    own = vectors(raw(4), batch)
    with pytest.raises(ValueError, match=r"stages\.s\.loss\.distill: vectors of big are missing"):
        batch_loss(*own, batch, asked, 4)
    for dim in (E, E + 1):
        with pytest.raises(ConfigError, match=rf"stages\.s\.loss\.dims: {dim} is not below the model's 16"):
            check_widths(stage({"dims": [4, dim]}), E)
    check_widths(stage({"dims": [E - 1]}), E)


def test_autocast_changes_nothing() -> None:
    asked, kinds = stage(EVERYTHING), "qpnm"
    batch, leaf, teacher = batch_of(scored_rows(), asked), raw(9, kinds), raw(9, kinds, seed=5).detach()
    teacher_QE, teacher_CE = vectors(teacher, batch, kinds)

    def value() -> Tensor:
        return batch_loss(*vectors(leaf, batch, kinds), batch, asked, 9, teacher_QE=teacher_QE, teacher_CE=teacher_CE)

    plain = value()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = value()
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)
    assert torch.equal(gradient(plain, leaf), gradient(mixed, leaf))
