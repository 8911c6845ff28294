from __future__ import annotations

from embedwright.data.files.conversion import Conversion
from embedwright.data.schema import Example, Passage


def test_a_negative_is_no_positive_and_comes_once() -> None:
    job = Conversion(task="t")
    example = job.example("1", "q", [Passage("A"), Passage("b", "d")], map(Passage, ["a ", "n", "N", "B", "m"]))
    assert example == Example("1", "t", "q", (Passage("A"), Passage("b", "d")), (Passage("n"), Passage("m")))
    assert job.report["conflicting"] == 2


def test_a_query_has_all_its_documents_with_a_text() -> None:
    job = Conversion(task="t")
    relevant = {"q1": ["d2", "d1", "d0"], "q2": ["d0"], "q3": ["d1"], "q4": ["d1"], "q5": []}
    queries = {"q1": "one", "q2": "two", "q3": "", "q5": "five"}
    made = list(job.judged(relevant, queries, {"d0": "", "d1": "first", "d2": "second"}, prefix="s:"))
    assert made == [Example("s:q1", "t", "one", (Passage("second", "d2"), Passage("first", "d1")))]
    assert dict(job.report) == {
        "conflicting": 0, "document_without_text": 2, "no_positive": 2, "query_without_text": 2
    }  # fmt: skip
