"""Encoders that all processes share, in real groups of processes: each text once, in order, errors on all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import groups
import numpy as np
import pytest
from groups import raised

from embedwright.encoders import sharded
from embedwright.encoders.sharded import ShardedEncoder, shared
from embedwright.errors import InputError
from embedwright.model.embedder import Embedder
from embedwright.processes import ALONE, start

TEXTS = [f"{'a tide ' * n}moon" for n in (1, 30, 2, 9, 0)]
COUNTS = (2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    sizes = {"in_a_group": COUNTS, "one_dies": (2,)}
    return groups.run(__file__, tmp_path_factory.mktemp("g"), sizes, str(tiny_decoder("llama")))


@pytest.fixture
def alone(tiny_decoder: Callable[..., Path]) -> Embedder:
    return Embedder.from_decoder(tiny_decoder("llama"), pooling="mean")


@pytest.mark.parametrize("count", COUNTS)
def test_the_vectors_are_those_of_one_process_in_the_order_given(
    found: dict[str, Any], alone: Embedder, count: int
) -> None:
    first = found["in_a_group"][count][0]
    np.testing.assert_allclose(first["vectors"], alone.encode(TEXTS, task="Find it"), atol=2e-6)
    repeated = [TEXTS[i] for i in (2, 2, 0, 2)]
    np.testing.assert_allclose(first["repeated"], alone.encode(repeated), atol=2e-6)
    np.testing.assert_allclose(first["one"], alone.encode(TEXTS[:1]), atol=2e-6)
    np.testing.assert_allclose(first["in blocks"], alone.encode(TEXTS), atol=2e-6)
    assert np.array(first["none"]).size == 0
    assert first["int8"] == alone.encode(TEXTS, precision="int8", dim=8).tolist()


@pytest.mark.parametrize("count", COUNTS)
def test_each_distinct_text_is_encoded_once_and_each_process_has_a_part(found: dict[str, Any], count: int) -> None:
    for name, texts in {
        "vectors": TEXTS,
        "repeated": {TEXTS[2], TEXTS[0]},
        "one": TEXTS[:1],
        "in blocks": TEXTS,
    }.items():
        encoded = [one["encoded"][name] for one in found["in_a_group"][count]]
        assert sorted(text for own in encoded for text in own) == sorted(texts), name
        assert sum(map(bool, encoded)) == min(count, len(texts)), name
    assert [one["result"] for one in found["in_a_group"][count]] == ["of rank 0", *[None] * (count - 1)]


@pytest.mark.parametrize("count", COUNTS)
def test_an_error_of_any_process_is_one_of_encode_and_the_next_call_is_fine(found: dict[str, Any], count: int) -> None:
    first = found["in_a_group"][count][0]
    longest = TEXTS[1][:100]
    assert first["bad text"].endswith(f"'{longest}': cannot be read") and first["bad text"].startswith("TextError")
    assert first["bad model"] == "OtherProcessError: process 1: weights cannot be opened"
    np.testing.assert_allclose(first["after"], first["vectors"], atol=2e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_an_error_of_rank_0_ends_the_work_of_all(found: dict[str, Any], count: int) -> None:
    errors = [one["of rank 0"] for one in found["in_a_group"][count]]
    assert errors == ["InputError: no such suite"] + ["InputError: process 0: no such suite"] * (count - 1)


@pytest.mark.parametrize("count", COUNTS)
def test_several_encoders_and_names(found: dict[str, Any], count: int) -> None:
    assert found["in_a_group"][count][0]["several"] == ["bm25", [1.0] * 5, [2.0] * 5, {"name": "2"}]


def test_where_rank_0_dies_the_others_do_not_wait(found: dict[str, Any]) -> None:
    dead, other = found["one_dies"][2]
    assert dead is None and "Error" in other


def test_one_process_works_with_the_encoders_themselves(alone: Embedder) -> None:
    assert shared(lambda: [alone, "bm25"], ALONE, lambda own: own) == [alone, "bm25"]


# ---- in the processes


class Constant:
    def __init__(self, value: float) -> None:
        self.value = value

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        return np.full((len(texts), 1), self.value, np.float32)

    def fingerprint(self) -> dict[str, str]:
        return {"name": str(int(self.value))}


class Broken:
    """Gives rank 1 an error of its own, and no vectors for the longest text."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def encode(self, texts: list[str], task: str | None = None) -> np.ndarray:
        if task == "model" and self.rank == 1:
            raise OSError("weights cannot be opened")
        if TEXTS[1] in texts:
            error = InputError(f"texts[{texts.index(TEXTS[1])}]: cannot be read")
            error.index = texts.index(TEXTS[1])  # type: ignore[attr-defined]  # as our model's errors have
            raise error
        return np.zeros((len(texts), 3), np.float32)


def in_a_group(folder: Path, decoder: str) -> dict[str, Any]:
    processes = start()
    model = Embedder.from_decoder(decoder, pooling="mean")
    now, encoded = "", dict[str, list[str]]()
    encode = model.encode

    def counted(texts: list[str], task: str | None = None, **options: Any) -> Any:
        encoded.setdefault(now, []).extend(texts)
        return encode(texts, task=task, **options)

    model.encode = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {}

    def asked(name: str, *given: Any, **options: Any) -> None:
        nonlocal now
        now = name
        encoded[name] = []
        vectors = shared(lambda: [model], processes, lambda own: cast(Any, own[0]).encode(*given, **options))
        found[name] = None if vectors is None else vectors.tolist()

    asked("vectors", TEXTS, "Find it")
    asked("repeated", [TEXTS[i] for i in (2, 2, 0, 2)])
    asked("one", TEXTS[:1])
    asked("none", [])
    asked("int8", TEXTS, precision="int8", dim=8)
    sharded._BLOCK = 1
    asked("in blocks", TEXTS)
    now = "after"
    broken = Broken(processes.rank)

    def work(own: list[Any]) -> str:
        found["bad text"] = raised(lambda: own[0].encode(TEXTS))
        found["bad model"] = raised(lambda: own[0].encode(TEXTS[2:4], "model"))
        found["after"] = own[1].encode(TEXTS, "Find it").tolist()
        return "of rank 0"

    found["result"] = shared(lambda: [broken, model], processes, work)

    def fail(own: list[Any]) -> None:
        own[0].encode(TEXTS)
        raise InputError("no such suite")

    found["of rank 0"] = raised(lambda: shared(lambda: [model], processes, fail))

    def several(own: list[Any]) -> list[Any]:
        values = [one.encode(TEXTS)[:, 0].tolist() for one in own[1:]]
        return [own[0], *values, own[2].fingerprint()]

    found["several"] = shared(lambda: ["bm25", Constant(1), Constant(2)], processes, several)
    return found | {"encoded": encoded}


def one_dies(folder: Path, decoder: str) -> str | None:
    processes = start()

    def work(own: list[Any]) -> None:
        assert isinstance(own[0], ShardedEncoder)
        own[0].encode(TEXTS)
        os._exit(9)

    return raised(lambda: shared(lambda: [Constant(1)], processes, work))
