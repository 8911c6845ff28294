from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from embedwright.data.schema import Example, Passage, Task
from embedwright.model.embedder import Embedder
from embedwright.model.pooling import Kind
from embedwright.packing import PackedTexts
from embedwright.processes import ALONE
from embedwright.training.batches.batch import Batch
from embedwright.training.batches.blend import Row
from embedwright.training.batches.feed import LocalBatch, local_batch
from embedwright.training.batches.make import make_batch
from embedwright.training.engine.optim import learning_rate, make_optimizer, update
from embedwright.training.engine.parallel import replicate
from embedwright.training.engine.step import accumulate
from embedwright.training.parts import OptimPart, TunePart
from embedwright.training.stages import ContrastiveStage, DataPart

Grads = dict[str, Tensor]
OPTIM = OptimPart(lr=1e-2, steps=20, batch_queries=8, weight_decay=0.1)
STAGE = ContrastiveStage(
    name="s",
    data=(DataPart(path="none"),),
    in_batch_negatives="all",
    hard_negatives=2,
    temperature=0.05,
    optim=OPTIM,
)


def step(model: Embedder, batch: Batch, *, batch_tokens: int, seed: int) -> tuple[float, int]:
    replica, local = replicate(ALONE, model.network), local_of(model, batch)
    return accumulate(replica, local, STAGE, batch_tokens=batch_tokens, seed=seed)


def local_of(model: Embedder, batch: Batch) -> LocalBatch:
    return local_batch(batch, model.text_tokenizer, model.contract, ALONE)


def batch_of(model: Embedder, in_batch: Any, queries: int = 8, *, seed: int = 0, shared: bool = False) -> Batch:
    """Texts of many lengths; each query has a positive and two negatives (`shared`: one of them is everybody's)."""
    random = np.random.default_rng(seed)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "Ada", "Grace", "3.14", "dog"]

    def text(tag: str) -> Passage:
        return Passage(" ".join([tag, *random.choice(words, random.integers(1, 12))]))

    task = Task(name="t", instruction="Find what answers it")
    examples = [
        Example(
            f"{i}", "t", text(f"q{i}").text, (text(f"p{i}"),), (Passage("n") if shared else text(f"n{i}"), text("m"))
        )
        for i in range(queries)
    ]
    rows = [Row(example, task) for example in examples]
    return make_batch(rows, model.contract, hard_negatives=2, in_batch=in_batch, rng=random)


def counting(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The tokens of each forward from here on, and whether it has a gradient."""
    forwards: list[tuple[int, bool]] = []
    embed = model.network.embed

    def counted(packed: PackedTexts) -> Tensor:
        forwards.append((len(packed.ids_T), torch.is_grad_enabled()))
        return embed(packed)

    monkeypatch.setattr(model.network, "embed", counted)
    return forwards


def grads(model: Embedder) -> Grads:
    found = {n: p.grad for n, p in model.network.named_parameters() if p.grad is not None}
    model.network.zero_grad(set_to_none=True)
    return found


def difference(a: Grads, b: Grads) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in a)


def reference(model: Embedder, batch: Batch, temperature: float) -> tuple[float, Grads]:
    """All texts in one forward, each query's loss by itself."""
    pairs = [*batch.queries, *batch.candidates]
    vectors = torch.cat([model.embed(model.tokenize([text], prefix=prefix)) for prefix, text in pairs])
    q, c = vectors.split([len(batch.queries), len(batch.candidates)])
    losses = []
    for i, positive in enumerate(batch.masks.positive_Q):
        rivals = [positive, *(j for j in range(len(c)) if batch.masks.negative_QC[i, j])]
        losses.append(-((q[i] @ c[rivals].T) / temperature).log_softmax(-1)[0])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), grads(model)


