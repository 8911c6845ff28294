"""Cloze questions by rules (Lewis et al. 2019, arXiv 1906.04980): a part of a sentence becomes who, what, when, ...

The rules are for English. `SUBJECT is/was/can ... REST` is asked for its subject; a passive (`X was written by Y at Z
in 1987`) also for who, where and when; a number of things for how many. The verb goes where a question has it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import pairwise

from embedwright.data.files.documents import Document
from embedwright.pairs.templates import PERSON
from embedwright.pairs.way import Made, pair
from embedwright.pairs.words import FUNCTION_WORDS, around, content, is_prose, sentences, unmarked

MASKED = 0.5  # share of the passages from which the sentence is taken out, so that its words alone do not find them
DROPPED = 0.2  # share of the articles and modifiers that a question lacks: people do not ask in the words of the text
ASKED = 3  # the fewest words of a question that say something
FEWEST = 12  # words of a passage without its sentence

_SUBJECT = r"(?P<subject>[A-Z][^,:;]*?)"
_CLAUSE = re.compile(rf"{_SUBJECT} (?P<verb>is|are|was|were|can|could|will|must|should|may|might) (?P<rest>.+?)[.!]?")
_INSERTS = re.compile(r"\s*[(\[][^()\[\]]*[)\]]")
_TWO = re.compile(r"[a-z]{3}\. ")  # two sentences in one, where the second begins with a small letter
_END = re.compile(
    r"(?:[;:]|,? (?:which|who|where|whose|although|though|because|since|while|but|unless|as it)\b"
    r"|, (?:and|or|as|so|with|it|this|they|the) ).*"
)
_POINTING = re.compile(r"\b(?:this|these|those)\b")
_NEXT = re.compile(r"(?:,| and\b).*")  # what else was done, or by whom

# A passive: adverbs, what was done, and anywhere after it who did it, where and when.
_PASSIVE = re.compile(
    r"(?P<adverbs>(?:(?:\w+ly|first|now|still|later) )*)"
    r"(?P<done>[a-z-]{2,}ed|built|made|led|held|sold|found|set|written|begun)\b"
)
_MADE = (
    "written developed designed created invented founded built made coined devised proposed introduced published"
    " produced discovered started conceived implemented led described released announced funded acquired directed"
    " launched established programmed composed begun"
)
_ACTIVE = dict.fromkeys(_MADE.split()) | {"written": "wrote", "begun": "began"}
_NAME = r"(?:the )?[A-Z][\w.&'-]*(?: (?:(?:van|von|de|of|of the|for) )?[A-Z][\w.&'-]*){0,5}"
_AFTER = r"(?=$|[,;]| (?:in|at|for|from|as|to|on|during|under|since|while|using|after|before|and|between)\b)"
_MAKER = re.compile(rf" by {_NAME}(?:(?:, {_NAME})*,? and {_NAME})?{_AFTER}")
_PLACE = re.compile(rf" at {_NAME}{_AFTER}")
_YEAR = re.compile(
    r",? (?:in|around|circa) (?:(?:early|late|mid) )?(?:[A-Z][a-z]{2,8} )?(?:\d{1,2},? )?(?:1[5-9]|20)\d\d\b(?![-\w])"
)

_MANY = (
    r"(?:(?:more than|at least|at most|up to|over|about|around|approximately|some|only) )?"
    r"(?:\d{1,3}(?:,\d{3})+|\d{1,5}|two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|hundreds of)"
    r" (?P<things>(?:[a-z-]+ )?(?!thousands|plus|minus)[a-z]{3,}s)\b(?! [a-z]+s\b)"
)
_PARTS = re.compile(rf"(?<= into| from| with) {_MANY}")
_HAS = re.compile(
    rf"{_SUBJECT}"
    r" (?P<verb>has|have|consists? of|(?:contain|include|support|use|provide|offer|require|comprise|feature)s?)"
    rf" {_MANY}(?P<rest>.*?)[.!]?"
)

_PERSONS_NAME = re.compile(r"[A-Z][\w'-]+(?: [A-Z][\w.'-]*){1,3}")
# Words that make a subject say nothing to a reader of the question alone.
_ARTICLES = {"a", "an", "the"}
_VAGUE = (
    (FUNCTION_WORDS | {"stands"})
    - _ARTICLES
    - {"of", "for", "to", "and", "in", "on", "with", "at", "by", "from", "or", "all"}
)
_TERMS = {f"The {name}" for name in ("term", "word", "name", "name itself", "original", "first", "latter", "former")}
_NOT_FIRST = (FUNCTION_WORDS | {"currently", "note", "usually", "often", "later", "now"}) - _ARTICLES


def cloze(document: Document, rng: random.Random) -> Made:
    """Makes a question on a sentence find the passage around it, which lacks the sentence in half of the rows."""
    pieces = sentences(document.text)
    asked: dict[str, list[tuple[int, str]]] = {}
    for at, piece in enumerate(pieces):
        for wh, question in questions(unmarked(piece)):
            asked.setdefault(wh, []).append((at, question))
    if not asked:
        return "no_question"
    at, question = rng.choice(asked[rng.choice(sorted(asked))])
    before, after = around(pieces, at)
    masked = rng.random() < MASKED and len(f"{before} {after}".split()) >= FEWEST
    passage = [document.title, before, *([] if masked else [pieces[at]]), after]
    wh, *words = question.split()
    dropped = [rng.random() < DROPPED and _is_spare(*two) for two in pairwise([*words, ""])]
    kept = [word for number, word in enumerate(words) if number < 2 or not dropped[number]]  # the verb stays
    asked_for = kept if len(content(" ".join(kept))) >= ASKED else words
    return [pair(document, " ".join([wh, *asked_for]).rstrip(" ,.") + "?", " ".join(filter(None, passage)))]


def _is_spare(word: str, after: str) -> bool:
    """Returns whether a question reads well without a word: an article, or one that goes with the word after it."""
    plain = word.isalpha() and word[0].islower() and after[:1].isalpha() and not _PASSIVE.match(after)
    return word in _ARTICLES or (plain and FUNCTION_WORDS.isdisjoint((word, after.lower())))


def questions(sentence: str) -> Iterator[tuple[str, str]]:
    """Yields (what is asked for, the question without its mark) for each question that the rules find."""
    if not is_prose(sentence) or _TWO.search(sentence):
        return
    sentence = _INSERTS.sub("", sentence)
    if (has := _HAS.fullmatch(sentence)) and (subject := _subject(has["subject"])):
        verb = "have" if has["verb"] == "has" else re.sub(r"s(?=$| of)", "", has["verb"])
        does = "do" if has["verb"] == verb else "does"
        yield from _asking("how many", f"how many {has['things']} {does} {subject} {verb}", _NEXT.sub("", has["rest"]))
        return
    clause = _CLAUSE.fullmatch(sentence)
    if clause is None or not (subject := _subject(clause["subject"])):
        return
    verb, rest = clause["verb"], clause["rest"]
    if passive := _PASSIVE.match(rest) if verb in ("is", "are", "was", "were") else None:
        yield from _of_passive(subject, verb, passive, rest)
    starts = rest.split()[0].lower()
    if starts in FUNCTION_WORDS - _ARTICLES - {"be"} or not (_is_named(subject) or starts in ("a", "an")):
        return
    if _PERSONS_NAME.fullmatch(rest) or _POINTING.search(rest):
        return
    person = _PERSONS_NAME.fullmatch(subject) and PERSON.match(rest)
    yield from _asking("what", f"{'who' if person else 'what'} {verb}", rest)


def _of_passive(subject: str, verb: str, passive: re.Match[str], rest: str) -> Iterator[tuple[str, str]]:
    done = passive["done"]
    for wh, pattern in (("when", _YEAR), ("where", _PLACE), ("who", _MAKER), ("how many", _PARTS)):
        found = pattern.search(rest, passive.end())
        if found is None or "," in rest[: found.start()]:
            continue
        before, after = rest[: found.start()], _NEXT.sub("", rest[found.end() :])
        if wh != "who":
            things = f" {found['things']}" if wh == "how many" else ""
            yield from _asking(wh, f"{wh}{things} {verb} {subject}", before + after)
        elif done in _ACTIVE and " and " not in before:
            active = f"who {passive['adverbs']}{_ACTIVE[done] or done} {subject}"
            yield from _asking(wh, active, before[passive.end() :] + after)


def _subject(words: str) -> str:
    """Returns a subject as it stands inside a question, or nothing if it is vague or no subject."""
    first, *others = words.split()
    if words in _TERMS or first.lower() in _NOT_FIRST or first.endswith("ly") or len(others) > 7 or {*others} & _VAGUE:
        return ""
    return " ".join([first.lower() if first in ("A", "An", "The") else first, *others])


def _is_named(subject: str) -> bool:
    """Returns whether a subject has a name in it, or is one word."""
    return " " not in subject or re.search(r"(?<!^)[A-Z]|\d", subject) is not None


def _asking(wh: str, front: str, rest: str) -> Iterator[tuple[str, str]]:
    question = re.sub(r"\s+(?=,)", "", " ".join(f"{front} {_END.sub('', rest)}".split()))
    if len(content(question)) >= ASKED:
        yield wh, question
