"""Real texts: pairs of $EMBEDWRIGHT_DATA where it is set, else the docstrings of the installed libraries."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from embedwright.model.embedder import Embedder

PREFIX = "Instruct: Given a question, retrieve passages that answer it\nQuery:\n"
SETS = ("queries", "passages", "mixed")
LONG = 20  # words of a passage at least
SHORT = range(2, 41)  # words of a query
_LIBRARIES = ("numpy", "torch", "transformers")
_POOL = 2_000  # pairs of each source


def text_set(name: str, tokens: int, count: Callable[[str], int]) -> tuple[list[str], str | None]:
    """About so many tokens of the set `queries`, `passages` or `mixed` (as many of the one as of the other, no
    instruction), and the string in front of each text. `count` gives a text's tokens. ValueError for another name."""
    if name not in SETS:
        raise ValueError(f"text set {name!r} is none of {', '.join(SETS)}")
    queries, passages = [], []
    for query, passage in _shuffled_pairs():
        if len(query.split()) in SHORT and len(passage.split()) >= LONG:
            queries.append(query)
            passages.append(passage)
    prefix = PREFIX if name == "queries" else None
    both = (text for pair in zip(queries, passages, strict=True) for text in pair)
    texts = {"queries": iter(queries), "passages": iter(passages), "mixed": both}[name]
    chosen: list[str] = []
    left = tokens
    for text in dict.fromkeys(texts):
        left -= count((prefix or "") + text)
        chosen.append(text)
        if left <= 0:
            return chosen, prefix
    raise ValueError(f"the sources have fewer than {tokens} tokens of {name}")


def counter(model: Embedder) -> Callable[[str], int]:
    """Tokens of a text, BOS and EOS among them."""
    return lambda text: len(model.tokenize([text]).ids_T)


def source() -> str:
    """Where the texts come from, for the record."""
    return "pairs of $EMBEDWRIGHT_DATA" if _files() else f"docstrings of {', '.join(_LIBRARIES)}"


@cache
def _shuffled_pairs() -> list[tuple[str, str]]:
    pairs = [pair for origin in _origins() for pair in islice(origin, _POOL)]
    random.Random(0).shuffle(pairs)
    return pairs


def _origins() -> Iterator[Iterator[tuple[str, str]]]:
    if files := _files():
        yield from map(_read, files)
        return
    from embedwright.demo.docstrings import harvest

    for library in _LIBRARIES:
        yield ((row.query, row.positives[0].text) for row in harvest([library]))


def _files() -> list[Path]:
    data = os.environ.get("EMBEDWRIGHT_DATA")
    return sorted(Path(data, "train").glob("*.pairs.jsonl.gz")) if data else []


def _read(file: Path) -> Iterator[tuple[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["query"], row["positive"]
