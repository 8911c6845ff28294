"""Documents that name each other: by links in the text, by `See also`, or by a column of ids or titles."""

from __future__ import annotations

import posixpath
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from embedwright.data.answers import class_id
from embedwright.data.files.documents import Document
from embedwright.data.keys import exact_key
from embedwright.data.schema import Example, Passage
from embedwright.pairs.dictionary import entry_of
from embedwright.pairs.way import Made, Make

MOST = 20  # documents that one names, or is named by: a list of many, or a common word, says little of each
_ID = "\0"  # before ids, which then equal no title
# {title}, [[title|as shown]] and [as shown](page.md)
_LINK = re.compile(r"\{([^{}]+)\}|\[\[([^\[\]|]+)(?:\|[^\[\]]*)?\]\]|\]\(([^()\s#]+)")
_SEE = re.compile(r"(?:\bSee|[(;,] ?see)(?: also)?:?(?: the)? (.+?)(?=[.;](?:\s|$)|[()]|$)", re.DOTALL)
_AND = re.compile(r",|\b(?:and|or|also|see)\b(?: the\b)?")


def see_also(documents: Iterable[Document]) -> Make:
    """Reads all documents, which stay in memory, and returns what makes the example of one.

    Its positives are the documents that it names: by a title that no other document has, by the path of a page, or by
    an id in its row. None of them is its negative. One that more than `MOST` documents name is not a positive, and may
    be a negative. The id of a positive also names the document that names it.
    """
    named: dict[str, Document | None] = {}
    for document in documents:
        titles = {exact_key(name) for name in (document.title, *entry_of(document).names)} - {""}
        for name in (f"{_ID}{document.id}", *titles):
            named[name] = None if name in named else document
    times = Counter(other.id for document in documents for other in _others(document, named))

    def make(document: Document, rng: random.Random) -> Made:
        others = _others(document, named)
        if not others:
            return "names_none"
        if len(others) > MOST:
            return "names_many"
        close = [other for other in others if times[other.id] <= MOST]
        if not close:
            return "named_by_many"
        both = ((other, class_id((), dict.fromkeys((*document.ids, *other.ids)))) for other in close)
        return [Example("", "", document.whole, tuple(Passage(other.whole, id) for other, id in both))]

    return make


def _others(document: Document, named: dict[str, Document | None]) -> list[Document]:
    """Returns the documents that a document names, each once."""
    found = {other.id: other for name in _names(document) if (other := named.get(name)) is not None}
    found.pop(document.id, None)
    return list(found.values())


def _names(document: Document) -> Iterator[str]:
    """Yields the keys of what a document names."""
    for link in document.links:
        yield from (f"{_ID}{link}", exact_key(link))
    for found in _LINK.finditer(document.text):
        yield exact_key(next(filter(None, found.groups())))
        if found[3]:
            yield f"{_ID}{posixpath.normpath(posixpath.join(posixpath.dirname(document.id), found[3]))}"
    for run in _SEE.finditer(document.text):
        yield from (exact_key(name.strip(" \n\"'`{}[]")) for name in (run[1], *_AND.split(run[1])))
