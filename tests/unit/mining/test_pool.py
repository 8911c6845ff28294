"""Documents made of positives: none is lost, none has another one's id. `test_mine` has what is mined from them."""

from __future__ import annotations

import random

from embedwright.data.answers import class_id, ids_of
from embedwright.data.schema import Example, Passage
from embedwright.mining.pool import Pool, positives_of


def pool_text(pool: Pool, row: int) -> str:
    return pool.document(row)[1]


def test_every_text_is_a_document_and_ids_lead_to_their_texts() -> None:
    rng = random.Random(1)
    for _ in range(100):
        rows = [
            Example(
                f"e{i}",
                rng.choice("ab"),
                "q",
                tuple(
                    Passage(f"text {rng.randrange(9)}", rng.choice([None, "1", "2", "1#2", "p0", "p3"]))
                    for _ in range(rng.randrange(1, 3))
                ),
            )
            for i in range(rng.randrange(1, 9))
        ]
        corpus = positives_of(rows)
        assert sorted(corpus.values()) == sorted({p.text for row in rows for p in row.positives})
        pool = Pool(corpus, rows, ())
        for row in rows:
            for p in row.positives:
                same_id = {o.text for r in rows if r.task == row.task for o in r.positives if p.id and o.id == p.id}
                found = pool.rows_with_id(row.task, [p.id] if p.id else [])
                assert {pool_text(pool, place) for place in found} == same_id
            for place in range(len(pool)):
                known = pool.passage(row.task, place)
                meant = {o.text for r in rows if r.task == row.task for o in r.positives if o.id == known.id}
                assert known.text == pool_text(pool, place) and (not known.id or not meant or known.text in meant)


def test_the_first_text_keeps_the_id_and_numbers_take_no_ids_place() -> None:
    rows = [
        Example(f"e{i}", "t", "q", (Passage(*p),)) for i, p in enumerate([("a",), ("b", "p0"), ("c", "p0"), ("b",)])
    ]
    assert positives_of(rows) == {"p0#2": "a", "p0": "b", "p0#3": "c"}


def test_an_id_of_a_corpus_is_that_of_the_task_whose_text_it_has() -> None:
    rows = [
        Example("e0", "a", "q", (Passage("text of a", "42"),)),
        Example("e1", "b", "q", (Passage("text of b", "42"),)),
    ]
    pool = Pool({"42": "TEXT of a", "7": "else"}, rows, ())
    assert pool.rows_with_id("a", ["42"]) == [0] and pool.rows_with_id("b", ["42"]) == []
    assert pool.passage("b", 0).id is None and pool.passage("a", 0).id == "42" and pool.passage("b", 1).id == "7"
    unknown = Pool({"42": "a third text"}, rows, ())  # no row's own: the safe side
    assert unknown.rows_with_id("a", ["42"]) == unknown.rows_with_id("b", ["42"]) == [0]


def test_a_part_of_a_class_id_finds_all_documents_that_have_it() -> None:
    texts = {"one": ["x", "y"], "two": ["y"], "three": ["z", "x"], "four": ["z"]}
    rows = [Example(text, "t", "q", (Passage(text, class_id(labels)),)) for text, labels in texts.items()]
    pool = Pool(positives_of(rows), rows, ())

    def found(*labels: str) -> set[str]:
        return {pool_text(pool, row) for row in pool.rows_with_id("t", ids_of(Passage("", class_id(labels))))}

    assert found("x") == {"one", "three"} and found("x", "z") == {"one", "three", "four"} and not found("w")
    assert {pool_text(pool, row) for row in pool.rows_with_id("t", [class_id(["x", "y"])])} == {"one"}


def test_a_document_of_a_collection_is_found_from_every_task_under_its_id() -> None:
    rows = [
        Example(f"e{i}", task, "q", (Passage(text, "wiki::1"),)) for i, (task, text) in enumerate(["ax", "by", "az"])
    ]
    pool = Pool(positives_of(rows), rows, ())
    assert {pool_text(pool, row) for row in pool.rows_with_id("b", ["wiki::1"])} == {"x", "y", "z"}
    assert {pool.passage("c", row).id for row in range(3)} == {"wiki::1"}


def test_a_corpus_may_lack_the_name_of_the_collection() -> None:
    """Else `data pairs` followed by `mine --corpus` of the same documents takes each one against its own query."""
    own, other = Passage("a part of one", "wiki::1"), Passage("two", class_id([], ["wiki::2", "wiki::3"]))
    rows = [Example("e0", "a", "q", (own,)), Example("e1", "b", "q", (other,)), Example("e2", "b", "q", (own,))]
    pool = Pool({"1": "all of one", "2": "two", "3": "three", "4": "four"}, rows, ())
    assert pool.rows_with_id("a", ["wiki::1"]) == pool.rows_with_id("b", ["wiki::1"]) == [0]
    assert pool.rows_with_id("b", ids_of(other)) == [1, 2] and pool.rows_with_id("a", ["wiki::4", "news::1"]) == []
    assert [pool.passage("a", row).id for row in range(4)] == ["wiki::1", "wiki::2", "wiki::3", "4"]
    both = Pool(
        {"1": "one of wiki", "news::1": "of news"}, [*rows, Example("e3", "a", "q", (Passage("x", "news::1"),))], ()
    )
    assert both.rows_with_id("a", ["news::1"]) == [1] and both.rows_with_id("a", ["wiki::1"]) == [0]
    assert both.passage("a", 0).id == "1"  # of either collection, for all that is known
    perl = Pool(
        {"Dumper": "a class", "Data::Dumper": "prints"}, [Example("e", "t", "q", (Passage("p", "Data::Dumper"),))], ()
    )
    assert perl.rows_with_id("t", ["Data::Dumper"]) == [1] and perl.passage("t", 0).id == "Dumper"  # such ids are whole
