"""What each way of making examples from documents is: a function of one document."""

from __future__ import annotations

import random
from collections.abc import Callable

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example

Made = list[Example] | str  # what one document gave: examples without an id, or the reason why there are none
Make = Callable[[Document, random.Random], Made]


def pair(document: Document, query: str, positive: str, kind: str = "") -> Example:
    """Makes an example whose positive is a text of the document. `kind`: of a way that makes rows of several tasks."""
    return Example("", kind, query, (document.passage(positive),))
