"""The teachers by name, against bm25s called by hand and against what a fair draw must give."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from embedwright.cli.main import app
from embedwright.data.schema import Example, Passage
from embedwright.data.tables.table import open_examples
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.encoders.sharded import ShardedEncoder
from embedwright.errors import InputError
from embedwright.mining import mine as mine_module
from embedwright.mining import pool as pool_module
from embedwright.mining import rank as rank_module
from embedwright.mining.choose import Miner
from embedwright.mining.mine import mine
from embedwright.mining.pool import Pool
from embedwright.mining.rules import teacher_of
from embedwright.model.embedder import Embedder
from embedwright.processes import Processes

NOUNS = ["cat", "dog", "river", "stone", "house", "tree", "moon", "boat", "bread", "king", "rain", "song"]


def lexical() -> tuple[dict[str, str], list[Example]]:
    """A corpus of 70 texts, and 30 questions; every third positive is no document, every fifth shares no word."""
    random = np.random.default_rng(11)
    corpus = {f"d{i}": " ".join([f"item{i}", *random.choice(NOUNS, random.integers(3, 9))]) for i in range(70)}
    rows = []
    for i in range(30):
        own = f"d{random.integers(70)}"
        positive = Passage(f"outside {random.choice(NOUNS)} number {i}") if i % 3 == 0 else Passage(corpus[own], own)
        positive = Passage(f"wholly different {i}") if i % 5 == 0 else positive
        question = " ".join(random.choice(NOUNS, 3, replace=False))
        rows.append(Example(f"e{i}", "t", f"Which {question} is question{i}?", (positive,)))
    return corpus, rows


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rows.jsonl and corpus.jsonl of `lexical`, in a folder that commands are in."""
    monkeypatch.chdir(tmp_path)
    corpus, rows = lexical()
    lines = [{"id": r.id, "task": "t", "query": r.query, "positives": [r.positives[0].text]} for r in rows]
    Path("rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in corpus.items()))


def ids(rows: Sequence[Example]) -> list[list[str | None]]:
    return [[p.id for p in row.negatives] for row in rows]


def by_hand(corpus: dict[str, str], rows: Sequence[Example]) -> tuple[np.ndarray, dict[str, int]]:
    """bm25s's scores (Q, N) over the corpus and the positives that it lacks, and the column of each text."""
    texts = list(dict.fromkeys([*corpus.values(), *(p.text for row in rows for p in row.positives)]))
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize([row.query for row in rows], stopwords="en", return_ids=False, show_progress=False)
    return np.stack([index.get_scores(some) for some in words]), {text: column for column, text in enumerate(texts)}


# ---- BM25


@pytest.mark.parametrize(
    ("rule", "margin"), [("naive", None), ("shift", 2), ("abs", 1.5), ("margin", 0.5), ("perc", None)]
)
def test_bm25_equals_bm25s_by_hand(rule: Any, margin: float | None) -> None:
    corpus, rows = lexical()
    mined, report = mine(rows, corpus, "bm25", rule=rule, margin=margin, negatives=4, depth=20)
    scores, column = by_hand(corpus, rows)
    expected, listed = [], 0
    for row, score in zip(rows, scores, strict=True):
        positive = score[column[row.positives[0].text]]
        ranked = sorted((c for c in range(70) if score[c] > 0), key=lambda c: -score[c])[:20]  # sorted() is stable
        listed += len(ranked)
        others = [c for c in ranked if c != column[row.positives[0].text]]
        keep = {
            "naive": lambda rank, s: True,
            "shift": lambda rank, s: rank >= 2,
            "abs": lambda rank, s: s <= 1.5,
            "margin": lambda rank, s, p=positive: s < p - 0.5,
            "perc": lambda rank, s, p=positive: s < p * 0.95,
        }[rule]
        expected.append([f"d{c}" for rank, c in enumerate(others) if keep(rank, score[c])][:4])
    assert ids(mined) == expected and report.candidates == listed
    for row, score in zip(mined, scores, strict=True):
        assert row.positive_scores == pytest.approx([score[column[p.text]] for p in row.positives], rel=1e-6)
        assert row.negative_scores == pytest.approx([score[column[p.text]] for p in row.negatives], rel=1e-6)
    if rule == "perc":  # nothing scores below a positive that shares no word with its question
        assert all(not row.negatives for row in mined[::5]) and any(row.negatives for row in mined)


def test_bm25_holds_the_texts_of_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, rows = lexical()
    whole = mine(rows, corpus, "bm25", rule="naive", negatives=4)[0]
    held, rows_of = list[int](), Pool.rows_of

    def counted(self: Pool, examples: Iterable[Example]) -> tuple[dict[str, int], list[str]]:
        found = rows_of(self, examples)
        held.append(len(found[0]))
        return found

    monkeypatch.setattr(Pool, "rows_of", counted)
    monkeypatch.setattr(pool_module, "_CHUNK", 3)
    monkeypatch.setattr(mine_module, "AT_ONCE", 3)
    assert mine(rows, corpus, "bm25", rule="naive", negatives=4)[0] == whole
    assert len(held) >= 20 and max(held) <= 3 * max(len(row.positives) + len(row.negatives) for row in rows)


def test_perc_takes_what_bm25_ranks_below_the_positive_alone() -> None:
    corpus = {
        "above": "tides tides moon",
        "positive": "the moon and tides and much else besides",
        "below": "tides of men",
    }
    corpus |= {"none": "bread and butter"}
    row = Example("e", "t", "why tides, moon?", (Passage(corpus["positive"], "positive"),))
    assert ids(mine([row], corpus, "bm25", rule="naive")[0]) == [["above", "below"]]  # "none" shares no word
    assert ids(mine([row], corpus, "bm25")[0]) == [["below"]]


def test_the_instruction_is_no_part_of_bm25s_query() -> None:
    corpus = {"1": "find passages", "2": "tides rise", "3": "the moon"}
    row = Example("e", "t", "tides", (Passage("the sea"),))
    assert ids(mine([row], corpus, "bm25", rule="naive", task="find passages")[0]) == [["2"]]


def test_the_search_is_done_where_the_teacher_is(
    tiny_embedder: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the first GPU of the machine, which may hold the model of another process."""
    asked: list[Any] = []
    top_k = rank_module.top_k
    monkeypatch.setattr(rank_module, "top_k", lambda *given: asked.append(given[3]) or top_k(*given[:3]))
    model = tiny_embedder("mean")

    class Elsewhere:
        device = torch.device("cuda:3")

        def encode(self, texts: Sequence[str], task: str | None = None) -> Any:
            return model.encode(texts, task=task)

    class Shared(ShardedEncoder):
        def encode(self, texts: Sequence[str], task: str | None = None, **options: Any) -> Any:
            return self.encoder.encode(texts, task=task)

    rows = [Example("e", "t", "moon", (Passage("tide"),))]
    for teacher in (model, Elsewhere(), Shared(Elsewhere(), 0, Processes())):
        mine(rows, {"a": "tide", "b": "sun"}, teacher, rule="naive", negatives=1, task=None)
    assert asked == [torch.device("cpu"), Elsewhere.device, Elsewhere.device]
    assert SentenceTransformerEncoder(Elsewhere()).device == Elsewhere.device


def test_bm25_joins_an_ensemble() -> None:
    corpus, rows = lexical()
    texts = [*corpus.values(), *(row.query for row in rows), *(p.text for row in rows for p in row.positives)]
    random = np.random.default_rng(2)
    vectors = {text: random.standard_normal(8).astype(np.float32) for text in texts}

    class Lookup:
        def encode(self, texts: Sequence[str], task: str | None = None) -> np.ndarray:
            return np.stack([vectors[text] for text in texts])

    settings: dict[str, Any] = {"rule": "naive", "negatives": 3, "seed": 4}
    words, dense = (mine(rows, corpus, one, **settings)[0] for one in ("bm25", Lookup()))
    crossed, _ = mine(rows, corpus, ["bm25", Lookup()], **settings)
    assert crossed == [(words, dense)[teacher_of(row.id, 2, 4)][i] for i, row in enumerate(rows)]
    both, _ = mine(rows, corpus, ["bm25", Lookup()], ensemble="intra-sample", **settings)
    for one, first, second in zip(both, words, dense, strict=True):
        found = [p for pair in zip(first.negatives, second.negatives, strict=True) for p in pair]
        assert list(one.negatives) == list(dict.fromkeys(found))[:3]


# ---- by chance


def drawn(rows: Sequence[Example], corpus: dict[str, str], negatives: int = 1, **settings: Any) -> list[Any]:
    return ids(mine(rows, corpus, "random", rule="naive", negatives=negatives, **settings)[0])


def test_chance_is_uniform_over_what_may_be_taken() -> None:
    corpus = {f"d{i}": f"document {i}" for i in range(16)}
    rows = [Example(f"e{i}", "t", f"q{i}", (Passage("document 3", "d3"),)) for i in range(3000)]
    found = drawn(rows, corpus)
    counts = [sum(own == [f"d{i}"] for own in found) for i in range(16)]
    assert counts[3] == 0 and sum(counts) == 3000
    assert chisquare(counts[:3] + counts[4:]).pvalue > 0.01
    pairs = drawn(rows, corpus, 2)
    assert [own[:1] for own in pairs] == found and all(first != second for first, second in pairs)
    assert chisquare([sum(own[1] == f"d{i}" for own in pairs) for i in range(16) if i != 3]).pvalue > 0.01


def test_chance_draws_none_twice_and_is_seeded_by_example() -> None:
    corpus, rows = lexical()
    found = drawn(rows, corpus, 7)
    assert drawn(rows[::-1], corpus, 7) == found[::-1] and drawn(rows, corpus, 7, seed=1) != found
    everything = drawn(rows, corpus, 90)
    for row, own in zip(rows, everything, strict=True):
        assert sorted(own) == sorted(set(corpus) - {p.id for p in row.positives})
    assert len({tuple(own) for own in everything}) == len(rows)


def test_chance_has_no_scores_and_obeys_the_exclusions() -> None:
    corpus = {"1": "The moon", "2": "the  MOON", "3": "why tides?", "4": "boats", "5": "Boats", "6": "given"}
    row = Example("e", "t", "Why tides?", (Passage("the moon", "9"),), negatives=(Passage("given", "6"),))
    seen: list[tuple[int, int]] = []
    mined, report = mine([row], corpus, "random", rule="naive", negatives=9, progress=lambda *at: seen.append(at))
    assert len(mined[0].negatives) == 2 and mined[0].negatives[1].text.lower() == "boats"
    assert (mined[0].positive_scores, mined[0].negative_scores) == (None, None)
    assert report.scores["negatives"] == [] and report.candidates == 6 and seen == [(1, 1)]
    assert json.loads(json.dumps(report.to_json()))["queries_short"] == 1


# ---- what does not fit


@pytest.mark.parametrize(
    ("teacher", "settings", "said"),
    [
        ("random", {}, "no scores for rule 'perc': use rule 'naive'"),
        ("random", {"rule": "shift"}, "no scores for rule 'shift'"),
        ("random", {"rule": "naive", "sampled": True}, "draws already"),
        (["random", "bm25"], {"rule": "naive"}, "let it mine alone"),
        ("bm25", {"rule": "abs"}, "needs a margin: 0.7 is one for cosines"),
        ("bm25", {"rule": "margin"}, "needs a margin: 0.05"),
    ],
)
def test_rules_that_a_teacher_cannot_follow(teacher: Any, settings: dict[str, Any], said: str) -> None:
    corpus, rows = lexical()
    with pytest.raises(InputError, match=re.escape(said)):
        mine(rows, corpus, teacher, **settings)
    with pytest.raises(InputError, match="no word"):
        mine([Example("e", "t", "q", (Passage("!"),))], {"1": "?"}, "bm25")


def test_the_command_takes_them_by_name(files: None) -> None:
    corpus, rows = lexical()
    for name, rule in (("bm25", "naive"), ("random", "naive"), ("bm25", "perc")):
        words = f"mine rows.jsonl --corpus corpus.jsonl --teacher {name} --rule {rule} --out o.jsonl"
        app(words.split(), standalone_mode=False)
        assert ids(list(open_examples(Path("o.jsonl")))) == ids(mine(rows, corpus, name, rule=rule)[0])  # type: ignore[arg-type]


def test_the_command_mines_parts_that_are_the_whole(files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that was killed is mined again, one that is done is not, and other settings are refused."""

    def run(out: str, *more: str) -> None:
        words = "mine rows.jsonl --corpus corpus.jsonl --teacher bm25 --rule naive"
        app([*words.split(), "--out", out, *more], standalone_mode=False)

    run("whole.parquet")
    for part in ("2/3", "0/3"):
        run("parts.parquet", "--shard", part)
    written = {path: path.stat().st_mtime_ns for path in Path("parts.parquet").glob("*.parquet")}
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Miner, "_take", lambda *_: (_ for _ in ()).throw(MemoryError))
        run("parts.parquet", "--shard", "1/3")
    with pytest.raises(InputError, match=r"negatives 7, and this is 3"):
        run("parts.parquet", "--shard", "1/3", "--negatives", "3")
    with pytest.raises(InputError, match="each part's report lies beside it"):
        run("parts.parquet", "--shard", "1/3", "--report", "report")
    Path("rows.jsonl.tasks.jsonl").write_text('{"name": "t", "instruction": "Find another thing"}\n')
    with pytest.raises(InputError, match="parts made with tasks"):
        run("parts.parquet", "--shard", "1/3")
    Path("rows.jsonl.tasks.jsonl").unlink()
    for part in ("1/3", "2/3"):
        run("parts.parquet", "--shard", part)
    assert list(open_examples(Path("parts.parquet"))) == list(open_examples(Path("whole.parquet")))
    assert len(written) == 2 and all(path.stat().st_mtime_ns == time for path, time in written.items())
