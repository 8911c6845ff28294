"""Leaks against brute force: every pair's Jaccard, and BM25 by a reference of ten lines."""

from __future__ import annotations

import gzip
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest

from embedwright.data.clean.leaks import LONGER, SHOWN, Bm25, EvalTexts, read_eval_texts
from embedwright.data.keys import NEAR, exact_key, jaccard, near_key, shingles
from embedwright.data.schema import DataError
from embedwright.data.tables.table import write_examples

Row = dict[str, Any]


def write(path: Path, *rows: Row | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---- BM25


def weights(texts: list[str], k1: float = 1.5, b: float = 0.75) -> list[dict[str, float]]:
    """BM25 weight of each word in each text, as Lucene has it."""
    words = [text.split() for text in texts]
    frequency = Counter(word for text in words for word in set(text))
    mean = sum(map(len, words)) / len(words)
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in frequency.items()}
    return [
        {word: idf[word] * n / (n + k1 * (1 - b + b * len(text) / mean)) for word, n in Counter(text).items()}
        for text in words
    ]


def reference(query: str, texts: list[str]) -> list[float]:
    """The fraction of each text's self-score that `query` reaches, 0 for texts it is too long for."""
    words, table = query.split(), weights(texts)
    return [
        sum(weight for word, weight in row.items() if word in words) / sum(row.values())
        if len(words) <= LONGER * len(text.split())
        else 0.0
        for text, row in zip(texts, table, strict=True)
    ]


def vocabulary_texts(count: int, rng: random.Random, others: Sequence[str] = ()) -> list[str]:
    """Texts of 1 to 14 words, rare ones among them, some twice; two in five are made of an earlier or an other text."""
    words = [f"w{i}" for i in range(150)]
    texts: list[str] = []
    for _ in range(count):
        text = rng.choices(words, weights=[1 / (i + 1) for i in range(150)], k=rng.randrange(1, 15))
        if texts and rng.random() < 0.4:
            text = rng.choice([*texts, *others]).split()
            rng.shuffle(text)
            text = text[: rng.randrange(1, len(text) + 1)] + rng.choices(words, k=rng.randrange(3))
        texts.append(" ".join(text))
    return texts


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_bm25_finds_the_best_match_of_the_reference(threshold: float) -> None:
    rng = random.Random(round(threshold * 10))
    texts = vocabulary_texts(150, rng)
    queries = vocabulary_texts(150, rng, texts)
    index = Bm25(texts, threshold)
    found = 0
    for query in queries:
        fractions = reference(query, texts)
        best = index.best(query)
        if best is None:
            assert max(fractions) < threshold
        else:
            found += 1
            assert best[1] == pytest.approx(max(fractions), abs=1e-9) and best[1] >= threshold - 1e-9
            assert best[1] == pytest.approx(fractions[best[0]], abs=1e-9)
    assert 10 < found < 150  # of each sort there are some


def test_bm25_weights_are_the_librarys() -> None:
    texts = vocabulary_texts(60, random.Random(3))
    library = bm25s.BM25()
    library.index([text.split() for text in texts], show_progress=False)
    index = Bm25(texts, 0.1)
    for i, text in enumerate(texts):
        assert index.self_score_N[i] == pytest.approx(library.get_scores(sorted(set(text.split())))[i], rel=1e-5)
    query = texts[7].split()[0]
    scores = library.get_scores([query]) / index.self_score_N
    scores[index.lengths_N * LONGER < 1] = 0
    best = index.best(query)
    assert best is not None and best[1] == pytest.approx(float(np.max(scores)), rel=1e-5)


def test_a_fraction_is_the_same_whatever_the_order_of_words() -> None:
    """Sums of the same weights differ in their last bits, and each process has an order of its own."""
    rng, words = random.Random(1), " ".join(vocabulary_texts(5, random.Random(3))).split()
    alike = [" ".join(rng.sample(words, len(words))) for _ in range(40)]
    index = Bm25([*alike, *vocabulary_texts(60, random.Random(4))], 0.9)
    assert {index.best(text) for text in alike} == {(0, 1.0)}


def test_a_word_said_twice_counts_once() -> None:
    index = Bm25(["tides rise and fall", "the moon pulls"], 0.9)
    assert index.best("tides tides tides tides") is None
    assert index.best("fall and rise tides") == (0, pytest.approx(1.0))


def test_a_long_text_that_holds_all_words_is_no_leak() -> None:
    index = Bm25(["what do i need", "how do tides work today"], 0.9)
    long_enough, too_long = "what do i need exactly here", "what do i need exactly here now"
    assert len(too_long.split()) > LONGER * 4 >= len(long_enough.split())
    assert index.best(long_enough) == (0, pytest.approx(1.0))
    assert index.best(too_long) is None