@pytest.mark.parametrize(("in_batch", "shared"), [("none", False), ("none", True), ("all", False)])
def test_a_batch_beyond_the_budget_gives_the_gradient_of_the_whole(
    make: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch, in_batch: str, shared: bool
) -> None:
    model = make(shaken=True)
    batch = batch_of(model, in_batch, shared=shared)
    assert batch.separable() == (in_batch == "none")
    loss, plain = reference(model, batch, 0.05)
    tokens = sum(len(t.ids) for t in local_of(model, batch).tokens.values())
    forwards = counting(model, monkeypatch)
    for budget, forward_passes in ((tokens, 1), (tokens // 3, 3), (200, 4), (40, 12)):
        forwards.clear()
        assert step(model, batch, batch_tokens=budget, seed=1) == (
            pytest.approx(loss, rel=1e-5),
            tokens,
        )
        assert difference(grads(model), plain) < 2e-5
        if budget == tokens:
            assert len(forwards) == 1
            continue
        assert len(forwards) >= forward_passes and max(size for size, _ in forwards) <= max(budget, 60)
        if batch.separable() and budget >= 200:  # split by queries: nothing is computed twice
            assert all(with_graph for _, with_graph in forwards)
        elif not batch.separable():
            assert [with_graph for _, with_graph in forwards].count(False) == (len(forwards) - 1) / 2


def labelled(model: Embedder, rows: int = 12, classes: int = 4, length: int = 1) -> Batch:
    """Rows of a task of `classes` classes, whose names are the positive or the negatives of every row."""
    names = [Passage(" ".join([f"class {number}"] * length)) for number in range(classes)]
    task = Task(name="t", instruction="Name its class", symmetric=True)
    examples = [
        Example(
            f"{i}",
            "t",
            f"text {i} " + "moon " * (1 + i % 5),
            (names[i % classes],),
            tuple(name for name in names if name is not names[i % classes]),
        )
        for i in range(rows)
    ]
    return make_batch(
        [Row(example, task) for example in examples],
        model.contract,
        hard_negatives=classes - 1,
        in_batch="none",
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize(("length", "budget", "twice"), [(1, 500, False), (1, 10_000, False), (6, 500, True)])
def test_shared_class_names_are_encoded_in_each_part_unless_gradcache_costs_less(
    make: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch, length: int, budget: int, twice: bool
) -> None:
    model = make(shaken=True)
    batch = labelled(model, length=length)
    assert batch.separable() and len(batch.candidates) == 4
    loss, plain = reference(model, batch, 0.05)
    distinct = sum(len(read.ids) for read in local_of(model, batch).tokens.values())
    forwards = counting(model, monkeypatch)
    assert step(model, batch, batch_tokens=budget, seed=1) == (pytest.approx(loss, rel=1e-5), distinct)
    assert difference(grads(model), plain) < 2e-5
    sizes, with_graph = zip(*forwards, strict=True)
    assert max(sizes) <= budget and all(with_graph) != twice
    if budget > distinct:
        assert sizes == (distinct,)
    elif not twice:  # what is encoded more than once is bounded
        assert len(sizes) > 1 and distinct < sum(sizes) <= 4 / 3 * distinct


def test_in_one_forward_the_way_by_queries_draws_the_dropout_of_gradcache(make: Callable[..., Embedder]) -> None:
    model = make(shaken=True, dropout=0.3)
    batch = labelled(model)
    local, distinct = local_of(model, batch), list(dict.fromkeys([*batch.queries, *batch.candidates]))
    assert local.rows is not None
    found = []
    for same in (local, replace(local, rows=None, texts=[distinct])):
        loss, _ = accumulate(replicate(ALONE, model.network), same, STAGE, batch_tokens=10_000, seed=3)
        found.append((loss, grads(model)))
    (loss, ours), (cached, theirs) = found
    assert loss == pytest.approx(cached, rel=1e-6) and difference(ours, theirs) < 2e-6  # rows in another order


def test_each_distinct_text_is_embedded_once(make: Callable[..., Embedder]) -> None:
    model = make()
    batch = batch_of(model, "all", shared=True)
    assert len(batch.candidates) == 8 * 3 - 7
    tokens = local_of(model, batch).tokens
    assert list(tokens) and set(tokens) == {*batch.queries, *batch.candidates}
    for (prefix, text), found in tokens.items():
        packed = model.tokenize([text], prefix=prefix)
        assert found.ids.tolist() == packed.ids_T.tolist() and found.pool.tolist() == packed.pool_mask_T.tolist()


def test_dropout_follows_the_seed_alone(make: Callable[..., Embedder]) -> None:
    model = make(shaken=True, dropout=0.3)
    for in_batch in ("none", "all"):
        batch = batch_of(model, in_batch)
        results = []
        for seed in (5, 5, 6):
            loss, _ = step(model, batch, batch_tokens=200, seed=seed)
            results.append((loss, grads(model)))
            torch.rand(7)  # whatever else the process draws
        (loss, first), (again, second), (other, _) = results
        assert loss == again != other and all(torch.equal(first[n], second[n]) for n in first)


# ---- the schedule


@pytest.mark.parametrize("pooling", get_args(Kind))
def test_ten_updates_reach_every_adapter_and_the_pooling_block_and_nothing_else(
    make: Callable[..., Embedder], pooling: str
) -> None:
    """Ten, since a matrix that starts at zero shields its partner from the first gradient."""
    model = make(pooling, dropout=0.1)
    network = model.network
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    trained = {n for n in before if "lora_" in n or n.startswith("head.")}
    assert {n for n, p in network.named_parameters() if p.requires_grad} == trained
    linear = [n for n, m in network.backbone.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n]
    assert (
        len([n for n in trained if "lora_" in n]) == 2 * len(linear) == 2 * 7 * 3
    )  # A and B; layers of seven matrices
    optimizer = make_optimizer(network, TunePart(), OPTIM)
    reached: set[str] = set()
    for number in range(10):
        step(model, batch_of(model, "all", seed=number), batch_tokens=8192, seed=number)
        reached |= {n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        update(network, optimizer, learning_rate(OPTIM, number), 1.0)
    assert reached == trained
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_update_refuses_what_is_not_finite_and_moves_nothing(make: Callable[..., Embedder], value: float) -> None:
    model = make()
    network = model.network
    optimizer = make_optimizer(network, TunePart(), OPTIM)
    for _ in range(2):  # with moments that a step would apply even without a gradient
        step(model, batch_of(model, "all"), batch_tokens=8192, seed=1)
        update(network, optimizer, 1e-2, 1.0)
    before = {n: p.clone() for n, p in network.named_parameters()}
    moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    step(model, batch_of(model, "all"), batch_tokens=8192, seed=1)
    last = [p for p in network.parameters() if p.requires_grad][-1]
    assert last.grad is not None
    last.grad.view(-1)[-1] = value
    with pytest.raises(FloatingPointError, match="gradient norm is"):
        update(network, optimizer, 1e-2, 1.0)
    assert all(torch.equal(before[n], p) for n, p in network.named_parameters())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(moments, optimizer.state.values(), strict=True) for k in a)
    assert all(p.grad is None for p in network.parameters())


# ---- what trains
