"""Holds what rows of any kind need to become examples: settings, names of tasks, counts of what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from embedwright.data.keys import exact_key
from embedwright.data.labels import USUAL, LabelRules
from embedwright.data.schema import Example, Passage

THRESHOLD = 4.0  # on a scale from 0 to 5; a pair below it is not a positive (NV-Embed, section 3.3)


@dataclass(kw_only=True)
class Conversion:
    """Holds the settings of one conversion, and counts what it leaves out in `report`, by reason.

    `names`: names of classes by column, where the data says them.
    """

    task: str
    seed: int = 0
    labels: LabelRules = USUAL
    names: dict[str, Mapping[str, str]] = field(default_factory=dict)
    report: Counter[str] = field(default_factory=Counter)

    def task_of(self, query: str) -> str:
        """Returns the name of the task of rows that ask `query`."""
        return self.task

    def on_form(self, form: str | None) -> None:
        """Is called with the form that the examples of labelled rows have."""

    def example(
        self, row_id: str, query: str, positives: Iterable[Passage], negatives: Iterable[Passage] = ()
    ) -> Example:
        """Makes one example. It counts and leaves out a negative that is also a positive."""
        right, wrong = tuple(positives), each_once(negatives)
        answers = each_once(right) if wrong else {}
        kept = tuple(passage for key, passage in wrong.items() if key not in answers)
        self.report["conflicting"] += len(wrong) - len(kept)
        return Example(row_id, self.task_of(query), query, right, kept)

    def judged(
        self,
        relevant: Mapping[str, Collection[str]],
        queries: Mapping[str, str],
        corpus: Mapping[str, str],
        prefix: str = "",
    ) -> Iterator[Example]:
        """Yields one example for each query of `relevant`, whose positives are its documents in `corpus`.

        The example's id is `prefix` and the query's id. Documents without a text are counted, and queries without a
        text or without such a document are left out.
        """
        for query, documents in relevant.items():
            positives = [Passage(corpus[document], document) for document in documents if corpus.get(document)]
            self.report["document_without_text"] += len(documents) - len(positives)
            if positives and queries.get(query):
                yield self.example(prefix + query, queries[query], positives)
            else:
                self.report["no_positive" if queries.get(query) else "query_without_text"] += 1


def scored(pair: Example, score: float, threshold: float = THRESHOLD) -> Example:
    """Gives a pair (one positive, no negatives) its score. Below the threshold, its positive becomes its negative."""
    if score >= threshold:
        return replace(pair, score=score)
    return replace(pair, positives=(), negatives=pair.positives, score=score)


def each_once(passages: Iterable[Passage]) -> dict[str, Passage]:
    """Maps each exact key to the first passage that has it."""
    found: dict[str, Passage] = {}
    for passage in passages:
        found.setdefault(exact_key(passage.text), passage)
    return found
