"""Parts through the command: N shards are one run, a part goes on by itself, and a folder of parts opens everywhere."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from fake_llm import Body, FakeLLM, Reply, command

from embedwright.data.files.tasks import write_tasks
from embedwright.data.schema import Example, Task
from embedwright.data.tables.table import open_examples
from embedwright.index.build import build_index
from embedwright.model.embedder import Embedder
from embedwright.vectors.corpus import encode_corpus

N = 3
WORDS = [a + b for a in ("tide", "moon", "sea", "wave", "salt", "sand") for b in ("ra", "ne", "lo", "mi", "ku")]
Run = Callable[..., None]


def words(seed: object, count: int) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=count))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[Example]:
    return list(open_examples(path))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0) -> None:
        assert command(monkeypatch, *arguments) == code

    return call


def author(body: Body, n: int) -> Reply:
    """Writes other words for each question; a passage that says `right` is a positive."""
    prompt, seed = body["messages"][0]["content"], body["seed"]
    if '"verdict"' in prompt:
        return Reply(json.dumps({"verdict": "positive" if "Another text:\nright" in prompt else "negative"}))
    if '"tasks"' in prompt:
        return Reply(json.dumps({"tasks": [f"Given {words((seed, i), 5)}, find it" for i in range(20)]}))
    return Reply(json.dumps({key: words((seed, key), 12) for key in re.findall(r'"(\w+)"', prompt)}))


@pytest.fixture
def server() -> Iterator[FakeLLM]:
    with FakeLLM(author) as fake:
        yield fake


# ---- clean


def test_shards_clean_as_one_run_does_and_near_repeats_go_within_a_part(run: Run, tmp_path: Path) -> None:
    """Every second row repeats an earlier one in other letters, anywhere in the file; some rows leak."""
    plain = [{"id": f"{i}", "query": f"{words(i, 6)}", "positives": [words((i, "p"), 9)]} for i in range(60)]
    copies = [{**row, "id": f"{row['id']} again", "query": f" {row['query'].upper()}"} for row in plain]
    rows = random.Random(0).sample([*plain, *copies], 120)
    leaks = write(tmp_path / "test.jsonl", [{"query": row["query"], "positive": "x"} for row in plain[::7]])
    write(tmp_path / "all.jsonl", rows)
    write_tasks(tmp_path / "all.jsonl.tasks.jsonl", [Task(name="all", instruction="Find it", licence="mit")])
    clean = ("data", "clean", "all.jsonl", "--against", leaks)
    run(*clean, "--out", "one.jsonl")
    for index in (1, 0, 2):
        run(*clean, "--out", "parts.parquet", "--shard", f"{index}/{N}")
    one, parts = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "parts.parquet")
    assert len(one) == 60 - len(plain[::7]) and sorted(parts, key=lambda e: e.id) == sorted(one, key=lambda e: e.id)
    assert open_examples(tmp_path / "parts.parquet").tasks == open_examples(tmp_path / "one.jsonl").tasks != {}
    place = {row["id"]: i for i, row in enumerate(rows)}
    for index in range(N):  # each part keeps the order of the file
        own = [
            place[example.id] for example in rows_of(tmp_path / f"parts.parquet/part-0000{index}-of-0000{N}.parquet")
        ]
        assert own == sorted(own) and own
    reports = [json.loads(file.read_text()) for file in sorted((tmp_path / "parts.parquet").glob("*.report.json"))]
    assert sum(report["kept"] for report in reports) == len(one)
    assert sum((Counter(report["rows_removed"]) for report in reports), Counter()).keys() == {
        "repeated_exact",
        "leaked",
    }
    assert sum(report["tasks"]["all"] for report in reports) == len(rows)
    whole = [json.loads(line) for line in (tmp_path / "one.jsonl.leaks.jsonl").read_text().splitlines()]
    found = [json.loads(line) for file in (tmp_path / "parts.parquet").glob("*.leaks.jsonl") for line in file.open()]
    assert sorted(found, key=lambda leak: leak["row"]) == whole and len(whole) == len(plain[::7])

    run(*clean, "--out", "parts.parquet", "--shard", f"0/{N}", "--min-words", 7, code=2)
    run(*clean, "--out", "parts.parquet", code=2)
    run(*clean, "--out", "others", "--shard", f"0/{N}", "--repeats", "positive", code=2)


def test_near_repeats_in_other_parts_stay(run: Run, tmp_path: Path) -> None:
    base = [f"w{i}" for i in range(40)]
    texts = [" ".join([*base[:-1], f"other{i}"]) for i in range(12)]  # each is near each
    write(tmp_path / "near.jsonl", [{"id": t, "query": t, "positives": ["the answer"]} for t in texts])
    run("data", "clean", "near.jsonl", "--out", "one.jsonl")
    for index in range(N):
        run("data", "clean", "near.jsonl", "--out", "parts", "--shard", f"{index}/{N}")
    assert [e.id for e in rows_of(tmp_path / "one.jsonl")] == texts[:1]
    kept = [sum(1 for _ in file.open()) for file in sorted((tmp_path / "parts").glob("part-?????-of-?????.jsonl"))]
    assert max(kept) == 1 < sum(kept) == len(rows_of(tmp_path / "parts"))  # one of each part


# ---- relabel and synth


def test_shards_relabel_as_one_run_does_and_a_part_that_failed_goes_on(
    run: Run, tmp_path: Path, server: FakeLLM
) -> None:
    """The answer to a question in one part is known in another, and nobody is asked about it."""
    rows = [
        {
            "id": f"{i}",
            "task": "t",
            "query": f"question {i % 20}",
            "positives": [f"answer {i}"],
            "negatives": [f"right {words(i, 5)}", f"wrong {words(i, 6)}", f"answer {(i + 20) % 40}"],
        }
        for i in range(40)
    ]
    write(tmp_path / "mined.jsonl", rows)
    relabel = ("data", "relabel", "mined.jsonl", "--base-url", server.url, "--model", "m")
    run(*relabel, "--out", "one.jsonl")
    asked = len(server.requests)
    assert asked == 80  # two of the three negatives of a row
    for index in (0, 2):
        run(*relabel, "--out", "parts", "--shard", f"{index}/{N}")
    before = len(server.requests)
    server.reply = lambda body, n: Reply(status=503) if n >= before + 9 else author(body, n)
    run(*relabel, "--out", "parts", "--shard", f"1/{N}", "--concurrency", 1, code=1)
    server.reply = author
    for index in range(N):
        run(*relabel, "--out", "parts", "--shard", f"{index}/{N}")
    answered = server.requests[asked : before + 9] + server.requests[-(80 - (before - asked) - 9) :]
    assert len({body["messages"][0]["content"] for body in answered}) == len(answered) == 80  # none was paid for twice
    one, parts = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "parts")
    assert parts == one and all([p.text.split()[0] for p in e.negatives] == ["wrong"] for e in one)
    run(*relabel[:-1], "another", "--out", "parts", "--shard", f"0/{N}", code=2)


def test_shards_synthesize_as_one_run_does_and_share_the_tasks(run: Run, tmp_path: Path, server: FakeLLM) -> None:
    synth = ("synth", "--base-url", server.url, "--model", "m", "--count", 25, "--types", "short-short,long-short")
    run(*synth, "--out", "one.jsonl")
    once = Counter(body["messages"][0]["content"] for body in server.requests)
    server.requests.clear()
    for index in (2, 0, 1):
        run(*synth, "--out", "parts", "--shard", f"{index}/{N}")
    assert Counter(body["messages"][0]["content"] for body in server.requests) == once
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "one.jsonl")
    tasks = open_examples(tmp_path / "parts").tasks
    assert tasks == open_examples(tmp_path / "one.jsonl").tasks and len(tasks) > 1
    server.requests.clear()
    run(*synth, "--out", "parts", "--shard", f"1/{N}")
    assert not server.requests  # the part is done
    run(*synth, "--out", "parts", "--shard", f"1/{N}", "--seed", 1, code=2)


# ---- encode, and a folder of parts as data


def test_shards_encode_as_one_run_does(
    run: Run, tmp_path: Path, tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files, byte for byte; the corpus is a folder of parts."""
    tiny_embedder("mean").save(tmp_path / "model")
    for encodes in (encode_corpus, build_index):
        monkeypatch.setitem(encodes.__kwdefaults__, "shard_rows", 5)
    (tmp_path / "corpus").mkdir()
    for index in range(2):
        documents = [{"_id": f"d{index}{i}", "text": words((index, i), 5)} for i in range(13)]
        write(tmp_path / f"corpus/part-0000{index}-of-00002.jsonl", documents)
    run("encode", "model", "corpus", "one")
    for index in (2, 0):
        run("encode", "model", "corpus", "parts", "--shard", f"{index}/{N}")
    run("search", "model", "parts", "tides", code=2)  # one is missing
    run("encode", "model", "corpus", "parts", "--shard", f"1/{N}")
    one, parts = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "parts"))
    assert parts == one and len(one) == 6 + 2
    run("index", "model", "corpus", "parts")
    run("search", "model", "parts", "tides")


