from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from embedwright.errors import InputError
from embedwright.index.build import build_index
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve import map as serve_map
from embedwright.serve.map import map_of

ROWS = [
    {"id": "a", "title": "Tides", "text": "the rise and fall of the sea. " * 6, "year": 1999, "lang": "en"},
    {"id": "b", "title": "", "text": "a dog\nand a fox, who do not mind " * 9, "year": None, "lang": "de"},
    {"id": "c", "title": "Moon", "text": "gravity", "year": 2020, "lang": "en"},
    {"id": "d", "title": "Names", "text": "Ada, Grace, Barbara", "year": 1952, "lang": None},
    {"id": "e", "title": "Numbers", "text": "3.14 and 2.71 " * 12, "year": 2001, "lang": "en"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> Path:
    at = tmp_path_factory.mktemp("mapped")
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return build_index(
        tiny_embedder("mean"), at / "rows.jsonl", at / "index", chunk_tokens=24, metadata=["year", "lang"], shard_rows=4
    )


def test_a_document_lies_where_the_mean_of_its_chunks_points(folder: Path) -> None:
    found = map_of(Index.open(folder))
    shards = pa.concat_tables(pa.ipc.open_file(shard).read_all() for shard in sorted(folder.glob("shard-*.arrow")))
    document, vectors = shards["document"].to_numpy(), np.array(shards["vector"].to_pylist())
    assert len(vectors) > 2 * len(ROWS) and len(list(folder.glob("shard-*.arrow"))) > 2
    means = np.array([vectors[document == row].mean(axis=0) for row in range(len(ROWS))])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(means - means.mean(axis=0))
    points = np.array([found["x"], found["y"]]).T
    there, wanted = (np.linalg.norm(x[:, None] - x, axis=2) for x in (points, u[:, :2] * s[:2]))
    np.testing.assert_allclose(there / there.max(), wanted / wanted.max(), atol=2e-3)  # four digits are kept


def test_a_point_has_what_a_page_shows_of_it(folder: Path) -> None:
    found = map_of(Index.open(folder))
    assert found["ids"] == [row["id"] for row in ROWS] and found["of"] == 5 and found["method"].startswith("PCA")
    start = "a dog and a fox, who do not mind a dog and a fox, who do not mind a dog and a fo"
    assert found["titles"] == ["Tides", start, "Moon", "Names", "Numbers"]
    assert found["metadata"] == {name: [row[name] for row in ROWS] for name in ("year", "lang")}


def test_of_many_documents_a_sample_is_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_map, "POINTS", 3)
    index = Index.open(folder)
    found = map_of(index)
    assert len(found["ids"]) == len(found["x"]) == len(found["metadata"]["lang"]) == 3 and found["of"] == 5
    assert found["ids"] == sorted(found["ids"]) and found == map_of(index)


def test_deleted_documents_are_not_on_the_map(folder: Path) -> None:
    index = Index.open(folder)
    index.live_N = np.array([True, False, True, True, False])
    found = map_of(index)
    assert found["ids"] == ["a", "c", "d"] and found["of"] == 3
    index.live_N = np.eye(5, dtype=bool)[0]
    with pytest.raises(InputError, match="at least two"):
        map_of(index)
