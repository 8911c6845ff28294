"""Questions that documents answer by their form: a heading that is a question, a definition, a term for a meaning."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from embedwright.data.files.documents import Document
from embedwright.data.schema import Example
from embedwright.pairs.dictionary import entry_of
from embedwright.pairs.way import Made, pair
from embedwright.pairs.words import content, sentences, unmarked

WHAT = ("what is {}?", "what is {}?", "what does {} mean?", "what is meant by {}?", "define {}", "{} definition")
TERM = ("what do you call {}?", "what is the word for {}?", "which term means {}?", "what is the name of {}?")
PERSON = re.compile(
    r"(?:an? |the )?(?:[\w-]+ ){0,4}?(?:scientist|author|programmer|engineer|mathematician|inventor|founder|writer"
    r"|president|physicist|hacker|born|artist|poet|king|queen|politician)\b"
)
_MEANS = re.compile(r"(?:an?|any|one of|the [a-z-]+ (?:of|by|in|that|for|to|from|with|at|on)) ", re.IGNORECASE)
_FINITE = re.compile(r"\b(?:is|are|was|were|can|will|has|have|may|should|must|does|do)\b")
_RELATIVE = re.compile(r"\b(?:which|that|who|whose|whom|where|when|how|what|as|if)\b")
_LINK = re.compile(r"\.?\s*\([^()]*://[^()]*\)")
# Any line is tried. What it ends in is looked at first, so that one of marks alone is not tried in all its splits.
_QUESTION = re.compile(
    r"(?=.*\?[\s*#]*\Z)(?:#\s*|\*\*\s*|\d+(?:\.\d+)*[.)]?\s+|Q(?:uestion)?\s*(?:\d+\s*)?[:.)]\s*)*"
    r"(?P<asked>[A-Z\"'].*\?)[\s*#]*"
)
_LINE = re.compile(r"\s*([-=~*_])\1{2,}\s*")  # below a heading
_ANSWER = re.compile(r"\s*(?:\*\*)?A(?:nswer)?\s*(?:\d+\s*)?[:.)](?:\*\*)?\s+")
QUESTION_WORDS = 3, 30
ANSWER_WORDS = 5
TERM_WORDS = 30  # the most of a meaning that a question spells out


def templates(document: Document, rng: random.Random) -> Made:
    """Makes a question of each heading that is one, and of a definition a question for its meaning and for its term."""
    made = [pair(document, asked, answer) for asked, answer in _headed(document)]
    first = _LINK.sub("", unmarked(next(iter(sentences(entry_of(document).meaning)), ""))).rstrip(". ")
    names = entry_of(document).names
    if not made and names and (verb := _defined(names, first)):
        name = rng.choice(names)
        asks = f"{'who' if PERSON.match(first) and name.istitle() else 'what'} {verb} {{}}?"
        made.append(pair(document, rng.choice([asks, *WHAT]).format(name), document.text))
        made += _term(document, names, first, rng)
    return made or "no_question"


def _headed(document: Document) -> Iterator[tuple[str, str]]:
    """Yields (question, answer) for a title that is a question, and for each line that is one and stands alone."""
    lines = ["", document.title, *document.text.splitlines()]
    blank = [not line.strip(" -=*_~\t") for line in lines] + [True]
    marks = {}
    for i, line in enumerate(lines[1:], start=1):
        found = _QUESTION.fullmatch(line.strip())
        alone = blank[i - 1] and (blank[i + 1] or _ANSWER.match(lines[i + 1]))
        if found and (i == 1 or alone or found.start("asked")):
            marks[i] = " ".join(found["asked"].split())
    above = {i - 1 for i in range(2, len(lines)) if blank[i - 2] and not blank[i - 1] and _LINE.fullmatch(lines[i])}
    ends = [i for i, line in enumerate(lines) if i in marks or i in above or line.startswith("#")] + [len(lines)]
    for i, asked in marks.items():
        end = len(lines) if i == 1 else min(end for end in ends if end > i)
        body = " ".join(" ".join(line for j, line in enumerate(lines[i + 1 : end], i + 1) if not blank[j]).split())
        answer = _ANSWER.sub("", body, count=1) if _ANSWER.match(body) else body
        if QUESTION_WORDS[0] <= len(asked.split()) <= QUESTION_WORDS[1] and len(answer.split()) >= ANSWER_WORDS:
            yield asked, answer


def _defined(names: list[str], first: str) -> str:
    """Returns is, are, was or were if a first sentence says what its names are, and nothing if it does not."""
    if _is_meaning(first):
        return "is"
    for name in names:
        said = re.match(
            rf"(?:an? |the )?{re.escape(name)}\b[^.,]{{0,40}}? (is|are|was|were) (?:an?|the|one)\b", first, re.I
        )
        if said:
            return said[1].lower()
    return ""


def _is_meaning(first: str) -> bool:
    """Returns whether a text is not a whole sentence but says what something is: `a room where books are kept`."""
    verb = _FINITE.search(first)
    return bool(_MEANS.match(first)) and (verb is None or _RELATIVE.search(first, 0, verb.start()) is not None)


def _term(document: Document, names: list[str], first: str, rng: random.Random) -> list[Example]:
    """Makes the question for the term, if the meaning stands without it."""
    words = {word.lower() for word in content(first)}
    if not _is_meaning(first) or len(words) < 3 or len(first.split()) > TERM_WORDS:
        return []
    if any(word.lower() in words for name in names for word in content(name)):
        return []
    meaning = first[0].lower() + first[1:]
    asked = rng.choice(TERM).format(meaning)
    return [Example("", "term", asked, tuple(document.passage(name) for name in names))]
