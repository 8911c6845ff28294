from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from embedwright.errors import InputError, NotFoundError
from embedwright.evaluation.compare.bootstrap import half_interval
from embedwright.evaluation.results import Result, Results, write_results
from embedwright.studies.report.scores import Scored, read_scores, score_tables


def results(suite: str, value: float, model: str) -> Results:
    rows = (Result("a", "sts", "cosine_spearman", value), Result("b", "pair", "cosine_ap", 0.9))
    return Results(suite, rows, 1.0, {"model": model})


def test_scores_of_a_run_are_those_before_it_and_of_the_end_of_each_stage(tiny_run: Path) -> None:
    scored = read_scores(tiny_run, [])
    assert [name for name, _ in scored] == ["before training", "first, step 4", "second, step 2"]


def test_runs_and_results_stand_side_by_side(tiny_run: Path, tmp_path: Path) -> None:
    suite = read_scores(tiny_run, [])[0].seeds[0][0].suite
    write_results(tmp_path / "r" / "one" / "dev.json", results(suite, 0.25, "one"))
    (tmp_path / "r" / "one" / "other.json").write_text("{}")
    write_results(tmp_path / "two.json", results("other", -0.18, "two"))
    write_results(tmp_path / "r" / "more" / "dev.json", results(suite, 0.5, "more"))
    scored = read_scores(tiny_run, [tmp_path / "r", tmp_path / "two.json"])
    assert [name for name, _ in scored][-3:] == ["more", "one", "two"]
    tables = score_tables(scored)
    assert [table["suite"] for table in tables] == [suite, "other"]
    assert [task["task"] for task in tables[0]["tasks"]] == ["docs", "kinds", "alike", "a", "b"]  # none has all
    other = tables[1]
    assert (other["low"], other["high"]) == (-0.2, pytest.approx(0.9))
    assert [(task["task"], task["metric"]) for task in other["tasks"]][-1] == ("mean", "over 2 tasks")
    places = [score["at"] for task in other["tasks"] for score in task["scores"]]
    assert places == pytest.approx([0.02 / 1.1, 1.0, 0.56 / 1.1])


def test_the_best_of_each_task_is_marked() -> None:
    tables = score_tables([Scored("x", [[results("s", 0.1, "x")]]), Scored("y", [[results("s", 0.2, "y")]])])
    best = [[score["best"] for score in task["scores"]] for task in tables[0]["tasks"]]
    assert best == [[False, True], [True, True], [False, True]]


def test_the_interval_of_a_mean_is_that_of_the_t_test(tiny_run: Path) -> None:
    score = np.random.default_rng(0).beta(1, 2, 150)
    row = Result("a", "retrieval", "nDCG@10", float(score.mean()), {}, {"score": score, "id": np.arange(150)})
    ends = stats.ttest_1samp(score, 0).confidence_interval(0.95)
    assert half_interval("s", [row]) == pytest.approx((ends.high - ends.low) / 2, rel=0.06)
    table = score_tables([Scored("x", [[Results("s", (row,), 1.0)]])])[0]
    (shown,) = table["tasks"][0]["scores"]
    width = table["high"] - table["low"]
    assert shown["from"] * width + table["low"] == pytest.approx(shown["value"] - shown["half"])
    assert shown["span"] * width == pytest.approx(2 * shown["half"])
    assert half_interval("s", [Result("a", "retrieval", "nDCG@10", 0.5)]) is None  # without items


def test_runs_have_intervals_by_the_items_that_they_keep(tiny_run: Path) -> None:
    tables = score_tables(read_scores(tiny_run, []))
    found = {task["task"]: [score["half"] for score in task["scores"]] for task in tables[0]["tasks"]}
    assert all(half is not None and half > 0 for task in ("docs", "kinds", "alike") for half in found[task])


def test_another_run_stands_beside_with_its_last_scores(tiny_run: Path) -> None:
    other = read_scores(tiny_run, [tiny_run])[-1]
    assert other.name == "run" and other.seeds[0][0].rows == read_scores(tiny_run, [])[2].seeds[0][0].rows


def test_training_seeds_make_one_row_with_their_mean_and_a_wider_interval() -> None:
    random = np.random.default_rng(0)
    scores = [random.uniform(size=200) + shift for shift in (0.0, 0.1, 0.2)]
    rows = [
        Result("a", "retrieval", "nDCG@10", float(s.mean()), {}, {"score": s, "id": np.arange(200)}) for s in scores
    ]
    (table,) = score_tables([Scored("x", [[Results("s", (row,), 1.0)] for row in rows])])
    (shown,) = table["tasks"][0]["scores"]
    values = [row.value for row in rows]
    assert shown["value"] == pytest.approx(np.mean(values))
    of_seeds = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    of_items = stats.ttest_1samp(np.mean(scores, axis=0), 0).confidence_interval(0.95)
    both = np.hypot((of_seeds.high - of_seeds.low) / 2, (of_items.high - of_items.low) / 2)
    assert shown["half"] == pytest.approx(both, rel=0.01)
    partly = Scored("y", [[Results("s", (rows[0],), 1.0)], []])
    assert score_tables([partly]) == []  # one seed lacks the task


def test_what_holds_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        read_scores(None, [tmp_path / "nowhere"])
    (tmp_path / "some.json").write_text("{}")
    with pytest.raises(InputError, match="not a result file"):
        read_scores(None, [tmp_path / "some.json"])
    with pytest.raises(InputError, match="neither a run"):
        read_scores(None, [tmp_path])
    (tmp_path / "page.html").write_text("")
    with pytest.raises(InputError, match="neither a run"):
        read_scores(None, [tmp_path / "page.html"])


def test_a_score_that_is_no_number_has_a_row_and_no_place_on_the_axis() -> None:
    items = {"score": np.array([np.nan, 0.5, 0.7]), "id": np.arange(3)}
    lost = Results("s", (Result("a", "retrieval", "nDCG@10", float("nan"), {}, items),), 1.0)
    known = Results("s", (Result("a", "retrieval", "nDCG@10", 0.34),), 1.0)
    (table,) = score_tables([Scored("x", [[lost]]), Scored("y", [[known]])])
    (task,) = table["tasks"]
    assert (table["low"], table["high"]) == (0.3, 0.4)
    assert [(score["best"], score["half"], "at" in score) for score in task["scores"]] == [
        (False, None, False),
        (True, None, True),
    ]
    (alone,) = score_tables([Scored("x", [[lost]])])
    assert (alone["low"], alone["high"]) == (0.0, 1.0)
