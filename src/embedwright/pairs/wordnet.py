"""Reads WordNet's database files: a lemma's usual sense, and the senses that are related to it.

The files are described in wndb(5WN). Princeton's WordNet 3, nltk's copy of it and Debian's `wordnet-base` have them.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from embedwright.data.schema import DataError
from embedwright.errors import NotFoundError
from embedwright.files import sha256_of

# A usual sense has at least the share USUAL of its lemma's tagged uses. A lemma of several senses has at most SENSES,
# and at least USES tagged uses: with more senses, texts on a special field often have another one in mind.
USUAL, SENSES, USES = 0.9, 2, 5
COMMON = 5  # glosses that a common word occurs in
WHERE = "Debian's wordnet-base has it in /usr/share/wordnet, nltk's `wordnet` in nltk_data/corpora/wordnet"
_POS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_COUNTS = "cntlist.rev"
_FILES = [*(f"{kind}.{part}" for kind in ("data", "index") for part in _POS.values()), _COUNTS]
_FILES += [f"{part}.exc" for part in _POS.values()]
_WORD = re.compile(r"[a-z]+")
_ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("ied", "y"), ("ing", ""), ("ing", "e"))


class Sense(NamedTuple):
    """Names a synset: its part of speech (n, v, a or r), and the byte at which it stands in the file of that one."""

    pos: str
    offset: int


Pointer = tuple[str, Sense, int, int]  # its symbol, the other synset, and a word of each, from 1; 0: all words


class WordNet:
    """Holds WordNet in memory."""

    def __init__(self, folder: Path) -> None:
        """Reads the files. Raises NotFoundError if one is missing, and DataError if one is not WordNet's."""
        if missing := [name for name in _FILES if not (folder / name).is_file()]:
            raise NotFoundError(f"--wordnet {folder}: no WordNet there, {missing[0]} is missing. {WHERE}")
        self.digest = "".join(sha256_of(folder / name) for name in _FILES)
        self._data = {pos: (folder / f"data.{part}").read_bytes() for pos, part in _POS.items()}
        self._senses: dict[str, list[Sense]] = {}  # lemma -> its senses by part of speech, the most frequent first
        self._uses: dict[str, Counter[Sense]] = {}  # lemma -> how often each sense is used, if any use is tagged
        try:
            for pos, part in _POS.items():
                for line in _lines(folder / f"index.{part}"):
                    lemma, _, count, *rest = line.split()
                    self._senses.setdefault(lemma, []).extend(Sense(pos, int(at)) for at in rest[-int(count) :])
            for line in _lines(folder / _COUNTS):
                key, number, uses = line.split()
                lemma, _, fields = key.partition("%")
                senses = [sense for sense in self._senses.get(lemma, ()) if sense.pos == "nvara"[int(fields[0]) - 1]]
                if int(number) <= len(senses):  # Debian's counts name a few senses that are no more
                    self._uses.setdefault(lemma, Counter())[senses[int(number) - 1]] += int(uses)
            self._irregular = {line.split()[0] for part in _POS.values() for line in _lines(folder / f"{part}.exc")}
        except (ValueError, IndexError) as error:
            raise DataError(f"--wordnet {folder}: not the files of WordNet ({error}). {WHERE}") from None
        lines = (line for data in self._data.values() for line in data.decode().split("\n"))
        self._explains = Counter(word for line in lines for word in {*_WORD.findall(line.rpartition(" | ")[2])})

    def has(self, words: str) -> bool:
        """Returns whether there is such a lemma, of one word or several."""
        return _key(words) in self._senses

    def is_form(self, word: str) -> bool:
        """Returns whether a word may be an inflected form of another one: `parts`, `written`, `setting`."""
        stems = (word[: -len(end)] + more for end, more in _ENDINGS if word.endswith(end))
        return word in self._irregular or any(map(self.has, stems))

    def usual(self, lemma: str) -> Sense | None:
        """Returns the sense that a lemma nearly always has: its only one, or the one of 90 % of its tagged uses."""
        senses, uses = self._senses.get(_key(lemma), ()), self._uses.get(_key(lemma), Counter[Sense]())
        if len(senses) == 1:
            return senses[0]
        if len(senses) > SENSES or uses.total() < USES:
            return None
        sense, most = uses.most_common(1)[0]
        return sense if most >= USUAL * uses.total() else None

    def is_first(self, lemma: str, sense: Sense) -> bool:
        """Returns whether this is the most frequent one of a lemma's senses of all parts of speech."""
        uses = self._uses.get(_key(lemma))
        return (uses.most_common(1)[0][0] if uses else self._senses[_key(lemma)][0]) == sense

    def is_common(self, word: str) -> bool:
        """Returns whether WordNet explains other words with this one."""
        return self._explains[word] >= COMMON

    def depth(self, sense: Sense) -> int:
        """Returns the number of steps from a synset to the top, each to its first hypernym."""
        up = next((target for symbol, target, *_ in self.synset(sense)[1] if symbol in ("@", "@i")), None)
        return 0 if up is None else 1 + self.depth(up)

    def synset(self, sense: Sense) -> tuple[list[str], list[Pointer]]:
        """Returns the words of a synset, those of several parts with spaces, and its pointers to others."""
        data = self._data[sense.pos]
        _, _, _, count, *fields = data[sense.offset : data.find(b" | ", sense.offset)].decode().split()
        words, rest = fields[: 2 * int(count, 16) : 2], fields[2 * int(count, 16) :]
        pointers = (rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0])))
        return (
            [word.partition("(")[0].replace("_", " ") for word in words],  # (p), (a): where an adjective may stand
            [
                (symbol, Sense(pos.replace("s", "a"), int(at)), int(ends[:2], 16), int(ends[2:], 16))
                for symbol, at, pos, ends in pointers
            ],
        )


def _key(lemma: str) -> str:
    return lemma.replace(" ", "_").lower()


def _lines(file: Path) -> list[str]:
    """Returns the lines of a file without its licence, which is indented."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]
