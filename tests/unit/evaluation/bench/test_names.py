"""Names of MTEB: a benchmark, a task, or an answer with the nearest; and the name of a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedwright.errors import InputError
from embedwright.evaluation.bench.names import choose, name_of


def test_a_name_is_a_benchmark_or_a_task() -> None:
    assert len(choose("MTEB(eng, v1)").tasks) == 56
    assert len(choose("MTEB(eng, v2)").tasks) == 41
    assert len(choose("MTEB(Multilingual, v2)").tasks) == 131
    assert len(choose("NanoBEIR").tasks) == 13
    assert choose("BRIGHT").benchmark is not None
    (task,) = choose("SciFact").tasks
    assert task.metadata.name == "SciFact" and choose("SciFact").benchmark is None


@pytest.mark.parametrize(
    ("name", "near"),
    [("NanoBIER", "NanoBEIR"), ("mteb(eng, v3)", "MTEB(eng, v2)"), ("SciFakt", "SciFact"), ("STS-12", "STS12")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match="knows no benchmark or task") as refused:
        choose(name)
    assert repr(near) in str(refused.value)


def test_the_name_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "runs/mine/model").mkdir(parents=True)
    assert name_of("minilm") == "embedwright/minilm"
    assert name_of("nvidia/NV-Embed-v2@main") == "nvidia/NV-Embed-v2"
    assert name_of(f"{tmp_path}/runs/mine/model") == "embedwright/mine"
    assert name_of(f"{tmp_path}/runs/mine/") == "embedwright/mine"
    assert name_of("http://localhost:80/v1#org/name") == "org/name"
    assert name_of("http://localhost:80/v1#some model") == "embedwright/some_model"
