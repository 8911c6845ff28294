"""Repeated texts against brute force, on texts whose true Jaccard is known pair by pair."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

import pytest

from embedwright.data.clean.repeats import DiskList, DuplicateIndex, repeats
from embedwright.data.keys import NEAR, exact_key, near_key, shingles

WELL_OVER = NEAR + 0.05  # LSH proposes a pair of this Jaccard with probability 0.9999


def drop_duplicates(texts: list[str]) -> tuple[list[int], dict[str, int]]:
    """Indices of the texts that stay, and how many go, by kind."""
    found = repeats(texts)
    exact = sum(match.exact for match in found.values())
    return [i for i in range(len(texts)) if i not in found], {"exact": exact, "near": len(found) - exact}


def leaks(train: list[str], held_out: list[str]) -> tuple[list[int], dict[str, int]]:
    """Indices of the training texts that repeat an evaluation text, and how many, by kind."""
    found = {i: match for i, match in enumerate(DuplicateIndex(held_out).find(train)) if match}
    exact = sum(match.exact for match in found.values())
    return list(found), {"exact": exact, "near": len(found) - exact}


@cache
def shingled(text: str) -> set[str]:
    return shingles(near_key(text))


def jaccard(a: str, b: str) -> float:
    left, right = shingled(a), shingled(b)
    return len(left & right) / len(left | right)


def made_up_texts(count: int, seed: int) -> list[str]:
    """Texts of 20 to 80 words, half of them copies of earlier ones with 0 to 5 words changed, some only in looks."""
    rng = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(400)]
    texts: list[str] = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for place in rng.sample(range(len(words)), k=rng.randrange(6)):
                words[place] = rng.choice(vocabulary)
            text = " ".join(words)
            texts.append(text.upper().replace(" ", "  ") + rng.choice(["\u200b", "!"]) if rng.random() < 0.3 else text)
        else:
            texts.append(" ".join(rng.choices(vocabulary, k=rng.randrange(20, 81))))
    return texts


@pytest.mark.parametrize("seed", range(4))
def test_repeats_agree_with_brute_force(seed: int) -> None:
    texts = made_up_texts(300, seed)
    found = repeats(texts)
    kept = [index for index in range(len(texts)) if index not in found]

    for index, match in found.items():
        assert match.first < index and match.first in kept
        assert match.jaccard == jaccard(texts[index], texts[match.first]) >= NEAR
        assert match.exact == (exact_key(texts[index]) == exact_key(texts[match.first]))
    for a, b in combinations(kept, 2):
        assert exact_key(texts[a]) != exact_key(texts[b])
        assert jaccard(texts[a], texts[b]) < WELL_OVER
    kinds = [match.exact for match in found.values()]
    assert kinds.count(True) > 10 and kinds.count(False) > 10  # the texts do try both kinds


def test_a_copy_of_a_near_repeat_is_one_too() -> None:
    words = [f"w{i}" for i in range(50)]
    near = " ".join([*words[:-1], "other"])
    found = repeats(["first", " ".join(words), near, near.upper()])
    assert {index: (match.first, match.exact) for index, match in found.items()} == {2: (1, False), 3: (1, False)}


def test_a_family_of_near_copies_keeps_its_first_and_what_is_far_from_all_that_is_kept() -> None:
    """Copies of copies drift away: each is near its neighbours, and only those far from all kept ones stay."""
    words = [f"w{i}" for i in range(60)]
    drift = [" ".join([*(f"x{i}" for i in range(k)), *words[k:]]) for k in range(40)]
    found = repeats(drift)
    kept: list[int] = []
    for i, text in enumerate(drift):
        if all(jaccard(text, drift[k]) < NEAR for k in kept):
            kept.append(i)
    assert [i for i in range(len(drift)) if i not in found] == kept and 3 < len(kept) < 20


def test_known_finds_the_nearest_and_prefers_an_equal_one() -> None:
    words = [f"w{i}" for i in range(80)]
    texts = [" ".join([*words[:-k], *(f"{k}x{i}" for i in range(k))]) for k in (6, 3, 1)]
    known = DuplicateIndex([*texts, "Tides  again", "tides again"])
    found = list(known.find([" ".join(words), "TIDES again", "something else", texts[1]]))
    assert [match and (match.first, match.exact) for match in found] == [(2, False), (3, True), None, (1, True)]
    assert found[0] is not None and found[0].jaccard == jaccard(" ".join(words), texts[2])
    assert list(known.find([])) == [] and list(DuplicateIndex([]).find(["a"])) == [None]


def test_a_spool_gives_back_what_was_added() -> None:
    spool, texts = DiskList(), ["", "a", "漢字 né 🙂", "b" * 100_000, ""]
    for i, text in enumerate(texts):
        spool.add(text)
        assert spool[i] == text
    assert len(spool) == 5 and [spool[i] for i in (4, 0, 3, 2, 1)] == ["", "", "b" * 100_000, "漢字 né 🙂", "a"]


def test_scripts_without_spaces_are_compared_letter_by_letter() -> None:
    text = "机器学习模型把句子变成向量然后用余弦相似度比较它们以便找到最相关的文档"
    assert set(repeats([text, text.replace("文档", "文本"), text[::-1]])) == {1}


def test_leaks_agree_with_brute_force() -> None:
    texts = made_up_texts(400, seed=9)
    train, held_out = texts[::2], texts[1::2]
    closest = [max(jaccard(text, other) for other in held_out) for text in train]
    exact = {exact_key(text) for text in held_out}

    indices, counts = leaks(train, held_out)

    assert indices == sorted(indices)
    assert {i for i, j in enumerate(closest) if j >= WELL_OVER} <= set(indices)
    assert set(indices) <= {i for i, j in enumerate(closest) if j >= NEAR}
    assert counts["exact"] == sum(exact_key(text) in exact for text in train) > 10
    assert counts["near"] == len(indices) - counts["exact"] > 10


def test_the_first_copy_is_kept_and_each_kind_counted() -> None:
    words = [f"w{i}" for i in range(50)]
    text, last_word_changed = " ".join(words), " ".join([*words[:-1], "other"])
    kept, counts = drop_duplicates([text, "something else altogether", text.upper(), last_word_changed, text])
    assert kept == [0, 1]
    assert counts == dict(exact=2, near=1)


def test_texts_that_differ_in_a_sign_are_no_repeats() -> None:
    texts = ["?!", "...", "C", "C#", "C++", "-5 < 3", "5 > 3", ":)", ":(", "कि", "की", "is it", "is it?"]
    assert drop_duplicates([*texts, "", " "]) == ([*range(len(texts) + 1)], dict(exact=1, near=0))
    assert drop_duplicates(texts + texts) == ([*range(len(texts))], dict(exact=len(texts), near=0))
    assert leaks(["C++", ":)", "5 > 3"], ["C", "C#", ":(", "-5 < 3"]) == ([], dict(exact=0, near=0))


@pytest.mark.parametrize(
    "other", ["Ｆind\u00a0the MAX val\u00adue", "find  the\u200b max value\ufeff", "FIND the max value\n"]
)
def test_looks_make_no_other_text(other: str) -> None:
    assert drop_duplicates(["find the max value", other]) == ([0], dict(exact=1, near=0))


def test_short_texts_are_near_nothing() -> None:
    """One word decides there; but a leak of the same words is one."""
    assert drop_duplicates(["a b c d", "a b c d!", "a b c"]) == ([0, 1, 2], dict(exact=0, near=0))
    assert drop_duplicates(["a b c d e", "a b c d, e!"]) == ([0], dict(exact=0, near=1))
    assert leaks(["A b c d!", "a b c"], ["a b c d"]) == ([0], dict(exact=0, near=1))


def test_nothing_in_nothing_out() -> None:
    assert drop_duplicates([]) == ([], dict(exact=0, near=0))
    assert leaks(["a text of the training set"], []) == ([], dict(exact=0, near=0))


def test_a_batch_border_changes_nothing() -> None:
    texts = [f"text number {i} has these words and its own {i * i}" for i in range(1030)]
    kept, counts = drop_duplicates([*texts, texts[3], texts[1026]])
    assert kept == list(range(1030))
    assert counts == dict(exact=2, near=0)