def test_bm25_of_unknown_words_and_of_nothing() -> None:
    index = Bm25(["tides rise and fall"], 0.5)
    assert index.best("zebras") is None and index.best("") is None
    assert index.best("tides rise and fall zebras") == (0, pytest.approx(1.0))


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.01])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold is"):
        Bm25(["a b"], threshold)


# ---- all rules


def injected(rng: random.Random) -> tuple[list[str], list[str], dict[int, tuple[str, int]]]:
    """Training texts, evaluation texts, and what was put in: training index -> rule, evaluation index."""
    words = [f"wort{i}é" for i in range(3000)]
    held = [" ".join(rng.sample(words, k=30)) for _ in range(200)]
    train = [" ".join(rng.sample(words, k=30)) for _ in range(500)]
    where = rng.sample(range(500), k=90)
    known = {}
    for n, place in enumerate(where):
        target = rng.randrange(200)
        text = held[target].split()
        if n < 30:
            same = held[target].upper().replace(" ", "  ").replace("É", "E\u0301\u00ad")
            train[place], rule = f"  {same}", "exact"
        elif n < 40:
            train[place], rule = f"{held[target].replace(' ', ' - ')}!", "near"
        elif n < 60:
            text[rng.choice([0, -1])] = "other"
            train[place], rule = " ".join(text), "near"
        else:
            rng.shuffle(text)
            train[place], rule = " ".join(text), "bm25"
        known[place] = (rule, target)
    return train, held, known


@pytest.mark.parametrize("seed", range(3))
def test_every_injected_leak_is_found_and_nothing_else(seed: int, tmp_path: Path) -> None:
    train, held, known = injected(random.Random(seed))
    file = write(
        tmp_path / "test.jsonl", *({"text": text, "label": i % 5, "id": f"h{i}"} for i, text in enumerate(held))
    )
    leaks = {i: leak for i, leak in enumerate(EvalTexts([file]).find(train)) if leak}

    assert {i: (leak.rule, leak.held.row) for i, leak in leaks.items()} == {
        i: (rule, f"h{target}") for i, (rule, target) in known.items()
    }
    table = weights([near_key(text) for text in held])
    for i, leak in leaks.items():
        target = known[i][1]
        assert (leak.held.file, leak.held.text) == (str(file), held[target][:SHOWN])
        score = jaccard(shingles(near_key(train[i])), shingles(near_key(held[target])))
        if leak.rule == "bm25":
            mine = set(near_key(train[i]).split())
            covered = sum(w for word, w in table[target].items() if word in mine) / sum(table[target].values())
            assert score < NEAR and leak.score == pytest.approx(covered)
        else:
            assert leak.score == score >= NEAR
            assert (exact_key(train[i]) == exact_key(held[target])) == (leak.rule == "exact")


@pytest.mark.parametrize(
    ("train", "held"),
    [
        ("write a list in C", "write a list in C++"),
        ("C#", "C"),
        ("-5 < 3", "5 > 3"),
        (":)", ":("),
        ("what costs 50% of it", "what costs 50 of it"),
        ("a/b", "a b"),
    ],
)
def test_texts_that_differ_in_a_sign_are_no_leaks(train: str, held: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"text": held, "label": 0}, {"text": "something else", "label": 1})
    assert list(EvalTexts([file]).find([train])) == [None]


@pytest.mark.parametrize(
    ("train", "rule"),
    [
        ("How do ti\u00addes work in the bay of Fun\u200bdy", "exact"),
        ("ＨＯＷ do tides\u00a0work in the bay\ufeff of Fundy", "exact"),
        ("how do tides work in the bay of Fundy?", "near"),
        ("“how do tides work”, in the bay of Fundy!", "near"),
    ],
)
def test_invisible_characters_hide_no_leak(train: str, rule: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"text": "how do tides work in the bay of Fundy", "label": 0})
    (leak,) = EvalTexts([file], bm25=None).find([train])
    assert leak is not None and leak.rule == rule


def test_the_same_few_words_with_other_punctuation_leak(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"text": "How do tides work?", "label": 0})
    found = EvalTexts([file], bm25=None).find(["how do tides work", "how do tides not work"])
    assert [leak and leak.rule for leak in found] == ["near", None]


def test_bm25_can_be_left_out(tmp_path: Path) -> None:
    train, held, known = injected(random.Random(5))
    file = write(tmp_path / "test.jsonl", *({"text": text, "label": "x"} for text in held))
    rules = Counter(leak.rule for leak in EvalTexts([file], bm25=None).find(train) if leak)
    assert rules == Counter(rule for rule, _ in known.values() if rule != "bm25")


