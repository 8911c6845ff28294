from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwright import files
from embedwright.vectors import store
from embedwright.vectors.shards import Vectors
from embedwright.vectors.store import encode_texts, shard_size, survey

TEXTS = [f"text {i}" for i in range(23)]


class Teacher:
    """A text's vector is drawn by its hash and a seed; `asked` counts texts, and `after` so many it stops."""

    def __init__(self, scale: float = 1.0, after: int = 10**9) -> None:
        self.scale, self.after, self.asked = scale, after, 0

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        self.asked += len(texts)
        if self.asked > self.after:
            raise KeyboardInterrupt
        assert task is None
        return np.stack([np.arange(1, 4) + self.scale * len(text) * int(text.split()[1]) for text in texts])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SHARD", 5)


def rows_of(found: Vectors) -> np.ndarray:
    return np.concatenate([tile for _, tile in found.tiles(7)])


def encode(teacher: Any, folder: Path | None = None, texts: Sequence[str] = TEXTS) -> Vectors:
    return encode_texts(teacher, lambda: iter(texts), len(texts), folder=folder)


def test_in_memory_and_on_disk_are_the_same(tmp_path: Path) -> None:
    held, kept = encode(Teacher()), encode(Teacher(), tmp_path)
    expected = Teacher().encode(TEXTS).astype(np.float32)
    assert held.shape == kept.shape == (23, 3) and held.rows == [5, 5, 5, 5, 3]
    assert np.array_equal(rows_of(held), expected) and np.array_equal(rows_of(kept), expected)
    (home,) = tmp_path.iterdir()
    assert json.loads((home / "manifest.json").read_text()).items() >= {"count": 23, "dimension": 3}.items()
    files = sorted(path.name for path in home.glob("*.arrow"))
    assert files == ["probes.arrow", *(f"shard-0000{i}.arrow" for i in range(5))]


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        encode(Teacher(after=4 + 10), tmp_path)
    (home,) = tmp_path.iterdir()
    assert len(list(home.glob("shard-*"))) == 2
    whole = home / "shard-00001.arrow"
    whole.write_bytes(whole.read_bytes()[:-1])  # as a machine that lost power may leave it
    steps: list[int] = []
    teacher = Teacher()
    found = encode_texts(teacher, lambda: TEXTS, 23, folder=tmp_path, advance=steps.append)
    assert teacher.asked == 4 + 5 + 5 + 5 + 3 and steps == [5, 5, 5, 5, 3]
    assert np.array_equal(rows_of(found), rows_of(encode(Teacher())))
    assert list(tmp_path.iterdir()) == [home]


def test_other_texts_and_other_models_have_their_own_place(tmp_path: Path) -> None:
    encode(Teacher(), tmp_path)
    for teacher, texts in ((Teacher(1.01), TEXTS), (Teacher(), TEXTS[::-1]), (Teacher(), TEXTS[:-1])):
        found = encode(teacher, tmp_path, texts)
        assert np.array_equal(rows_of(found), rows_of(encode(teacher, None, texts)))
    assert len(list(tmp_path.iterdir())) == 4
    again = Teacher(1.01)
    encode(again, tmp_path)
    assert again.asked == 4 and len(list(tmp_path.iterdir())) == 4


def test_a_model_that_cuts_texts_elsewhere_is_another(tmp_path: Path) -> None:
    class Cut(Teacher):
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            return super().encode([text[:40] for text in texts], task)

    texts = [*TEXTS, "text 3 " + "and so on " * 10, *TEXTS[::-1]]
    encode(Teacher(), tmp_path, texts)
    assert np.array_equal(rows_of(encode(Cut(), tmp_path, texts)), rows_of(encode(Cut(), None, texts)))


def test_texts_that_change_while_they_are_read(tmp_path: Path) -> None:
    def fewer() -> Iterator[str]:
        return iter(TEXTS[:20])

    with pytest.raises(ValueError, match="of 23 texts, the corpus gave fewer"):
        encode_texts(Teacher(), fewer, 23)
    with pytest.raises(ValueError, match="of 23 texts, the corpus gave 20"):
        encode_texts(Teacher(), fewer, 23, folder=tmp_path)
    times = iter([TEXTS, [*TEXTS[:7], "text 99", *TEXTS[8:]], TEXTS, TEXTS])
    with pytest.raises(ValueError, match="of 23 texts, the corpus gave others"):
        encode_texts(Teacher(), lambda: next(times), 23, folder=tmp_path)
    (home,) = tmp_path.iterdir()
    assert [path.name for path in home.glob("shard-*")] == ["shard-00000.arrow"]  # no vector of another text is kept
    found = encode_texts(Teacher(), lambda: next(times), 23, folder=tmp_path)
    assert np.array_equal(rows_of(found), rows_of(encode(Teacher())))


