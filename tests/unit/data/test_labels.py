from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from embedwright.data.labels import label_triples
from embedwright.data.schema import DataError

DRAWN = [("t8", "t6", "t10", "t7"), ("t9", "t6", "t8", "t11"), ("t6", "t4", "t9", "t3")]
ROWS = [(f"text {i} of class {c}", f"class {c}") for i in range(20) for c in range(6)]


def test_examples_of_several_classes() -> None:
    examples, report = label_triples(ROWS, task="intents")
    label_of = dict(ROWS)
    assert [example.query for example in examples] == [text for text, _ in ROWS]
    assert [example.id for example in examples[:2]] == ["intents:0", "intents:1"]
    for example in examples:
        own = label_of[example.query]
        (positive,) = example.positives
        assert positive.text != example.query and label_of[positive.text] == own
        assert len({n.text for n in example.negatives}) == 7
        assert all(label_of[n.text] != own for n in example.negatives)
    assert report == {"conflicting": 0, "singleton": 0, "fewer_negatives": 0}


def test_a_row_draws_the_same_whatever_the_hash_seed_is() -> None:
    code = (
        "from embedwright.data.labels import label_triples\n"
        "rows = [(f'text {i} of class {c}', f'class {c}') for i in range(9) for c in range(5)]\n"
        "print(hash('x'), label_triples(rows, task='t', seed=3))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    outputs = [process.communicate()[0].split(" ", 1) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0][0] != outputs[1][0]  # the hash seeds did differ
    assert outputs[0][1] == outputs[1][1]


def test_the_seed_changes_what_is_drawn_and_the_number_of_negatives_only_the_negatives() -> None:
    base, _ = label_triples(ROWS, task="t", seed=1)
    assert label_triples(ROWS, task="t", seed=1)[0] == base
    assert label_triples(ROWS, task="t", seed=2)[0] != base
    fewer, _ = label_triples(ROWS, task="t", seed=1, negatives=2)
    assert [(e.positives, e.negatives) for e in fewer] == [(e.positives, e.negatives[:2]) for e in base]


def test_classes_are_drawn_uniformly_and_not_by_their_size() -> None:
    rows = [(f"own {i}", "own") for i in range(2000)] + [(f"big {i}", "big") for i in range(3960)]
    rows += [(f"small {i}", "small") for i in range(40)]
    examples, _ = label_triples(rows, task="t", negatives=1)
    drawn = Counter(example.negatives[0].text.split()[0] for example in examples[:2000])
    assert 900 < drawn["small"] < 1100  # 1000 +- 4.5 standard deviations; 20 if drawn by size


def test_every_member_of_a_class_is_a_positive() -> None:
    rows = [(f"a {i}", "a") for i in range(300)] + [("b 0", "b"), ("b 1", "b"), ("c 0", "c")]
    examples, _ = label_triples(rows, task="t")
    drawn = {example.positives[0].text for example in examples if example.query.startswith("a")}
    assert 170 < len(drawn) < 210  # 300 draws with replacement out of 299: 189 distinct are expected


def test_a_class_of_one_gives_no_example_but_stays_a_negative() -> None:
    rows = [("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("alone", "c")]
    examples, report = label_triples(rows, task="t", negatives=3)
    assert [example.query for example in examples] == ["a1", "a2", "b1", "b2"]
    assert report["singleton"] == 1
    assert all("alone" in {n.text for n in example.negatives} for example in examples)
    assert report["fewer_negatives"] == 0
    assert label_triples(rows, task="t", negatives=4)[1]["fewer_negatives"] == 4


def test_repeated_texts_are_never_their_own_positive_and_conflicting_ones_are_left_out() -> None:
    rows = [("same", "a"), ("same", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c"), ("c2", "c")]
    rows += [("both", "a"), ("both", "b")]
    examples, report = label_triples(rows, task="t")
    assert report["conflicting"] == 2
    assert [example.query for example in examples] == ["same", "same", "a2", "b1", "b2", "c1", "c2"]
    assert [example.positives[0].text for example in examples[:3]] == ["a2", "a2", "same"]
    for example in examples:
        texts = [passage.text for passage in example.positives + example.negatives]
        assert "both" not in texts and example.query not in texts and len(texts) == len(set(texts))


def test_looks_of_one_text_are_one_text() -> None:
    rows = [("Buy now", "spam"), ("buy  now ", "ham"), ("a", "spam"), ("b", "spam"), ("c", "ham"), ("d", "ham")]
    examples, report = label_triples(rows, task="t", form="example")
    assert report["conflicting"] == 2 and {example.query for example in examples} == set("abcd")
    alike = [("Buy now", "spam"), ("buy  now ", "spam"), *rows[2:]]
    for seed in range(9):
        for example in label_triples(alike, task="t", form="example", seed=seed)[0]:
            assert example.positives[0].text.lower().split() != example.query.lower().split()
    with pytest.raises(DataError, match=r"'Spam' stands for \['Spam', 'spam'\]"):
        label_triples([("a", "Spam"), ("b", "spam")], task="t", form="label")


def test_a_class_with_one_text_repeated_is_a_class_of_one() -> None:
    rows = [("same", "a"), ("same", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c"), ("c2", "c")]
    examples, report = label_triples(rows, task="t")
    assert report["singleton"] == 2 and len(examples) == 4


def test_two_labels_take_the_label_form() -> None:
    rows = [("great", "positive"), ("awful", "negative"), ("fine", "positive")]
    examples, report = label_triples(rows, task="t")
    sides = [(e.query, e.positives[0].text, [n.text for n in e.negatives]) for e in examples]
    assert sides == [
        ("great", "positive", ["negative"]),
        ("awful", "negative", ["positive"]),
        ("fine", "positive", ["negative"]),
    ]
    assert not any(report.values())


def test_the_form_can_be_asked_for() -> None:
    rows = [("great", "+"), ("awful", "-"), ("fine", "+"), ("poor", "-")]
    assert label_triples(rows, task="t", form="example")[0][0].positives[0].text == "fine"
    examples, _ = label_triples(ROWS, task="t", form="label", negatives=3)
    for example, (_, label) in zip(examples, ROWS, strict=True):
        assert example.positives[0].text == label
        wrong = {n.text for n in example.negatives}
        assert len(wrong) == 3 and label not in wrong and all(text.startswith("class ") for text in wrong)


@pytest.mark.parametrize("rows", [[], [("a", "x"), ("b", "x")], [("a", "x"), ("a", "y"), ("b", "y")]])
def test_one_label_is_not_enough(rows: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError, match="at least two"):
        label_triples(rows, task="t")


# ---- closed lists, words, several labels


def test_rows_of_labels_that_are_not_known_are_counted_and_of_no_use() -> None:
    rows = [*ROWS[:30], ("odd one", "unheard of"), *ROWS[30:]]
    known = {label for _, label in ROWS}
    examples, report = label_triples(rows, task="t", known=known)
    assert report == {"unseen": 1, "conflicting": 0, "singleton": 0, "fewer_negatives": 0}
    assert len(examples) == len(ROWS)
    assert "odd one" not in {p.text for e in examples for p in e.positives + e.negatives}
    assert examples[30].id == "t:31"  # the row keeps its number
    assert label_triples(rows[:30], task="t", known=["class 0", "class 1"])[1]["unseen"] == 20
    with pytest.raises(DataError, match="at least two"):
        label_triples(rows, task="t", known=["class 0"])


def test_a_row_that_is_not_known_makes_no_conflict() -> None:
    rows = [("same", "a"), ("same", "junk"), ("a2", "a"), ("b1", "b"), ("b2", "b")]
    examples, report = label_triples(rows, task="t", known=["a", "b"], form="example")
    assert (report["unseen"], report["conflicting"], len(examples)) == (1, 0, 4)


def test_words_stand_for_labels_in_the_label_form_alone() -> None:
    rows = [("great", "1"), ("awful", "0"), ("fine", "1"), ("poor", "0")]
    words = {"0": "negative", "1": "positive"}
    examples, _ = label_triples(rows, task="t", words=words)
    sides = [(e.positives[0].text, [n.text for n in e.negatives]) for e in examples]
    assert sides == [("positive", ["negative"]), ("negative", ["positive"])] * 2
    same, _ = label_triples(rows, task="t", words={}, form="example")
    assert same == label_triples(rows, task="t", form="example")[0]


@pytest.mark.parametrize(
    ("words", "said"), [({"0": "negative"}, "no words for label '1'"), ({"0": "bad", "1": "bad"}, "'bad' stands for")]
)
def test_words_that_would_mislead_are_refused(words: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        label_triples([("great", "1"), ("awful", "0")], task="t", words=words)


MANY = [
    (f"text {i}", [f"l{i % 5}", *([f"l{i * i % 7}"] if i % 3 else []), *(["rare"] if i in (4, 30) else [])])
    for i in range(60)
]


def test_of_several_labels_a_positive_shares_one_and_a_negative_none() -> None:
    labels_of = {text: set(labels) for text, labels in MANY}
    examples, report = label_triples(MANY, task="t", negatives=5, seed=2)
    assert len(examples) == 60 and report == {"conflicting": 0, "singleton": 0, "fewer_negatives": 0}
    shared = []
    for example in examples:
        own = labels_of[example.query]
        (positive,) = example.positives
        assert positive.text != example.query and labels_of[positive.text] & own
        shared.append(labels_of[positive.text] & own)
        assert len({n.text for n in example.negatives}) == 5
        assert not any(labels_of[n.text] & own for n in example.negatives)
    assert any("l0" not in labels and len(labels_of[e.query]) > 1 for e, labels in zip(examples, shared, strict=True))
    assert label_triples(MANY, task="t", negatives=5, seed=2)[0] == examples
    assert label_triples(MANY, task="t", negatives=5, seed=3)[0] != examples


def test_every_label_of_a_row_gives_positives() -> None:
    rows = [("q", ["a", "b"]), ("only a", ["a"]), ("only b", ["b"]), ("c1", ["c"]), ("c2", ["c"])]
    drawn = {label_triples(rows, task="t", seed=seed)[0][0].positives[0].text for seed in range(20)}
    assert drawn == {"only a", "only b"}


def test_a_label_that_nobody_shares_gives_no_positive_while_another_does() -> None:
    rows = [("q", ["own", "a"]), ("a1", ["a"]), ("c1", ["c"]), ("c2", ["c"]), ("alone", ["x", "y"])]
    examples, report = label_triples(rows, task="t")
    assert examples[0].positives[0].text == "a1"
    assert report["singleton"] == 1 and "alone" in {n.text for n in examples[0].negatives}


def test_the_last_negatives_are_found_among_many_texts_that_share_a_label() -> None:
    """Nearly every draw meets a text that shares a label: what is left is listed, so no row runs on for ever."""
    rows = [(f"both {i}", ["a", f"own {i}"]) for i in range(400)] + [("free", ["own 3"]), ("q2", ["z", "a"])]
    examples, report = label_triples(rows, task="t", negatives=2)
    assert {n.text for n in examples[0].negatives} == {"free"}
    assert report["fewer_negatives"] >= 400
    assert [n.text for n in examples[3].negatives] == []  # it shares its own label with the free one


def test_order_and_repetition_of_labels_make_no_conflict_but_another_set_does() -> None:
    rows = [("x", ["a", "b"]), ("x", ["b", "a", "a"]), ("y", ["a"]), ("y", ["a", "b"]), ("a1", ["a"]), ("c", ["c"])]
    examples, report = label_triples(rows, task="t")
    assert report["conflicting"] == 2 and [e.query for e in examples] == ["x", "x", "a1"]


def test_in_the_label_form_all_labels_of_a_text_are_positives() -> None:
    rows = [("q", ["a", "b"]), ("r", ["c"]), ("s", ["a", "b", "c"])]
    examples, report = label_triples(rows, task="t", form="label")
    sides = [([p.text for p in e.positives], [n.text for n in e.negatives]) for e in examples]
    assert sides[0] == (["a", "b"], ["c"]) and sides[2] == (["a", "b", "c"], [])
    assert sides[1][0] == ["c"] and sorted(sides[1][1]) == ["a", "b"]
    assert report["fewer_negatives"] == 1


def test_a_list_of_one_label_draws_as_the_label_itself() -> None:
    listed = [(text, [label]) for text, label in ROWS]
    assert label_triples(listed, task="t", seed=5)[0] == label_triples(ROWS, task="t", seed=5)[0]


def test_single_labels_draw_what_they_always_drew() -> None:
    """Cached tables of labelled files stand for these draws: a change needs another `table.FORMAT`."""
    examples, _ = label_triples([(f"t{i}", f"c{i % 4}") for i in range(12)], task="t", negatives=3, seed=1)
    assert [(e.positives[0].text, *(n.text for n in e.negatives)) for e in examples[:3]] == DRAWN


def test_a_row_without_a_label_is_named() -> None:
    with pytest.raises(DataError, match="row 1: no label"):
        label_triples([("x", ["a"]), ("y", []), ("z", ["b"])], task="t")