def test_exact_goes_before_near_and_near_before_bm25(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(40)]
    file = write(
        tmp_path / "t.jsonl", {"text": " ".join([*words[:-1], "x"]), "label": 0}, {"text": " ".join(words), "label": 0}
    )
    held_out = EvalTexts([file])
    exact, near, bm25 = held_out.find([" ".join(words), " ".join([*words, "y"]), " ".join(words[::-1])])
    assert exact and near and bm25
    assert (exact.rule, exact.held.row) == ("exact", "t.jsonl:2")
    assert (near.rule, near.held.row) == ("near", "t.jsonl:2")
    assert (bm25.rule, bm25.held.row) == ("bm25", "t.jsonl:2")


# ---- evaluation data


def beir(folder: Path, *splits: str, end: str = "") -> Path:
    write(folder / f"corpus.jsonl{end}", {"_id": "d1", "title": "Tides", "text": "rise"}, {"_id": "d2", "text": ""})
    write(
        folder / f"queries.jsonl{end}",
        *({"_id": f"q-{name}", "text": f"query of {name}"} for name in (*splits, "none")),
    )
    for name in splits:
        write(folder / "qrels" / f"{name}.tsv{end}", "query-id\tcorpus-id\tscore", f"q-{name}\td1\t1", "")
    return folder


def texts(*paths: Path, corpus: bool = False) -> list[tuple[str, str, str]]:
    return [(Path(held.file).name, held.row, held.text) for held in read_eval_texts(paths, corpus)]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_queries_of_all_splits_but_train_count_and_documents_on_request(tmp_path: Path, end: str) -> None:
    folder = beir(tmp_path / "set", "train", "dev", "test", end=end)
    queries = [(f"queries.jsonl{end}", f"q-{name}", f"query of {name}") for name in ("dev", "test")]
    assert texts(folder) == queries
    assert texts(folder, corpus=True) == [*queries, (f"corpus.jsonl{end}", "d1", "Tides rise")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "positive": "p"}, ["q", "p"]),
        ({"text": "t", "label": "l"}, ["t"]),
        ({"text1": "a", "text2": "b", "score": 3}, ["a", "b"]),
        ({"text1": "a", "text2": "b", "label": 0}, ["a", "b"]),
        ({"query": "q", "positives": ["p1", {"id": "d", "text": "p2"}], "negatives": ["n"]}, ["q", "p1", "p2"]),
    ],
)
def test_the_texts_of_each_kind(tmp_path: Path, row: Row, expected: list[str]) -> None:
    file = write(tmp_path / "x.jsonl", row, {**row, "id": "own"})
    assert texts(file) == [("x.jsonl", name, text) for name in ("x.jsonl:1", "own") for text in expected]


def test_a_folder_is_read_at_any_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    beir(tmp_path / "retrieval", "test")
    write(tmp_path / "a.jsonl.gz", {"text": "one", "label": 0})
    write(tmp_path / "deep" / "down" / "b.jsonl", {"text": "two", "label": 0})
    write_examples(tmp_path / "c.parquet", [])
    write(tmp_path / "README.md", "no data")
    (tmp_path / "c.parquet").unlink()
    with caplog.at_level(logging.INFO):
        assert sorted(text for *_, text in texts(tmp_path)) == ["one", "query of test", "two"]
    assert "README.md: not read" in caplog.text


def test_what_cannot_protect_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        texts(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no data file"):
        texts(tmp_path / "empty")
    bad = write(tmp_path / "bad.jsonl", {"text": "t", "label": "l"}, "{broken")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not JSON"):
        texts(bad)
    blank = write(tmp_path / "blank.jsonl", {"text": "t", "label": "l"}, {"text": " ", "label": "l"})
    with pytest.raises(DataError, match=r"blank\.jsonl:2: text is empty"):
        texts(blank)
    with pytest.raises(DataError, match="no split but train"):
        texts(beir(tmp_path / "trained", "train"))
    folder = beir(tmp_path / "torn", "test")
    write(folder / "queries.jsonl", {"_id": "other", "text": "x"})
    with pytest.raises(DataError, match="query 'q-test' is judged but not there"):
        texts(folder)


def test_what_stands_beside_evaluation_data_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", {"text": "one", "label": "a"})
    write(tmp_path / "x.jsonl.tasks.jsonl", {"name": "x", "instruction": "do"})
    write(tmp_path / "x.jsonl.quarantine.jsonl", "broken")
    write(tmp_path / ".x.0f1e.jsonl", {"text": "half written", "label": "a"})
    write(tmp_path / "y.csv", "text,label", "two,b")
    assert sorted(held.text for held in read_eval_texts([tmp_path])) == ["one", "two"]
