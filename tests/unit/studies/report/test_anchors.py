from __future__ import annotations

import mteb
import pytest

from embedwright.evaluation.results import Result, Results
from embedwright.studies.report.anchors import published
from embedwright.studies.report.scores import Scored, score_tables


def test_a_benchmark_is_known_by_its_tasks() -> None:
    """The figures are those of the NV-Embed paper, and of the authors' own reports."""
    tasks = {task.metadata.name for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    benchmark, anchors = published("mteb 2.26.24", tasks)
    assert benchmark == "MTEB(eng, v1)"
    assert {"name": "NV-Embed-v2", "value": pytest.approx(0.7231)}.items() <= anchors["mean"][0].items()
    assert anchors["ArguAna"][0]["value"] == pytest.approx(0.7007) and "self-report" in anchors["ArguAna"][0]["source"]
    benchmark, anchors = published("mteb 2.26.24", tasks - {"ArguAna"})
    assert benchmark == "" and anchors["mean"] == [] and anchors["STS12"]


def test_a_suite_of_ones_own_has_no_published_scores() -> None:
    assert published("dev", {"ArguAna"}) == ("", {})


def test_published_scores_stand_below_the_own_ones() -> None:
    names = [task.metadata.name for task in mteb.get_benchmark("NanoBEIR").tasks]
    rows = tuple(Result(name, "retrieval", "nDCG@10", 0.5) for name in names)
    (table,) = score_tables([Scored("mine", [[Results("NanoBEIR", rows, 1.0)]])])
    assert {len(group["scores"]) for group in table["tasks"][:-1]} == {1}
    (partly,) = score_tables([Scored("mine", [[Results("NanoBEIR", rows[:-1], 1.0)]])])
    assert {len(group["scores"]) for group in partly["tasks"]} == {1}  # a mean over fewer tasks is another number
    mine, *others = table["tasks"][-1]["scores"]
    assert mine["value"] == 0.5 and not mine["source"]
    assert {"BM25": pytest.approx(0.5729)}.items() <= {other["name"]: other["value"] for other in others}.items()
    assert not any(score["best"] for score in others) and len(table["sources"]) == 1
