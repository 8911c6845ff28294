"""Finds training texts that leak from evaluation data: equal, nearly equal, or close by BM25.

NV-Embed filtered Emotion and AmazonCounterfactual by BM25 similarity to the MTEB test sets, and removed clustering
texts that match them (arXiv 2405.17428, section on data; no thresholds given). Here all sets go through all rules, in
the order exact, near, bm25, and the first that holds names the leak.

    N evaluation texts, E entries (different words of a text), V different words
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bm25s
import numpy as np

from embedwright.data.clean.repeats import DiskList, DuplicateIndex
from embedwright.data.files.beir import beir_files, beir_splits, read_corpus, read_judgements
from embedwright.data.files.columns import Row
from embedwright.data.files.folders import data_files, is_beir, is_data
from embedwright.data.files.kinds import KINDS, detect_kind, parse_fields
from embedwright.data.files.quarantine import good_rows
from embedwright.data.files.rows import read_rows
from embedwright.data.keys import near_key
from embedwright.data.schema import DataError, parse_example, text_of
from embedwright.errors import InputError, NotFoundError

log = logging.getLogger(__name__)
logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG

Rule = Literal["exact", "near", "bm25"]
SHOWN = 200  # characters of a text in a report
BM25 = 0.9  # default fraction of the self-score
_ROUNDING = 1e-7  # error of a fraction: the same weights are added up in different orders
LONGER = 1.5  # a text this many times as long as the evaluation text may hold all of its words by chance


# ---------------------------------------------------------------------------------------------------- evaluation data


@dataclass(frozen=True, slots=True)
class EvalText:
    """Holds a text of evaluation data, its file, and the id of its row (`file:line` if it has none)."""

    file: str
    row: str
    text: str


def read_eval_texts(paths: Iterable[Path], corpus: bool = False) -> Iterator[EvalText]:
    """Yields the texts that a model is tested on: queries and texts always, documents of BEIR folders if `corpus`.

    A path is a data file of any kind, a BEIR folder, or a folder of such, at any depth. Of a BEIR
    folder the queries judged in any split but `train` count. Training on the corpus that is searched later is usual
    and allowed, so it is left out unless asked for. A corpus and its queries are in memory while they are read.
    Raises FileNotFoundError, and DataError on a bad line: a test text that is not read would not be protected.
    """
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"{path} does not exist")
        files = sorted(_data_sets(path))
        if not files:
            raise DataError(f"{path}: no data file and no BEIR folder in it")
        for file in files:
            yield from _of_beir(file, corpus) if file.is_dir() else _of_file(file)


def _data_sets(path: Path) -> Iterator[Path]:
    if path.is_file() or is_beir(path):
        yield path
        return
    if (path / "state.json").is_file():
        yield from data_files(path)
        return
    for child in path.iterdir():
        if child.is_dir() and not child.name.startswith("."):
            yield from _data_sets(child)
        elif child.is_file() and is_data(child):
            yield child
        else:
            log.info("%s: not read, no data file by its name", child)


def _of_file(path: Path) -> Iterator[EvalText]:
    kind = detect_kind(path)

    def parse(row: Row, row_id: str) -> list[EvalText]:
        if kind == "example":
            example = parse_example(row, default_task="", default_id=row_id)
            texts = [example.query, *(passage.text for passage in example.paired)]
            return [EvalText(str(path), example.id, text) for text in texts]
        name = parse_fields(kind, row, row_id)["id"]
        return [EvalText(str(path), name, row[key]) for key in KINDS[kind].texts]

    for texts in good_rows(read_rows(path), parse, path.name, None, path):
        yield from texts


def _of_beir(folder: Path, corpus: bool) -> Iterator[EvalText]:
    judged: set[str] = set()
    for split in sorted(beir_splits(folder).keys() - {"train"}):
        _, queries, qrels = beir_files(folder, split)
        judged.update(query for _, query, _, _ in read_judgements(qrels))
    if not judged:
        raise DataError(f"{folder}: no split but train")
    texts = read_corpus(queries)
    if missing := judged - texts.keys():
        raise DataError(f"{queries}: query {min(missing)[:60]!r} is judged but not there")
    yield from (EvalText(str(queries), query, text) for query, text in texts.items() if query in judged and text)
    if corpus:
        documents = beir_files(folder, split)[0]
        yield from (EvalText(str(documents), name, text) for name, text in read_corpus(documents).items() if text)


# ---------------------------------------------------------------------------------------------------- leaks


@dataclass(frozen=True, slots=True)
class Leak:
    """Names the evaluation text that a training text repeats. `score` is the Jaccard index, or the BM25 fraction."""

    rule: Rule
    score: float
    held: EvalText  # text cut to SHOWN characters


class EvalTexts:
    """Holds evaluation texts, and finds the one that a training text repeats.

    `bm25` is the fraction of an evaluation text's BM25 score with itself from which a training text leaks. None turns
    the rule off. An evaluation text takes about 2 KB of memory, and under bm25 100 bytes for each of its words.
    """

    def __init__(self, paths: Sequence[Path], *, corpus: bool = False, bm25: float | None = BM25) -> None:
        self._shown = DiskList()  # what a report says of each
        self._known = DuplicateIndex(map(self._noted, read_eval_texts(paths, corpus)))
        self._bm25 = None if bm25 is None else Bm25((self._known.near_keys[i] for i in range(len(self))), bm25)

    def __len__(self) -> int:
        return len(self._shown)

    def digest(self) -> str:
        """Returns a SHA-256 that is equal for evaluation texts of the same words and the same rule."""
        digest = hashlib.sha256(repr(self._bm25 and self._bm25.threshold).encode())
        for index in range(len(self)):
            digest.update(self._known.near_keys[index].encode() + b"\n")
        return digest.hexdigest()

    def find(self, texts: Sequence[str]) -> Iterator[Leak | None]:
        """Yields for each of `texts`, in order, its leak by the first rule that holds, or None."""
        for text, match in zip(texts, self._known.find(texts), strict=True):
            if match is not None:
                yield Leak("exact" if match.exact else "near", match.jaccard, self._held(match.first))
            elif self._bm25 is not None and (best := self._bm25.best(near_key(text))) is not None:
                yield Leak("bm25", best[1], self._held(best[0]))
            else:
                yield None

    def _noted(self, held: EvalText) -> str:
        self._shown.add(json.dumps([held.file, held.row, held.text[:SHOWN]]))
        return text_of(held.text, "text")

    def _held(self, index: int) -> EvalText:
        return EvalText(*json.loads(self._shown[index]))


class Bm25:
    """Finds which of N texts another one covers best: by its BM25 score with the text, divided by the text's own.

    Both scores count each different word of the query once, so the fraction is the share of the text's BM25 weight that
    lies on words of the other, from 0 to 1; word order does not matter. Weights are bm25s's (Lucene, k1 1.5, b 0.75),
    words those of the near key.
    """

    def __init__(self, near_keys: Iterable[str], threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise InputError(f"the BM25 threshold is {threshold:g}, not above 0 and at most 1")
        self.threshold = threshold
        words = [near.split() for near in near_keys]
        self._index = bm25s.BM25(dtype="float64")
        self._index.index(words, create_empty_token=False, show_progress=False)
        self.lengths_N = np.array([len(own) for own in words])
        scores = self._index.scores  # one for each text and each of its distinct words
        self.self_score_N = np.bincount(scores["indices"], scores["data"], minlength=len(words))

    def best(self, near_key: str) -> tuple[int, float] | None:
        """Returns the number of the indexed text that matches `near_key` best, and its fraction; the first of equals.

        The fraction is the text's BM25 score under the words of `near_key`, by its score under its own words. Returns
        None if no fraction reaches the threshold. Indexed texts with less than 1/LONGER of the words of `near_key` do
        not count: a long passage holds the words of many short questions.
        """
        words = near_key.split()
        known = [word for word in dict.fromkeys(words) if word in self._index.vocab_dict]
        if not known or len(words) > LONGER * self.lengths_N.max():
            return None
        score_N = self._index.get_scores(known)
        score_N[self.lengths_N * LONGER < len(words)] = 0
        fraction_N = np.divide(score_N, self.self_score_N, where=score_N > 0, out=np.zeros_like(score_N))
        fraction_N = fraction_N.round(9)  # words come in another order in each process, and so the last bits of sums
        top = int(fraction_N.argmax())
        return (top, min(1.0, float(fraction_N[top]))) if fraction_N[top] >= self.threshold - _ROUNDING else None
