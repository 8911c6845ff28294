from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from embedwright.data.schema import Example, Passage, Task
from embedwright.training.batches.blend import Row, Source, permuted, rows_at, sampling_weight


def source(name: str, n: int, share: float | None = None, task: str | None = None) -> Source:
    """`n` rows `name:0`, `name:1` ...; rows_at asks a table for nothing but single rows."""
    rows = [Example(f"{name}:{i}", task or name, f"q{i}", (Passage(f"p{i}"),)) for i in range(n)]
    table: Any = rows
    return Source(name, table, np.arange(n), Task(name=task or name), share or n)


def draw(sources: list[Source], step: int, batch: int, batching: Any = "blended", **change: Any) -> list[Row]:
    return rows_at(sources, step, **{"batch_queries": batch, "batching": batching, "seed": 3, "stage": "one"} | change)


def drawn(sources: list[Source], steps: int, batch: int, batching: Any = "blended", **change: Any) -> list[str]:
    rows = (row for step in range(steps) for row in draw(sources, step, batch, batching, **change))
    return [row.example.id for row in rows]


# ---- the permutation


@pytest.mark.parametrize("key", ["7/retrieval/docs/0", ""])
def test_permuted_is_a_bijection(key: str) -> None:
    for n in [*range(1, 201), 256, 257, 1000]:
        assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_permuted_differs_by_key_and_leaves_no_order() -> None:
    orders = [tuple(permuted(i, 40, f"key {k}") for i in range(40)) for k in range(50)]
    assert len(set(orders)) == 50
    assert all(sum(i == value for i, value in enumerate(order)) < 8 for order in orders)  # expected 1
    neighbours = [order[i + 1] - order[i] == 1 for order in orders for i in range(39)]
    assert sum(neighbours) < 100  # expected 49 of 1950


def test_permuted_sends_a_position_anywhere_about_equally_often() -> None:
    """Walking the cycle of so small a network favours some places a little; the keys are fixed, nothing can flicker."""
    for n in (2, 3, 5, 7, 12):
        for position in (0, n - 1):
            counts = np.bincount([permuted(position, n, f"key {k}") for k in range(300 * n)], minlength=n)
            assert counts.min() > 200 and counts.max() < 450


# ---- rows_at


@pytest.mark.parametrize("batching", ["blended", "homogeneous"])
def test_the_rows_of_a_step_depend_on_nothing_but_its_arguments(batching: str) -> None:
    sources = [source("a", 11), source("b", 5), source("c", 29, 7.5)]
    forwards = [draw(sources, step, 6, batching) for step in range(40)]
    backwards = [draw(sources, step, 6, batching) for step in reversed(range(40))]
    assert forwards == backwards[::-1]
    afresh = [source("a", 11), source("b", 5), source("c", 29, 7.5)]
    assert draw(afresh, 17, 6, batching) == forwards[17]
    assert all(len(rows) == 6 for rows in forwards)
    for other in ({"seed": 4}, {"stage": "two"}):
        assert [draw(sources, step, 6, batching, **other) for step in range(40)] != forwards


