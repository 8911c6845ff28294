from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, v_measure_score

from embedwright.errors import InputError
from embedwright.evaluation.compare.bootstrap import draw, random, same_order
from embedwright.evaluation.results import Result

DRAWS = 2000


def result(kind: str, seed: int, items: int = 80, quality: float = 1.0) -> Result:
    """A made-up result. All of one kind and size have the same items."""
    data, noise = np.random.default_rng(items), np.random.default_rng(seed)
    if kind == "retrieval":
        score = np.clip(data.random(items) + noise.normal(0, 0.2, items), 0, 1)
        found = {"score": score, "id": np.array([f"q{i}" for i in range(items)])}
        return Result("t", kind, "nDCG@10", float(score.mean()), items=found)
    gold = data.integers(0, 2 if kind == "pair" else 5, items)
    if kind == "clustering":
        cluster = np.stack([np.where(noise.random(items) < 0.6, gold, noise.integers(0, 5, items)) for _ in range(3)])
        value = float(np.mean([v_measure_score(gold, run) for run in cluster]))
        return Result("t", kind, "v_measure", value, items={"cluster": cluster, "gold": gold})
    cosine = (quality * gold + noise.normal(0, 1, items)).astype(np.float32)
    if kind == "pair":
        value = float(average_precision_score(gold, cosine))
        return Result("t", kind, "cosine_ap", value, items={"cosine": cosine, "gold": gold})
    if kind == "pearson":
        value = float(stats.pearsonr(gold, cosine)[0])
        return Result("t", "sts", "cosine_pearson", value, items={"cosine": cosine, "gold": gold.astype(float)})
    value = float(stats.spearmanr(gold, cosine)[0])
    return Result("t", kind, "cosine_spearman", value, items={"cosine": cosine, "gold": gold.astype(float)})


def _mean(rows: Any, one: Result) -> Any:
    return one.items["score"][rows].mean()


def _spearman(rows: Any, one: Result) -> Any:
    return stats.spearmanr(one.items["cosine"][rows], one.items["gold"][rows])[0]


def _pearson(rows: Any, one: Result) -> Any:
    return stats.pearsonr(one.items["cosine"][rows], one.items["gold"][rows])[0]


def _precision(rows: Any, one: Result) -> Any:
    return average_precision_score(one.items["gold"][rows], one.items["cosine"][rows])


def _v_measure(rows: Any, one: Result) -> Any:
    return np.mean([v_measure_score(one.items["gold"][rows], run[rows]) for run in one.items["cluster"]])


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("retrieval", _mean), ("sts", _spearman), ("pearson", _pearson), ("pair", _precision), ("clustering", _v_measure)],
)
def test_the_error_of_a_difference_is_that_of_scipys_bootstrap(kind: str, metric: Callable[..., Any]) -> None:
    ours, theirs = result(kind, 1), result(kind, 2)
    base, other = draw(random(1, "t"), [[ours], [theirs]], DRAWS)
    expected = stats.bootstrap(
        (np.arange(80),),
        lambda rows: metric(rows, theirs) - metric(rows, ours),
        n_resamples={"clustering": 200, "pair": 500}.get(kind, 2000),
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    drawn = other.drawn_B - base.drawn_B
    assert drawn.std(ddof=1) == pytest.approx(expected.standard_error, rel=0.15)
    error = expected.standard_error
    assert tuple(np.quantile(drawn, [0.025, 0.975])) == pytest.approx(
        tuple(expected.confidence_interval), abs=error * 0.4
    )
    # both sides see the same draws: the difference moves less than each side does
    assert drawn.std() < np.hypot(base.drawn_B.std(), other.drawn_B.std())
    assert (base.score_S[0], other.score_S[0], base.items) == (ours.value, theirs.value, 80)


@pytest.mark.parametrize("kind", ["retrieval", "sts", "pair", "clustering"])
def test_the_same_results_score_the_same_on_every_draw(kind: str) -> None:
    one, same, other = draw(random(1, "t"), [[result(kind, 1)], [result(kind, 1)], [result(kind, 2)]], 50)
    assert np.array_equal(one.drawn_B, same.drawn_B)
    assert not np.array_equal(one.drawn_B, other.drawn_B)


def test_seeds_are_averaged_on_each_draw() -> None:
    seeds = [result("sts", 1), result("sts", 2)]
    (both,) = draw(random(1, "t"), [seeds], 50)
    first, second = draw(random(1, "t"), [[seed] for seed in seeds], 50)
    np.testing.assert_allclose(both.drawn_B, (first.drawn_B + second.drawn_B) / 2, rtol=1e-12)
    assert both.score_S.tolist() == [seed.value for seed in seeds]


def test_parts_of_a_task_are_drawn_apart_and_averaged() -> None:
    small, large = result("sts", 1, items=30), result("sts", 1, items=60)
    items = {
        f"test/{part}/{name}": array
        for part, one in (("en", small), ("de", large))
        for name, array in one.items.items()
    }
    (whole,) = draw(random(1, "t"), [[replace(small, value=(small.value + large.value) / 2, items=items)]], 4000)
    parts = [draw(random(part, "t"), [[one]], 4000)[0].drawn_B for part, one in ((1, small), (2, large))]
    assert whole.items == 90
    assert whole.drawn_B.std() == pytest.approx(np.hypot(parts[0].std(), parts[1].std()) / 2, rel=0.06)


def test_runs_of_k_means_are_kept_apart() -> None:
    one = result("clustering", 1)
    ((runs,),) = (found.runs for found in draw(random(1, "t"), [[one]], 10))
    assert runs == pytest.approx([v_measure_score(one.items["gold"], run) for run in one.items["cluster"]])


def test_a_run_of_k_means_may_have_drawn_texts_more_or_less_often() -> None:
    """mteb draws the texts of each run with replacement: a text that is drawn twice still is one item."""
    rng = np.random.default_rng(0)
    gold, cluster = rng.integers(0, 4, 30), rng.integers(0, 3, (2, 30))
    picked = rng.integers(0, 30, (2, 100))
    times = np.stack([np.bincount(run, minlength=30) for run in picked])
    expected = [v_measure_score(gold[rows], run[rows]) for run, rows in zip(cluster, picked, strict=True)]
    items = {
        f"test/default/Level 0/{name}": array
        for name, array in (("gold", gold), ("cluster", cluster), ("times", times))
    }
    (found,) = draw(random(1, "t"), [[Result("t", "Clustering", "v", float(np.mean(expected)), items=items)]], 10)
    assert found.items == 30
    (runs,) = found.runs
    assert runs == pytest.approx(expected)


def test_sets_of_the_older_mteb_tasks_are_repetitions() -> None:
    sets = [result("clustering", seed) for seed in (1, 2, 3)]
    items = {
        f"test/default/{number}/{name}": array[:1] if name == "cluster" else array
        for number, one in enumerate(sets)
        for name, array in one.items.items()
    }
    values = [v_measure_score(one.items["gold"], one.items["cluster"][0]) for one in sets]
    (found,) = draw(random(1, "t"), [[Result("t", "Clustering", "v", float(np.mean(values)), items=items)]], 10)
    assert found.items == 240
    (runs,) = found.runs
    assert runs == pytest.approx(values)


def test_splits_and_subsets_count_alike_however_many_parts_they_have() -> None:
    one, two, three = (result("clustering", seed) for seed in (1, 2, 3))
    named = {"test/en/0/": one, "test/en/1/": two, "test/de/0/": three}
    items = {part + name: array for part, its in named.items() for name, array in its.items.items()}
    value = (one.value + two.value) / 4 + three.value / 2
    (found,) = draw(random(1, "t"), [[replace(one, value=value, items=items)]], 10)
    assert found.items == 240


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"items": {}}, id="no items"),
        pytest.param({"value": 0.123}, id="a score that is not that of the items"),
    ],
)
def test_a_score_without_its_items_is_not_drawn(change: dict[str, Any]) -> None:
    good = result("retrieval", 1)
    odd = replace(good, **change)
    for place, sides in enumerate([[odd, good], [good, odd]]):
        drawn = draw(random(1, "t"), [[side] for side in sides], 10)
        assert (drawn[place].items, set(drawn[place].drawn_B)) == (0, {odd.value})
        assert bool(drawn[1 - place].items) == (place == 1)  # the baseline's are needed by all


