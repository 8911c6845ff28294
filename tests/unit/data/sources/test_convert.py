"""Rows in the schema of each public set, as a hub gives them, and what becomes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedwright.data.files.kinds import Row
from embedwright.data.files.quarantine import Quarantine
from embedwright.data.labels import LabelRules
from embedwright.data.schema import DataError, Example
from embedwright.data.sources.catalog import Entry, load_catalog
from embedwright.data.sources.convert import HOPELESS, Job, Table, convert

Rows = list[dict[str, Any]]
Bad = list[tuple[int, str]]


class InMemory(Quarantine):
    def __init__(self) -> None:
        super().__init__(Path("rows"), Path("none"))
        self.bad: Bad = []

    def add(self, number: int, line: bytes, error: DataError, file: Path | None = None) -> None:
        self.count += 1
        self.reasons.append(str(error))
        self.bad.append((number, str(error)))


def tables(**rows: Rows) -> Any:
    """`open_table` for tables by config; `main` is the one without a config of its own."""

    def open_table(table: Table) -> Iterator[tuple[int, bytes, Row]]:
        for number, row in enumerate(rows.get(table.config or "main", rows.get("main", [])), 1):
            yield number, b"", row

    return open_table


def run(name: str | Entry, rows: Rows | None = None, **options: Any) -> tuple[list[Example], dict[str, int], Bad]:
    several = options.pop("tables", None)
    entry = load_catalog()[name] if isinstance(name, str) else name
    rules = {key: options.pop(key) for key in LabelRules._fields if key in options}
    options["labels"] = LabelRules(**{"form": entry.form} | rules)
    quarantine = InMemory()
    job = Job(task=entry.name, entry=entry, quarantine=quarantine, **options)
    examples = list(convert(job, several or tables(main=rows or [])))
    return examples, {key: count for key, count in job.report.items() if count}, quarantine.bad


def sides(examples: Iterable[Example]) -> list[tuple[str, list[str], list[str]]]:
    return [(e.query, [p.text for p in e.positives], [n.text for n in e.negatives]) for e in examples]


# ---- pairs


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("nq", {"query": "who?", "answer": "she"}, ("who?", ["she"], [])),
        ("paq", {"query": "who?", "answer": "she"}, ("who?", ["she"], [])),
        ("stackexchange", {"title_body": "how? so", "upvoted_answer": "thus"}, ("how? so", ["thus"], [])),
        (
            "squad",
            {
                "id": "5733be284776f41900661182",
                "title": "Moon",
                "context": "It is round.",
                "question": "Which shape?",
                "answers": {"text": ["round"], "answer_start": [6]},
            },
            ("Which shape?", ["It is round."], []),
        ),
        (
            "arguana",
            {"_id": "d1", "title": "Tides", "text": "They rise.", "query": "do they?"},
            ("do they?", ["Tides They rise."], []),
        ),
        ("bioasq", {"_id": "2", "title": "", "text": "A study.", "query": "what?"}, ("what?", ["A study."], [])),
        ("miracl", {"anchor": "q", "positive": "p", "negative": "n"}, ("q", ["p"], ["n"])),
        ("mrtydi", {"anchor": "q", "positive": "p", "negative": "p"}, ("q", ["p"], [])),
    ],
)
def test_pairs(name: str, row: Row, expected: tuple[str, list[str], list[str]]) -> None:
    examples, report, bad = run(name, [dict(row)])
    assert sides(examples) == [expected] and bad == []
    assert examples[0].id == ("5733be284776f41900661182" if name == "squad" else f"{name}:1")
    assert report == {"rows": 1, **({"conflicting": 1} if name == "mrtydi" else {})}


def test_bad_rows_are_named_and_the_rest_goes_on() -> None:
    rows = [{"query": "a", "answer": "b"}, {"query": " ", "answer": "b"}, {"query": "c"}, {"query": 3, "answer": "x"}]
    examples, report, bad = run("nq", [*rows, {"query": "d", "answer": "e"}])
    assert [e.id for e in examples] == ["nq:1", "nq:5"] and report == {"rows": 5}
    said = ["query is empty", "no column 'answer'; the row has query", "query: expected a text, not int"]
    assert bad == list(zip((2, 3, 4), said, strict=True))


def test_other_columns_than_expected_stop_the_conversion() -> None:
    rows = [{"question": "q", "answer": "a"}] * HOPELESS
    with pytest.raises(
        DataError, match="nq: the first 1,000 rows are all bad: no column 'query'; the row has question"
    ):
        run("nq", rows)
    good = {"query": "q", "answer": "a"}
    assert len(run("nq", rows[1:])[2]) == HOPELESS - 1
    examples, _, bad = run("nq", [good, *rows, good])
    assert len(examples) == 2 and len(bad) == HOPELESS


@pytest.mark.parametrize("name", ["nq", "stsb", "nli"])
def test_a_limit_is_a_sample_of_all_rows_in_their_order(name: str) -> None:
    rows = [
        {"query": f"q{i:03}", "answer": "a"}
        | {"sentence1": f"q{i:03}", "sentence2": "b", "score": 5.0}
        | {"premise": f"q{i:03}", "hypothesis": "h", "label": 0}
        for i in range(400)
    ]
    found = []
    for seed in (0, 0, 1):
        examples, report, _ = run(name, rows, limit=100, seed=seed)
        queries = [q for q in (e.query for e in examples) if q != "b"]
        assert report == {"rows": 400, "not_drawn": 300} and len(queries) == 100 and queries == sorted(queries)
        assert 20 <= sum(q < "q200" for q in queries) <= 80  # a fair coin is outside once in 10^9
        found.append(queries)
    assert found[0] == found[1] != found[2]


def test_wordings_are_spread_by_query_and_seed_and_all_rows_of_a_question_have_one() -> None:
    rows = [{"query": f"{'qQ'[i % 2]}{i // 2} ", "answer": f"a{i}"} for i in range(50)]
    of_question: dict[str, set[str]] = {}
    for example in run("paq", rows)[0]:
        of_question.setdefault(example.query.lower(), set()).add(example.task)
    assert len(of_question) == 25 and all(len(tasks) == 1 for tasks in of_question.values())
    drawn = [e.task for e in run("paq", rows)[0]]
    assert set(drawn) == {"paq", "paq.2"}
    named = {e.query: e.task for e in run("paq", rows)[0]}
    assert all(named[e.query] == e.task for e in run("paq", rows, limit=30)[0])
    assert [e.task for e in run("paq", rows, seed=1)[0]] != drawn


@pytest.mark.parametrize("name", ["miracl", "mrtydi"])
def test_triples_of_a_query_become_one_example(name: str) -> None:
    rows = [
        {"anchor": "who?", "positive": "she", "negative": "he"},
        {"anchor": "when?", "positive": "then", "negative": "she"},
        {"anchor": "Who? ", "positive": "her name", "negative": "SHE"},  # an answer by another row
        {"anchor": "who?", "positive": "She", "negative": "it"},
        {"anchor": "who?", "positive": "she", "negative": "He"},
    ]
    examples, report, _ = run(name, rows)
    assert sides(examples) == [("who?", ["she", "her name"], ["he", "it"]), ("when?", ["then"], ["she"])]
    assert [example.id for example in examples] == [f"{name}:1", f"{name}:2"]
    assert report == {"rows": 5, "conflicting": 1}
    for seed in range(5):
        drawn, report, _ = run(name, rows, limit=1, seed=seed)
        assert drawn == [example for example in examples if example.id == drawn[0].id] and report["not_drawn"] == 1


# ---- NLI and scored pairs


@pytest.mark.parametrize("name", ["nli", "multi_nli"])
def test_entailment_is_positive_and_the_rest_a_hard_negative(name: str) -> None:
    rows = [
        {"premise": "A man sleeps.", "hypothesis": "Someone rests.", "label": 0},
        {"premise": "A dog runs.", "hypothesis": "A cat runs.", "label": 2},
        {"premise": "A man sleeps.", "hypothesis": "He dreams of tea.", "label": 1},
        {"premise": "A man sleeps.", "hypothesis": "He dances.", "label": 2},
        {"premise": "A man sleeps.", "hypothesis": "Nobody agreed.", "label": -1},
        {"premise": "A man sleeps.", "hypothesis": "A person is asleep.", "label": 0},
        {"premise": "A man sleeps.", "hypothesis": "Someone rests.", "label": 1},
        {"premise": "A dog runs.", "hypothesis": "It is outside.", "label": 1},
        {"premise": "A dog runs.", "hypothesis": "", "label": 0},
    ]
    examples, report, bad = run(name, rows)
    expected = ("A man sleeps.", ["Someone rests.", "A person is asleep."], ["He dreams of tea.", "He dances."])
    assert sides(examples) == [expected] and examples[0].id == f"{name}:1"
    assert report == {"rows": 9, "other_label": 1, "no_positive": 2, "conflicting": 1}
    assert bad == [(9, "hypothesis is empty")]


def test_pairs_at_the_threshold_go_in_both_directions() -> None:
    rows = [
        {"sentence1": "a", "sentence2": "b", "score": 4.0},
        {"sentence1": "c", "sentence2": "d", "score": 3.999},
        {"sentence1": "e", "sentence2": "f", "score": 5},
        {"sentence1": "g", "sentence2": "h", "score": 5.2},
        {"sentence1": "g", "sentence2": "h", "score": None},
    ]
    for name, score in (("sts12", 5), ("stsb", 5)):
        examples, report, bad = run(name, rows)
        high, low = [e for e in examples if e.positives], [e for e in examples if not e.positives]
        assert sides(high) == [("a", ["b"], []), ("b", ["a"], []), ("e", ["f"], []), ("f", ["e"], [])]
        assert sides(low) == [("c", [], ["d"]), ("d", [], ["c"])]
        assert [e.id for e in examples[:2]] == [f"{name}:1:ab", f"{name}:1:ba"]
        assert [e.score for e in examples] == [4, 4, 3.999, 3.999, score, score]
        assert report == {"rows": 5, "below_threshold": 1}
        assert bad == [(4, "score 5.2 is not on the scale from 0 to 5"), (5, "score: expected a number, not NoneType")]


def test_the_scale_of_sts22_ends_at_four() -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (4, 3.67, 4.5, 0)]
    examples, report, bad = run("sts22", rows)
    assert [(e.score, len(e.positives)) for e in examples] == [(4, 1), (4, 1), (3.67, 0), (3.67, 0)]
    assert report["below_threshold"] == 1
    assert [number for number, _ in bad] == [3, 4] and "from 1 to 4" in bad[0][1]


# ---- labels


@pytest.mark.parametrize(
    ("name", "row", "query", "positive", "negatives"),
    [
        ("amazon_counterfactual", {"text": "I wish it was", "label": 1}, "I wish it was", "counterfactual", None),
        ("amazon_polarity", {"text": "Good", "label": 1, "label_text": "positive"}, "Good", "positive", ["negative"]),
        ("imdb", {"text": "Bad", "label": 0, "label_text": "negative"}, "Bad", "negative", ["positive"]),
        ("toxic_conversations", {"text": "Oh", "label": 0, "label_text": "not toxic"}, "Oh", "not toxic", ["toxic"]),
        ("tweet_sentiment", {"id": "f87", "text": "hm", "label": 1, "label_text": "neutral"}, "hm", "neutral", None),
        ("amazon_reviews", {"id": "en_1", "text": "Meh", "label": 2, "label_text": "2"}, "Meh", "3 stars", None),
    ],
)
def test_label_texts(name: str, row: dict[str, Any], query: str, positive: str, negatives: list[str] | None) -> None:
    spec = load_catalog()[name].rows
    others = [
        {**row, "text": f"other {label}", "label": int(label)} for label in spec.words if int(label) != row["label"]
    ]
    examples, report, bad = run(name, [row, *others])
    first = sides(examples)[0]
    assert first[:2] == (query, [positive]) and bad == []
    assert sorted(first[2]) == sorted(negatives or set(spec.words.values()) - {positive})
    assert report == {"rows": len(spec.words)}


def test_the_label_text_column_stands_for_the_label_in_the_label_form() -> None:
    rows = [
        {"text": "card?", "label": 11, "label_text": "card_arrival"},
        {"text": "rate?", "label": 32, "label_text": "exchange_rate"},
        {"text": "where is it?", "label": 11, "label_text": "card_arrival"},
    ]
    assert sides(run("banking77", rows)[0])[0] == ("card?", ["card_arrival"], ["exchange_rate"])
    assert sides(run("banking77", rows, form="example")[0])[0] == ("card?", ["where is it?"], ["rate?"])


TOPICS = [("Stars burn", "Why stars burn.", "x"), ("Cells", "How cells.", "y"), ("Suns", "On suns.", "x")]


@pytest.mark.parametrize(
    ("name", "rows", "texts"),
    [
        ("emotion", [{"text": t, "label": ord(c) % 6} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("mtop_intent", [{"id": "1", "text": t, "label": ord(c)} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("mtop_domain", [{"id": "1", "text": t, "label": ord(c)} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("massive_intent", [{"id": "1", "text": t, "label": c} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("massive_scenario", [{"id": "1", "text": t, "label": c} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("biorxiv_p2p", [{"title": t, "abstract": a, "category": c} for t, a, c in TOPICS], None),
        ("biorxiv_s2s", [{"title": t, "abstract": a, "category": c} for t, a, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("medrxiv_p2p", [{"title": t, "abstract": a, "category": c} for t, a, c in TOPICS], None),
        ("medrxiv_s2s", [{"title": t, "abstract": a, "category": c} for t, a, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("reddit_p2p", [{"title": t, "body": a, "subreddit": c} for t, a, c in TOPICS], None),
        ("stackexchange_p2p", [{"texts": [t, a], "tags": [], "_file": c} for t, a, c in TOPICS], None),
        ("reddit_s2s", [{"text": t, "_file": c} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("stackexchange_s2s", [{"text": t, "_file": c} for t, _, c in TOPICS], [t for t, _, _ in TOPICS]),
        (
            "twenty_newsgroups",
            [{"text": t, "label": ord(c), "label_text": c} for t, _, c in TOPICS],
            [t for t, _, _ in TOPICS],
        ),
        ("arxiv_s2s", [{"title": t, "abstract": a, "categories": c} for t, a, c in TOPICS], [t for t, _, _ in TOPICS]),
        ("arxiv_p2p", [{"title": t, "abstract": a, "categories": c} for t, a, c in TOPICS], None),
    ],
)
def test_examples_of_classes(name: str, rows: Rows, texts: list[str] | None) -> None:
    examples, report, bad = run(name, rows)
    a, b, c = texts or [f"{title} {body}" for title, body, _ in TOPICS]
    assert sides(examples) == [(a, [c], [b]), (c, [a], [b])] and bad == []
    assert [e.id for e in examples] == [f"{name}:1", f"{name}:3"]
    assert report == {"rows": 3, "singleton": 1, "fewer_negatives": 2}


def test_a_paper_of_several_categories_shares_one_with_its_positive_and_none_with_its_negatives() -> None:
    categories = ["cs.LG stat.ML", "stat.ML", "cs.LG", "math.AG", "math.AG math.NT", "cs.CV  cs.LG"]
    examples, _, bad = run("arxiv_s2s", [{"title": f"t{i}", "categories": c} for i, c in enumerate(categories)])
    of = {f"t{i}": set(c.split()) for i, c in enumerate(categories)}
    assert len(examples) == 6 and bad == []
    for query, (positive,), negatives in sides(examples):
        assert of[query] & of[positive] and not any(of[query] & of[n] for n in negatives) and negatives


def test_bad_labels_are_named() -> None:
    rows: Rows = [{"text": f"t{i}", "label": i % 2} for i in range(4)]
    rows += [{"text": "x", "label": None}, {"text": "y", "label": []}, {"text": "z", "label": [1, 1.5]}]
    examples, _, bad = run("imdb", rows)
    assert len(examples) == 4
    assert bad == [
        (5, "no label"),
        (6, "label: no label"),
        (7, "label[1]: 1.5 names no class: expected a text, a whole number, true or false"),
    ]


def test_labels_can_be_closed_and_negatives_counted() -> None:
    rows = [{"text": f"t{i}", "label": f"l{i % 4}"} for i in range(40)]
    examples, report, _ = run("massive_intent", rows, known=frozenset(["l0", "l1"]), negatives=3)
    assert len(examples) == 20 and report == {"rows": 40, "unseen": 20}
    assert {len(e.negatives) for e in examples} == {3}


def test_labelled_rows_are_sampled_evenly_and_not_from_the_start() -> None:
    """Sorted by label, as some files are: the first rows would be one class."""
    rows = [{"text": f"t{i}", "label": int(i >= 500)} for i in range(1000)]
    counts: Counter[int] = Counter()
    for seed in range(20):
        examples, report, _ = run("imdb", rows, limit=100, seed=seed)
        numbers = [int(e.id.split(":")[1]) for e in examples]
        assert len(numbers) == 100 and numbers == sorted(numbers) and report == {"rows": 1000, "not_drawn": 900}
        counts.update((number - 1) // 250 for number in numbers)
    assert all(400 < count < 600 for count in counts.values()) and len(counts) == 4  # 500 +- 5 standard deviations
    assert run("imdb", rows, limit=100)[0] == run("imdb", rows, limit=100)[0]
    small, report, _ = run("imdb", rows, limit=5000)
    assert len(small) == 1000 and "not_drawn" not in report


def test_every_row_of_a_sample_is_as_likely() -> None:
    rows = [{"text": f"t{i}", "label": f"l{i}"} for i in range(3)]
    drawn = Counter(e.query for s in range(600) for e in run("massive_intent", rows, limit=2, form="label", seed=s)[0])
    assert all(350 < count < 450 for count in drawn.values()) and len(drawn) == 3  # 400 +- 4 standard deviations


def test_a_large_set_has_a_limit_of_its_own() -> None:
    entry = load_catalog()["amazon_polarity"]
    entry = entry.model_copy(update={"rows": entry.rows.model_copy(update={"at_most": 10})})
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(40)]
    assert len(run(entry, rows)[0]) == 10 and len(run(entry, rows, limit=20)[0]) == 20


# ---- several tables

BEIR = {
    "default": [
        {"query-id": "q1", "corpus-id": "d1", "score": 1},
        {"query-id": "q2", "corpus-id": "d2", "score": 2},
        {"query-id": "q1", "corpus-id": "d3", "score": 1},
        {"query-id": "q3", "corpus-id": "d1", "score": 0},
        {"query-id": "q4", "corpus-id": "d4", "score": 1},
        {"query-id": "q5", "corpus-id": "absent", "score": 1},
        {"query-id": "gone", "corpus-id": "d1", "score": 1},
    ],
    "queries": [{"_id": f"q{i}", "text": f"question {i}"} for i in range(1, 6)],
    "corpus": [
        {"_id": "d3", "title": "", "text": "third"},
        {"_id": "d1", "title": "One", "text": "first"},
        {"_id": "d2", "title": "Two", "text": "second"},
        {"_id": "d4", "title": "", "text": ""},
        {"_id": "unjudged", "title": "", "text": "nobody asks"},
    ],
}


@pytest.mark.parametrize("name", ["msmarco", "hotpotqa", "fever", "fiqa", "nfcorpus", "scifact"])
def test_a_query_has_all_its_documents(name: str) -> None:
    examples, report, _ = run(name, tables=tables(**BEIR))
    assert sides(examples) == [("question 1", ["One first", "third"], []), ("question 2", ["Two second"], [])]
    assert [p.id for p in examples[0].positives] == ["d1", "d3"] and examples[0].id == f"{name}:q1"
    missing = {"document_without_text": 2, "no_positive": 2, "query_without_text": 1}
    assert report == {"rows": 7, "not_relevant": 1} | missing


def test_a_limit_takes_queries_with_all_their_documents() -> None:
    examples, report, _ = run("scifact", tables=tables(**BEIR), limit=1)
    whole = {e.query: e.positives for e in run("scifact", tables=tables(**BEIR))[0]}
    kept = set()
    for seed in range(20):
        examples, report, _ = run("scifact", tables=tables(**BEIR), limit=1, seed=seed)
        assert report["not_drawn"] == 4 and [e.positives for e in examples] == [whole[e.query] for e in examples]
        kept |= {e.query for e in examples}
    assert kept == set(whole)  # each query comes up, not the first alone


def test_a_corpus_may_have_no_titles_but_no_bad_row() -> None:
    plain = [{"_id": row["_id"], "text": row["text"]} for row in BEIR["corpus"]]
    examples, _, _ = run("fiqa", tables=tables(**BEIR | {"corpus": plain}))
    assert [p.text for p in examples[0].positives] == ["first", "third"]
    for change, said in (
        ({"corpus": [{"_id": "d1", "title": "x"}]}, "corpus, row 1: no text"),
        ({"queries": [*BEIR["queries"], {"id": "q9"}]}, "queries, row 6: no column '_id'"),
        (
            {"default": [{"query-id": "q1", "corpus-id": "d1", "score": "1"}]},
            "default, row 1: score: expected a number",
        ),
    ):
        with pytest.raises(DataError, match=said):
            run("fiqa", tables=tables(**BEIR | change))


def test_evidence_is_looked_up_by_title() -> None:
    claims = [
        {
            "id": 0,
            "uid": "330ca632",
            "claim": "Two bridges are old.",
            "supporting_facts": [
                {"key": "Old Bridge", "value": 0},
                {"key": "New Bridge", "value": 1},
                {"key": "Old Bridge", "value": 2},
            ],
            "label": 1,
            "num_hops": 2,
            "hpqa_id": "5abd",
        },
        {"uid": "b", "claim": "Lost.", "supporting_facts": [{"key": "Atlantis", "value": 0}], "label": 0},
        {"uid": "c", "claim": "No facts.", "supporting_facts": [], "label": 0},
    ]
    pages = [
        {"_id": "1", "title": "New Bridge", "text": "Built in 1604."},
        {"_id": "2", "title": "Old Bridge", "text": "Older still."},
        {"_id": "3", "title": "Old Bridge", "text": "Another of that name."},
    ]
    examples, report, bad = run("hover", tables=tables(main=claims, corpus=pages))
    expected = ("Two bridges are old.", ["Old Bridge Older still.", "New Bridge Built in 1604."], [])
    assert sides(examples) == [expected] and examples[0].id == "330ca632"
    assert report == {"rows": 3, "page_without_text": 1, "no_positive": 1}
    assert bad == [(3, "supporting_facts: expected a list of objects")]


def test_every_set_of_the_catalogue_is_converted_above() -> None:
    """The tests of this file, by the names that they call: a new set needs rows in its schema here."""
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in load_catalog() if f'"{name}"' not in text] == []