@pytest.mark.parametrize("batching", ["blended", "homogeneous"])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_an_epoch_has_each_row_once_and_the_next_another_order(batching: str, batch: int) -> None:
    sources = [source("a", 10), source("b", 23, 9), source("c", 4, 2)]
    ids = drawn(sources, 600 // batch, batch, batching)
    for name, n in (("a", 10), ("b", 23), ("c", 4)):
        own = [id_ for id_ in ids if id_.startswith(f"{name}:")]
        epochs = [tuple(own[i : i + n]) for i in range(0, len(own) - n + 1, n)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == sorted(f"{name}:{i}" for i in range(n)) for epoch in epochs)
        assert len(set(epochs)) == len(epochs) if n > 4 else len(set(epochs)) > 6  # of 24 orders


def test_sources_of_one_size_are_ordered_each_in_its_own_way() -> None:
    ids = drawn([source("a", 30), source("b", 30)], 10, 6)
    first, second = ([id_[2:] for id_ in ids if id_[0] == name] for name in "ab")
    assert sorted(first) == sorted(second) and first != second


def test_a_source_gives_its_own_rows_of_the_table_alone() -> None:
    whole = source("a", 20)
    part = Source("a", whole.table, np.array([2, 3, 5, 17]), whole.task, 1.0)
    assert set(drawn([part], 2, 6)) == {"a:2", "a:3", "a:5", "a:17"}
    assert draw([part], 0, 1)[0].task == whole.task


def random_shares(random: np.random.Generator, n: int) -> list[float]:
    if random.random() < 0.4:
        return [float(share) for share in random.integers(1, 60, n)]
    return [float(share) + 1e-5 for share in random.dirichlet(np.full(n, random.choice([0.2, 1.0, 5.0])))]


@pytest.mark.parametrize(("sources", "within"), [(1, 1e-9), (2, 0.5 + 1e-9), (3, 1.0), (5, 1.5), (12, 1.75)])
def test_shares_are_exact_over_every_prefix_of_slots(sources: int, within: float) -> None:
    """Batches of one row show the slots one by one: each has one row, so no count ever shrinks."""
    random = np.random.default_rng(sources)
    for _ in range(25):
        shares = random_shares(random, sources)
        blend = [source(f"s{i}", 3, share) for i, share in enumerate(shares)]
        counts = np.zeros(sources)
        for slots in range(1, 201):
            (row,) = draw(blend, slots - 1, 1)
            counts[int(row.task.name[1:])] += 1
            assert np.abs(counts - slots * np.array(shares) / sum(shares)).max() <= within


def test_a_batch_has_the_rows_of_its_slots() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        blend = [source(f"s{i}", 5, share) for i, share in enumerate(random_shares(random, 6))]
        slots = drawn(blend, 70, 1)
        for step in range(10):
            batch = [row.example.id for row in draw(blend, step, 7)]
            assert Counter(batch) == Counter(slots[step * 7 : step * 7 + 7])


def test_a_homogeneous_batch_is_of_one_task_and_batches_are_shared_out_like_slots() -> None:
    blend = [source("a", 50, 0.5), source("b", 9, 0.1), source("c", 30, 0.4)]
    batches = [draw(blend, step, 8, "homogeneous") for step in range(100)]
    assert all(len({row.task.name for row in rows}) == 1 and len(rows) == 8 for rows in batches)
    assert Counter(rows[0].task.name for rows in batches) == {"a": 50, "b": 10, "c": 40}
    blended = [draw(blend, step, 8) for step in range(100)]
    assert sum(len({row.task.name for row in rows}) > 1 for rows in blended) > 95


def test_a_share_is_relative() -> None:
    blend = [source("a", 10, 3.0), source("b", 10, 1.0)]
    assert Counter(id_[0] for id_ in drawn(blend, 10, 8)) == {"a": 60, "b": 20}
    tenfold = [source("a", 10, 30.0), source("b", 10, 10.0)]
    assert drawn(tenfold, 10, 8) == drawn(blend, 10, 8)


# ---- shares of data sets


def test_shares_follow_the_power_of_the_size() -> None:
    sizes = [5_000, 300, 20, 1]
    for alpha in (1.0, 0.7, 0.3, 0.0):
        found = np.array([sampling_weight(1.0, n, alpha) for n in sizes])
        np.testing.assert_allclose(found, np.array(sizes, dtype=float) ** alpha, rtol=1e-12)
    assert [sampling_weight(2.5, n, 0.5) / sampling_weight(1.0, n, 0.5) for n in sizes] == pytest.approx([2.5] * 4)


def test_a_share_at_alpha_1_is_weight_times_rows_to_the_bit() -> None:
    random = np.random.default_rng(0)
    for weight, rows in zip(random.random(500).tolist(), random.integers(1, 10**7, 500).tolist(), strict=True):
        assert sampling_weight(weight, rows, 1.0) == sampling_weight(weight, rows, 1.0, of=10 * rows) == weight * rows


def test_parts_of_a_data_set_have_its_share_together() -> None:
    for alpha in (1.0, 0.4, 0.0):
        parts = [sampling_weight(2.0, n, alpha, of=100) for n in (70, 25, 5)]
        assert sum(parts) == pytest.approx(sampling_weight(2.0, 100, alpha))
        assert parts[0] / parts[2] == pytest.approx(14)
    assert sampling_weight(1.0, 0, 0.5) == sampling_weight(1.0, 0, 0.5, of=10) == 0


def test_a_small_set_is_drawn_more_often_than_its_size_asks() -> None:
    sizes = {"a": 4_000, "b": 40}
    counts = {}
    for alpha in (1.0, 0.5):
        blend = [source(name, n, sampling_weight(1.0, n, alpha)) for name, n in sizes.items()]
        counts[alpha] = Counter(id_[0] for id_ in drawn(blend, 101, 10))
    assert counts[1.0] == {"a": 1_000, "b": 10} and counts[0.5] == {"a": 918, "b": 92}