def test_parts_of_two_models_of_one_name_are_not_mixed(
    run: Run, tmp_path: Path, tiny_embedder: Callable[..., Embedder], capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a folder that was trained on between two parts. A part that is done opens no teacher."""
    rows = [{"id": f"{i}", "query": f"q{i}", "positives": [words(i, 5)]} for i in range(6)]
    mine = ("mine", write(tmp_path / "data.jsonl", rows), "--teacher", "model", "--out", "parts", "--rule", "naive")
    tiny_embedder("mean").save(tmp_path / "model")
    tiny_embedder("last").save(tmp_path / "other")
    run(*mine, "--shard", "0/2")
    (tmp_path / "model").rename(tmp_path / "first")
    run(*mine, "--shard", "0/2")
    (tmp_path / "other").rename(tmp_path / "model")
    run(*mine, "--shard", "1/2", code=2)
    assert "parts holds parts made with fingerprints" in capsys.readouterr().err
    (tmp_path / "model").rename(tmp_path / "other")
    (tmp_path / "first").rename(tmp_path / "model")
    run(*mine, "--shard", "1/2")


def test_parts_of_two_cross_encoders_of_one_name_are_not_mixed(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vocabulary.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        config = transformers.BertConfig(vocab_size=len(WORDS) + 5, num_labels=1, **sizes)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "judge")
        transformers.BertTokenizerFast(str(tmp_path / "vocabulary.txt")).save_pretrained(tmp_path / "judge")

    rows = [{"query": f"q{i}", "positives": ["tidera"], "negatives": ["moonne"]} for i in range(6)]
    path = write(tmp_path / "mined.jsonl", rows)
    relabel = ("data", "relabel", path, "--cross-encoder", "judge", "--threshold", 0.5, "--out", "parts")
    save(0)
    for index in (0, 1):
        run(*relabel, "--shard", f"{index}/3")
    save(1)
    run(*relabel, "--shard", "2/3", code=2)
    assert "parts holds parts made with judge 'judge (" in capsys.readouterr().err


def test_a_folder_of_parts_is_trained_on_mined_and_searched_as_a_file_is(
    run: Run, tmp_path: Path, tiny_decoder: Callable[..., Path], tiny_embedder: Callable[..., Embedder]
) -> None:
    rows = [{"id": f"{i}", "task": "t", "query": f"q{i}", "positives": [words(i, 5)]} for i in range(12)]
    documents = [{"_id": f"d{i}", "text": words((i, "d"), 5)} for i in range(9)]
    write(tmp_path / "data.jsonl", rows)
    write(tmp_path / "docs.jsonl", documents)
    for name, each in (("data", rows), ("docs", documents)):
        (tmp_path / f"{name}.parts").mkdir()
        for index in range(N):
            own = each[index * len(each) // N : (index + 1) * len(each) // N]
            write(tmp_path / f"{name}.parts/part-0000{index}-of-0000{N}.jsonl", own)
    tiny_embedder("mean").save(tmp_path / "model")
    outcomes = []
    for ending in ("jsonl", "parts"):
        mine = ("mine", f"data.{ending}", "--corpus", f"docs.{ending}", "--teacher", "model", "--negatives", 2)
        run(*mine, "--rule", "naive", "--out", f"mined-{ending}.jsonl")
        stage: dict[str, Any] = {"name": "S1", "data": [{"path": f"data.{ending}", "task": {"name": "t"}}]}
        stage |= {
            "in_batch_negatives": "all",
            "hard_negatives": 0,
            "optim": {"lr": 1e-3, "steps": 2, "batch_queries": 4},
        }
        recipe = {
            "name": "tiny",
            "model": {"base": str(tiny_decoder("llama")), "pooling": "mean", "max_tokens": 40},
            "stages": [stage],
            "run": {"out": f"run-{ending}", "tracker": "none"},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run("train", "recipe.yaml")
        losses = [json.loads(line)["loss"] for line in (tmp_path / f"run-{ending}/metrics.jsonl").open()]
        outcomes.append((losses, rows_of(tmp_path / f"mined-{ending}.jsonl")))
    assert outcomes[0] == outcomes[1]
