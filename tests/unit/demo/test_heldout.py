from __future__ import annotations

from pathlib import Path

from embedwright.data.files.beir import read_beir
from embedwright.data.schema import Example, Passage
from embedwright.demo.heldout import without_leaks, write_beir, write_suite
from embedwright.evaluation.suite import load_suite

NEGATIVES = (Passage("The tides rise."), Passage("Something else."))


def row(query: str, positive: str, scores: tuple[float, ...] | None = None) -> Example:
    given = None if scores is None else (1.0,)
    return Example(query, "t", query, (Passage(positive),), NEGATIVES, positive_scores=given, negative_scores=scores)


def test_rows_that_repeat_a_held_out_text_go_and_negatives_that_do_are_cut_with_their_scores() -> None:
    rows = [row("the TIDES rise", "x"), row("a", "The  tides rise."), row("b", "y", (0.3, 0.2))]
    (left,), cut = without_leaks(rows, ["the tides rise."])
    assert cut == 1 and (left.query, left.negatives) == ("b", NEGATIVES[1:])
    assert left.positive_scores is None and left.negative_scores is None
    assert without_leaks(rows, ["unknown"]) == (rows, 0)


def test_what_is_written_is_read_as_a_suite(tmp_path: Path) -> None:
    documents, queries = {"d0": "Über alles", "d1": "two"}, {"q0": "was?"}
    write_beir(tmp_path / "own", documents, queries, [("q0", "d1")])
    write_suite(tmp_path, "heldout", [{"name": "own", "kind": "retrieval", "path": "own"}])
    (task,) = load_suite(tmp_path / "suite.yaml").tasks
    found = read_beir(task.path, "test")
    assert (found.corpus, found.queries, found.qrels) == (documents, queries, {"q0": {"d1": 1}})