def test_items_are_matched_by_id() -> None:
    one = result("retrieval", 1)
    order = np.random.default_rng(0).permutation(80)
    shuffled = replace(one, items={name: array[order] for name, array in one.items.items()})
    back = same_order(one, shuffled)
    assert back.items["id"].tolist() == one.items["id"].tolist()
    assert back.items["score"].tolist() == one.items["score"].tolist()
    assert same_order(one, replace(one, items={})).items == {}


def test_ids_are_compared_as_text() -> None:
    score = np.linspace(0, 1, 12)
    numbers = Result("t", "retrieval", "nDCG@10", 0.5, items={"score": score, "id": np.arange(12)})
    texts = replace(numbers, items={"score": score[::-1], "id": np.array([f"{n}" for n in range(12)])[::-1]})
    assert same_order(numbers, texts).items["score"].tolist() == score.tolist()
    assert same_order(texts, numbers).items["score"].tolist() == score[::-1].tolist()
    twice = {"score": np.zeros(3), "id": np.array(["a", "a", "b"])}
    with pytest.raises(InputError, match="has other items: some are repeated"):
        same_order(replace(numbers, items=twice), replace(numbers, items=twice | {"id": np.array(["a", "b", "b"])}))


def test_other_items_are_refused() -> None:
    one, sts = result("retrieval", 1), result("sts", 1)
    renamed = replace(one, items={**one.items, "id": np.array(["new", *one.items["id"][1:]])})
    with pytest.raises(InputError, match="2 are in one alone, such as 'new'"):
        same_order(one, renamed)
    with pytest.raises(InputError, match="number"):
        same_order(one, result("retrieval", 1, items=79))
    with pytest.raises(InputError, match="labels differ"):
        same_order(sts, replace(sts, items={**sts.items, "gold": sts.items["gold"][::-1]}))
    with pytest.raises(InputError, match="two metrics, nDCG@10 and MRR@10"):
        same_order(one, replace(one, metric="MRR@10"))


def test_other_data_are_refused_with_and_without_items() -> None:
    one = replace(result("retrieval", 1), data="test/en, test/de")
    for items in (one.items, {}):
        with pytest.raises(InputError, match=r"other data: only one side has test/de, test/ko$"):
            same_order(one, replace(one, items=items, data="test/en, test/ko"))
        assert same_order(one, replace(one, items=items, data="")).value == one.value  # of before it was kept
    for pair in ((one, replace(one, value=np.nan)), (replace(one, value=np.nan), one)):
        with pytest.raises(InputError, match="no number"):
            same_order(*pair)
