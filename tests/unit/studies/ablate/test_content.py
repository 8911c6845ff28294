"""Each file that decides a cell's score is in its fingerprint, by content: a copy elsewhere is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from embedwright.evaluation.suite import load_suite
from embedwright.model.embedder import Embedder
from embedwright.studies.ablate.content import stage_fingerprints, suite_content
from embedwright.studies.ablate.file import Study
from embedwright.training.run.checks import open_checked

Make = Callable[..., Path]
TASKS = """
name: all
tasks:
  - {name: kinds, kind: classification, path: test.jsonl, train: train.jsonl}
  - {name: docs, kind: reranking, path: docs, candidates: candidates.tsv}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "all"
    (folder / "docs" / "qrels").mkdir(parents=True)
    for name in ("test", "train"):
        rows = [{"text": f"{name} {i}", "label": i % 2} for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("corpus", "queries"):
        (folder / "docs" / f"{name}.jsonl").write_text('{"_id": "a", "text": "b"}\n')
    (folder / "docs" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\ta\t1\n")
    (folder / "candidates.tsv").write_text("a\ta\t1\n")
    (folder / "suite.yaml").write_text(TASKS)
    return folder


FILES = ["test.jsonl", "train.jsonl", "candidates.tsv", "docs/corpus.jsonl", "docs/qrels/test.tsv"]


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_of_a_suite_is_seen_and_a_copy_is_the_same(suite: Path, tmp_path: Path, file: str) -> None:
    before = suite_content(load_suite(suite / "suite.yaml"))
    shutil.copytree(suite, copied := tmp_path / "copied")
    assert suite_content(load_suite(copied / "suite.yaml")) == before
    with (suite / file).open("a") as stream:
        stream.write("\n")
    assert suite_content(load_suite(suite / "suite.yaml")) != before and json.dumps(before)


def test_a_changed_suite_is_another_cell(ablation: Make, started: list[Path], tmp_path: Path) -> None:
    from embedwright.studies.ablate.study import ablate

    first = ablate(ablation(), tmp_path / "out", only=["plain/1"])
    rows = (tmp_path / "suite" / "sts.jsonl").read_text().splitlines()
    (tmp_path / "suite" / "sts.jsonl").write_text("\n".join(rows[::2]))
    second = ablate(ablation(), tmp_path / "out", only=["plain/1"])
    assert len(started) == 2 and first["cells"][0]["mean"] != second["cells"][0]["mean"]


@pytest.mark.parametrize("key", ["mine", "loss.distill"])
def test_the_content_of_a_teacher_that_is_a_folder_is_seen(
    ablation: Make, tmp_path: Path, tiny_decoder: Callable[..., Path], key: str
) -> None:
    teacher = tmp_path / "teacher"
    Embedder.from_decoder(str(tiny_decoder("llama")), pooling="mean", layers=1, max_tokens=40).save(teacher)
    told = {"teacher": str(teacher)} | ({"vector_weight": 1.0} if key == "loss.distill" else {})
    study = Study(ablation(arms={"plain": {}, "b": {f"stages.second.{key}": told}}))
    recipe = study.recipe("b", 1)
    sources = open_checked(recipe)
    before = stage_fingerprints(recipe, sources)
    weights = next(teacher.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    after = stage_fingerprints(recipe, sources)
    assert after[0] == before[0] and after[1] != before[1]
