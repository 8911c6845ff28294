"""Commands in groups of processes, as torchrun starts them: each text is encoded once, results are those of one."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import groups
import numpy as np
import pytest

import embedwright.encoders.open
import embedwright.evaluation.suite  # once, and not in each process
import embedwright.index.faiss_file  # noqa: F401
from embedwright.cli.main import app
from embedwright.data.tables.table import open_examples
from embedwright.model.embedder import Embedder
from embedwright.training.steps import Steps
from embedwright.vectors.shards import read_shard, vectors_of

COUNTS = {"evaluated": (1, 2), "encoded": (1, 2), "indexed": (1, 3), "mined": (1, 2), "failed": (2,), "dry": (2,)}
RUN = {"tracker": "none", "timeout_minutes": 7}


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder], tiny_decoder: Callable[..., Path]
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("g")
    tiny_embedder("latent").save(folder / "model")
    random = np.random.default_rng(0)
    words = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox"]
    texts = [" ".join([f"d{i}", *random.choice(words, random.integers(1, 30))]) for i in range(23)]
    lines(folder / "docs.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    lines(folder / "few.jsonl", [{"text": text} for text in texts[:2]])
    lines(folder / "pairs.jsonl", [{"query": f"q {text[:9]}", "positive": text} for text in texts])
    scored = [{"text1": f"a {texts[i]}", "text2": f"the moon {i % 5}", "score": i % 6} for i in range(12)]
    lines(folder / "sts.jsonl", scored)
    lines(folder / "beir" / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)])
    lines(folder / "beir" / "queries.jsonl", [{"_id": f"q{i}", "text": f"about d{i}"} for i in range(6)])
    (folder / "beir" / "qrels").mkdir()
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(6))
    (folder / "beir" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    (folder / "suite.yaml").write_text(
        "name: s\ntasks:\n- {name: sts, kind: sts, path: sts.jsonl}\n"
        "- {name: beir, kind: retrieval, path: beir, chunk_tokens: 20, instruction: Find it}\n"
    )
    (folder / "bad.yaml").write_text("name: s\ntasks:\n- {name: sts, kind: sts, path: gone.jsonl}\n")
    return groups.run(__file__, folder, COUNTS, str(tiny_decoder("llama"))) | {"folder": folder}


@pytest.mark.parametrize("verb", ["evaluated", "encoded", "indexed", "mined"])
def test_each_text_is_encoded_once_and_the_first_process_alone_speaks(found: dict[str, Any], verb: str) -> None:
    [alone] = found[verb][1]
    assert len(alone["encoded"]) > 1 and alone["said"]
    first, *others = found[verb][COUNTS[verb][1]]
    assert sorted(text for one in (first, *others) for text in one["encoded"]) == sorted(alone["encoded"])
    assert all(one["said"] == "" for one in others)
    assert len(first["said"].splitlines()) == len(alone["said"].splitlines())
    if verb != "indexed":  # two texts for three processes
        assert all(0 < len(one["encoded"]) < len(alone["encoded"]) for one in (first, *others))


def test_the_scores_are_those_of_one_process(found: dict[str, Any]) -> None:
    one, many = (json.loads((found["folder"] / f"scores-{n}.json").read_text()) for n in COUNTS["evaluated"])
    assert [row["task"] for row in many["rows"]] == ["sts", "beir"]
    for ours, theirs in zip(many["rows"], one["rows"], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-6)
    assert many["about"]["fingerprint"] == one["about"]["fingerprint"]


@pytest.mark.parametrize("verb", ["encoded", "indexed"])
def test_the_vectors_are_those_of_one_process_in_order(found: dict[str, Any], verb: str) -> None:
    one, many = (found["folder"] / f"{verb}-{n}" for n in COUNTS[verb])
    assert (one / "manifest.json").read_text() == (many / "manifest.json").read_text()
    ours, theirs = (read_shard(folder / "shard-00000.arrow") for folder in (many, one))
    column = "document" if verb == "indexed" else "text"
    assert ours[column].to_pylist() == theirs[column].to_pylist()
    np.testing.assert_allclose(vectors_of(ours), vectors_of(theirs), atol=2e-6)


def test_the_negatives_are_those_of_one_process(found: dict[str, Any]) -> None:
    one, many = ([*open_examples(found["folder"] / f"mined-{n}.jsonl")] for n in COUNTS["mined"])
    assert [row.negatives for row in many] == [row.negatives for row in one] and one[0].negatives


def test_a_dry_run_writes_nothing_and_waits_as_long_as_the_recipe_says(found: dict[str, Any]) -> None:
    first, second = found["dry"][2]
    assert not (found["folder"] / "run").exists()
    assert first["limit"] == second["limit"] == 7 * 60 and "2 processes (ddp)" in first["said"] and not second["said"]


def test_bad_input_ends_all_processes(found: dict[str, Any]) -> None:
    first, second = found["failed"][2]
    assert "gone.jsonl" in first["error"] and "gone.jsonl" in second["error"]


# ---- in the processes


def command(*words: object) -> dict[str, Any]:
    """Runs a command; tells what it printed and which texts this process has encoded."""
    encode, encoded, said = Embedder.encode, list[str](), io.StringIO()

    def counted(self: Embedder, texts: list[str], task: str | None = None, **options: Any) -> Any:
        encoded.extend(dict.fromkeys(texts))
        return encode(self, texts, task=task, **options)

    Embedder.encode = counted  # type: ignore[method-assign]
    with redirect_stdout(said):
        error = groups.raised(lambda: app([str(word) for word in words], standalone_mode=False))
    return {"said": said.getvalue(), "encoded": encoded, "error": error}


def count_of() -> str:
    return os.environ["WORLD_SIZE"]


def evaluated(folder: Path, _: str) -> dict[str, Any]:
    return command("eval", folder / "model", folder / "suite.yaml", "--out", folder / f"scores-{count_of()}.json")


def encoded(folder: Path, _: str) -> dict[str, Any]:
    return command("encode", folder / "model", folder / "docs.jsonl", folder / f"encoded-{count_of()}")


def indexed(folder: Path, _: str) -> dict[str, Any]:
    return command("index", folder / "model", folder / "few.jsonl", folder / f"indexed-{count_of()}")


def mined(folder: Path, _: str) -> dict[str, Any]:
    out, teacher = folder / f"mined-{count_of()}.jsonl", folder / "model"
    return command("mine", folder / "pairs.jsonl", "--out", out, "--teacher", teacher, "--rule", "naive")


def failed(folder: Path, _: str) -> dict[str, Any]:
    return command("eval", folder / "model", folder / "bad.yaml")


def given(folder: Path, *words: str) -> dict[str, Any]:
    os.chdir(folder)
    os.environ["EMBEDWRIGHT_CACHE"] = str(folder / "cache")
    return command(*words)


def dry(folder: Path, decoder: str) -> dict[str, Any]:
    stage = {"name": "s", "data": [{"path": str(folder / "pairs.jsonl")}], "in_batch_negatives": "all"}
    stage |= {"hard_negatives": 0, "optim": {"lr": 1e-3, "steps": 1, "batch_queries": 2}}
    model = {"base": decoder, "pooling": "mean", "layers": 1}
    recipe = {"name": "dry", "model": model, "stages": [stage], "run": RUN | {"out": str(folder / "run")}}
    file, limits, take = folder / f"dry-{os.environ['RANK']}.yaml", list[float](), Steps.take
    file.write_text(json.dumps(recipe))

    def taken(*given: Any) -> Any:
        limits.append(groups.limit())
        return take(*given)

    Steps.take = taken  # type: ignore[method-assign]
    return command("train", file, "--dry-run") | {"limit": max(limits)}
