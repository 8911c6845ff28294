from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embedwright.data.schema import DataError
from embedwright.vectors.kept import KeptVectors, encode_asked


class Hashed:
    """An encoder whose vectors follow from instruction and text alone."""

    def __init__(self, name: str = "a") -> None:
        self.name, self.calls = name, list[tuple[str | None, str]]()

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        self.calls += [(task, text) for text in texts]
        seeds = [hashlib.sha256(f"{self.name} {task} {text}".encode()).digest() for text in texts]
        return np.array([np.frombuffer(seed, np.uint8)[:6] for seed in seeds], dtype=np.float32)

    def fingerprint(self) -> dict[str, str]:
        return {"name": self.name}


ASKED = [(None, "a tide"), ("Find it", "a tide"), (None, "the moon"), ("Find it", "Ω"), (None, "the moon"), ("", "a")]


def expected(asked: Sequence[tuple[str | None, str]], name: str = "a") -> NDArray[np.float32]:
    return np.concatenate([Hashed(name).encode([text], task) for task, text in asked])


def test_each_text_is_encoded_once_under_its_instruction_and_by_each_model(tmp_path: Path) -> None:
    encoder = Hashed()
    kept = KeptVectors(encoder, tmp_path)
    assert kept.fill(ASKED[:3]) == 3 and kept.fill(ASKED) == 2 and kept.fill(ASKED) == 0
    assert sorted(encoder.calls, key=str) == sorted(set(ASKED), key=str)
    for asked in (ASKED, ASKED[::-1], [ASKED[3]] * 3):
        np.testing.assert_array_equal(kept.of(asked), expected(asked))
        np.testing.assert_array_equal(encode_asked(Hashed(), asked), expected(asked))
    later, other = Hashed(), Hashed("b")
    again = KeptVectors(later, tmp_path)
    assert again.fill(ASKED) == 0 and later.calls == []
    np.testing.assert_array_equal(again.of(ASKED), expected(ASKED))
    assert KeptVectors(other, tmp_path).fill(ASKED[:1]) == 1 and other.calls == ASKED[:1]


def test_what_others_add_is_seen_after_a_look(tmp_path: Path) -> None:
    one, two = KeptVectors(Hashed(), tmp_path), KeptVectors(Hashed(), tmp_path)
    one.fill(ASKED[:2])
    with pytest.raises(ValueError, match=r"no vector of 'a tide'"):
        two.of(ASKED[:1])
    two.refresh()
    np.testing.assert_array_equal(two.of(ASKED[:2]), expected(ASKED[:2]))


def test_threads_read_at_a_time(tmp_path: Path) -> None:
    kept, texts = KeptVectors(Hashed(), tmp_path), [(None, f"text {i}") for i in range(60)]
    for first in range(0, 60, 10):
        kept.fill(texts[first : first + 10])
    orders = [np.random.default_rng(seed).permutation(60) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda order: kept.of([texts[i] for i in order]), orders))
    for order, vectors in zip(orders, found, strict=True):
        np.testing.assert_array_equal(vectors, expected([texts[i] for i in order]))


def test_a_writer_that_is_killed_leaves_whole_files_alone(tmp_path: Path) -> None:
    script = """
        import os, sys
        from pathlib import Path
        import embedwright.files
        from tests.unit.vectors.test_kept import ASKED, Hashed
        from embedwright.vectors.kept import KeptVectors
        kept = KeptVectors(Hashed(), Path(sys.argv[1]))
        kept.fill(ASKED[:2])
        embedwright.files.sync = lambda path: os._exit(9)  # the content is written, its name is not
        kept.fill(ASKED)
    """
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    encoder = Hashed()
    [left] = [path for path in (tmp_path / next(tmp_path.iterdir())).iterdir() if path.name.startswith(".")]
    assert left.suffix == ".arrow"
    kept = KeptVectors(encoder, tmp_path)
    assert kept.fill(ASKED) == 3 and set(encoder.calls) == set(ASKED[2:])
    np.testing.assert_array_equal(kept.of(ASKED), expected(ASKED))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    kept = KeptVectors(Hashed(), tmp_path)
    kept.fill(ASKED)
    [file] = kept.folder.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{file} is damaged .*: remove it"):
        KeptVectors(Hashed(), tmp_path)


def test_a_model_that_cannot_be_known_again_is_refused(tmp_path: Path) -> None:
    class Plain:
        def encode(self, texts: Sequence[str], task: str | None = None) -> Any:
            return np.ones((len(texts), 2))

    with pytest.raises(ValueError, match="Plain has no fingerprint"):
        KeptVectors(Plain(), tmp_path)
