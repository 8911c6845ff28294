"""An example of a document: its positive carries what tells documents of one source apart from negatives."""

from __future__ import annotations

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example, Passage
from embedwright.pairs.way import pair


def test_a_pair_has_the_document_as_its_positive() -> None:
    alone, shared = Document("7", "text"), Document("8", "text", source="s")
    assert pair(alone, "question", "a part") == Example("", "", "question", (Passage("a part", "7"),))
    assert pair(shared, "q", "p", "kind") == Example("", "kind", "q", (Passage("p", "source s\x1f8"),))
