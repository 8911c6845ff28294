"""Two sentences that differ in one word, with a score of how alike they are, from WordNet's relations."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from embedwright.data.files.conversion import scored
from embedwright.data.files.documents import Document
from embedwright.pairs.way import Made, Make, pair
from embedwright.pairs.wordnet import Sense, WordNet
from embedwright.pairs.words import FUNCTION_WORDS, is_prose, sentences, unmarked

SCORES = {"synonym": 5.0, "hypernym": 4.0, "sister": 2.5, "antonym": 1.5}  # on the scale of STS, from 0 to 5
CHILDREN = 30  # the most of a hypernym with sister terms: those of more are too far from each other
DEPTH = 6  # the fewest steps from a hypernym to the top, near which are `entity`, `object`, `content`
_TOKEN = re.compile(r"[\w'’-]+|[^\w\s]")
_LETTERS = re.compile(r"[a-z]{3,}")
_AN = re.compile(r"(?!eu|onc?e\b|u(?:[bst][aeiu]|ni(?:[cfoqtv]|\b)))[aeiou]|hon|hour")  # what `an` stands before
_BEFORE = {  # what a word of that part of speech stands after
    "n": "a an the this that each every any no one another my your his her its our their",
    "v": "to can could will would shall should may might must cannot",
    "a": "is are was were be been very more too so quite less",
}
_DETERMINERS, _MODALS, _COPULAS = (frozenset(words.split()) for words in _BEFORE.values())


def lemma(wordnet: WordNet) -> Make:
    """Returns what makes the scored examples of a document: one for each relation that a word of it allows.

    A word of a sentence is replaced by a synonym, a hypernym, a sister term or an antonym. It stands there uninflected,
    its neighbours tell its part of speech, and it is not part of a longer term. It nearly always has one sense; what
    replaces it has that of the relation most often.
    """

    def make(document: Document, rng: random.Random) -> Made:
        found: dict[str, list[tuple[str, str]]] = {}
        for sentence in filter(is_prose, map(unmarked, sentences(document.text))):
            for start, end, sense in _places(sentence, wordnet):
                for relation, word in _related(sentence[start:end], sense, wordnet):
                    found.setdefault(relation, []).append((sentence, _with(sentence, start, end, word)))
        return [
            scored(pair(document, *rng.choice(found[relation])), score)
            for relation, score in SCORES.items()
            if relation in found
        ] or "nothing_to_replace"

    return make


def _places(sentence: str, wordnet: WordNet) -> Iterator[tuple[int, int, Sense]]:
    """Yields (start, end, sense) of the words whose sense is plain."""
    tokens = list(_TOKEN.finditer(sentence))
    texts = ["", *(token[0] for token in tokens), ""]
    for before, token, after in zip(texts, tokens, texts[2:], strict=False):
        word = token[0]
        if not _LETTERS.fullmatch(word) or word in FUNCTION_WORDS or wordnet.is_form(word):
            continue
        if wordnet.has(f"{before} {word}") or wordnet.has(f"{word} {after}"):
            continue
        sense = wordnet.usual(word)
        if sense and _fits(sense.pos, before.lower(), after.lower(), wordnet):
            yield token.start(), token.end(), sense


def _fits(pos: str, before: str, after: str, wordnet: WordNet) -> bool:
    """Returns whether what stands between two words is of that part of speech."""
    ends = not after[:1].isalnum() or after in FUNCTION_WORDS
    if pos == "n":
        described = (other := wordnet.usual(before)) is not None and other.pos == "a"
        return (before in _DETERMINERS or described) and ends and after not in ("-", "/")
    if pos == "a":
        return (before in _DETERMINERS and not ends) or (before in _COPULAS and ends)
    return before in _MODALS if pos == "v" else True


def _related(word: str, sense: Sense, wordnet: WordNet) -> Iterator[tuple[str, str]]:
    """Yields (relation, word) of the words that may stand in its place."""
    names, pointers = wordnet.synset(sense)
    at = [name.lower() for name in names].index(word) + 1
    yield from (("synonym", name) for name in _names(sense, wordnet) if name != word)
    for symbol, other, source, target in pointers:
        if symbol == "!" and source == at:
            opposite = wordnet.synset(other)[0][target - 1]
            yield from (("antonym", name) for name in _names(other, wordnet) if name == opposite)
        elif symbol == "@" and sense.pos == "n" and wordnet.is_common(word) and wordnet.depth(other) >= DEPTH:
            yield from (("hypernym", name) for name in _names(other, wordnet))
            children = [child for link, child, *_ in wordnet.synset(other)[1] if link == "~"]
            for child in children if len(children) <= CHILDREN else ():
                if child != sense:
                    yield from (("sister", name) for name in _names(child, wordnet) if wordnet.usual(name))


def _names(sense: Sense, wordnet: WordNet) -> list[str]:
    """Returns the words of a synset that a reader takes in this sense."""
    words = (word for word in wordnet.synset(sense)[0] if word.isalpha() and word.islower())
    common = (word for word in words if wordnet.is_common(word) and word not in FUNCTION_WORDS)
    return [word for word in common if wordnet.is_first(word, sense)]


def _with(sentence: str, start: int, end: int, word: str) -> str:
    """Puts a word in the place of another, after the form of the article that it asks for."""
    before = sentence[:start]
    if article := re.search(r"\b([Aa])n? $", before):
        before = before[: article.end(1)] + ("n " if _AN.match(word) else " ")
    return before + word + sentence[end:]
