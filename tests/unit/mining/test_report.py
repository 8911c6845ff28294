from __future__ import annotations

import numpy as np
import pytest

from embedwright.mining.report import KINDS, Histogram


def test_a_histogram_counts_scores_in_steps() -> None:
    histogram = Histogram()
    histogram.add("positives", np.array([], np.float32))
    histogram.add("positives", np.array([[0.715, 0.719], [0.999, -0.001]]))
    histogram.add("negatives", np.array([0.0, -0.021]))
    found = histogram.to_json()
    assert (found["step"], found["start"]) == (0.01, -0.03)
    at = {kind: {i: n for i, n in enumerate(found[kind]) if n} for kind in KINDS}
    assert at == {"positives": {2: 1, 3 + 71: 2, 3 + 99: 1}, "removed_by_rule": {}, "negatives": {0: 1, 3: 1}}


@pytest.mark.parametrize(("largest", "step"), [(1.0000001, 0.01), (8, 0.1), (250, 10), (0.05, 0.001), (0, 0.01)])
def test_the_step_goes_by_the_first_scores(largest: float, step: float) -> None:
    histogram = Histogram()
    histogram.add("positives", np.array([largest, largest / 2]))
    histogram.add("negatives", np.array([1.5]))
    assert histogram.step == pytest.approx(step)