def test_two_runs_may_begin_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files._temp_sibling

    def late(path: Path) -> Path:
        monkeypatch.setattr(files, "_temp_sibling", real)
        encode(Teacher(), tmp_path)  # the other run, after our look and before our renaming
        return real(path)

    monkeypatch.setattr(files, "_temp_sibling", late)
    found = encode(Teacher(), tmp_path)
    assert np.array_equal(rows_of(found), rows_of(encode(Teacher())))
    (home,) = tmp_path.iterdir()
    assert len(list(home.iterdir())) == 7


class Named(Teacher):
    """Known by a fingerprint; its vectors are rounded differently every time."""

    def __init__(self, facts: dict[str, str], noise: float = 1e-2) -> None:
        super().__init__()
        self.facts, self.noise = facts, noise

    def fingerprint(self) -> dict[str, str]:
        return self.facts

    def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
        found = super().encode(texts, task)
        return found * (1 + self.noise * np.sin(self.asked))


def test_a_model_is_known_by_its_fingerprint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = {"weights": "a", "contract.max_tokens": "512"}
    encode(Named(facts), tmp_path)
    again = Named(dict(facts))
    encode(again, tmp_path)
    assert again.asked == 0 and not caplog.text  # whatever rounding does
    other = Named({"weights": "a", "contract.max_tokens": "128"}, noise=0)
    encode(other, tmp_path)
    assert other.asked == 4 + 23 and "contract.max_tokens (512, now 128)): encoded again" in caplog.text
    nameless = Teacher()
    encode(nameless, tmp_path)
    assert nameless.asked == 4 + 23
    assert len(list(tmp_path.iterdir())) == 3


def test_a_server_whose_vectors_moved_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = {"kind": "server", "model": "m"}
    encode(Named(server, noise=1e-3), tmp_path)
    encode(Named(server, noise=-1e-3), tmp_path)
    assert not caplog.text  # bfloat16's rounding
    moved = Named(server, noise=0.5)
    encode(moved, tmp_path)
    assert moved.asked == 4 and "another model has this name" in caplog.text


def test_a_model_without_a_fingerprint_may_round(tmp_path: Path) -> None:
    encode(Teacher(), tmp_path)
    rounded, trained = Teacher(1.002), Teacher(1.01)
    encode(rounded, tmp_path)
    encode(trained, tmp_path)
    assert rounded.asked == 4 and trained.asked > 23


def test_blocks_grow_with_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SHARDS", 2)
    assert encode(Teacher()).rows == [11, 11, 1]
    monkeypatch.setattr(store, "_LARGEST_SHARD", 8)
    assert encode(Teacher()).rows == [8, 8, 7]


def test_a_survey_that_does_not_know_the_number_of_rows_cuts_them_as_one_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "_SHARDS", 2)
    monkeypatch.setattr(store, "_LARGEST_SHARD", 20)
    sizes = set()
    for count in range(1, 120):
        rows = [(f"text {i}",) for i in range(count)]
        found = survey(rows)
        assert found == survey(rows, shard_size(count)) and (len(found.digests) <= 4 or found.shard_rows == 20), count
        sizes.add(found.shard_rows)
    assert sizes == {5, 10, 20}


def test_no_text_has_no_vector() -> None:
    assert len(encode(Teacher(), None, [])) == 0


# ---- a million

BUDGET_MB = 800  # of the whole process, libraries included, with 1,000,000 vectors of 1024 numbers: docs/mining.md

MILLION = """
import json, sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from embedwright.data.schema import Example, Passage
from embedwright.mining.mine import mine

folder, rule, documents, width = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


class Corpus(Mapping):
    def __getitem__(self, id_):
        return f"document {id_}"

    def __iter__(self):
        return map(str, range(documents))

    def __len__(self):
        return documents


class Teacher:
    asked = 0

    def encode(self, texts, task=None):
        self.asked += len(texts)
        drawn = np.random.default_rng([len(texts), *texts[0].encode()[-8:]])
        return drawn.standard_normal((len(texts), width), dtype=np.float32)


teacher = Teacher()
examples = [Example(f"e{i}", "t", f"query {i}", (Passage(f"document {i}", str(i)),)) for i in range(256)]
mined, report = mine(examples, Corpus(), teacher, rule=rule, vectors=folder, task="find")
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
print(json.dumps({"peak": peak, "asked": teacher.asked, "negatives": report.negatives, "seconds": report.seconds}))
"""


def run_million(folder: Path, rule: str, documents: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-c", MILLION, str(folder), rule, str(documents), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of peak memory")
def test_a_million_vectors_within_the_budget(tmp_path: Path) -> None:
    """4 GB of vectors: encoded and searched, then searched by another rule without being encoded again."""
    first = run_million(tmp_path, "naive", 1_000_000, 1024)
    again = run_million(tmp_path, "shift", 1_000_000, 1024)
    print(first, again)
    assert first["asked"] == 4 + 1_000_000 + 256 and again["asked"] == 4 + 256
    assert first["negatives"] == again["negatives"] == 256 * 7
    assert max(first["peak"], again["peak"]) < BUDGET_MB
