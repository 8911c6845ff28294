"""Reads documents from what Debian packages hold: descriptions, dictionaries, WordNet, pages of HTML and Mallard.

A row is {id, title, text, source, tags}. Texts are cut into passages between paragraphs or sentences. Code, tables,
navigation, quotations of verse and what is not English prose are left out.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

Row = dict[str, object]
PASSAGE = 12, 110  # the fewest and the most words of a passage: long texts cost tokens and teach little more
PER_SOURCE = 3  # packages of one source say nearly the same: so many of them
DICTIONARY = 6  # the fewest words of a dictionary's meaning

# ---- package descriptions


def packages(stanzas: Iterable[str]) -> Iterator[Row]:
    """Yields the description of each package: its section and debtags as tags, its source package as the source.

    Leaves out what says little: packages of debugging symbols and translations, and, of one source, all but the first
    `PER_SOURCE` whose first paragraph is another one.
    """
    seen: set[str] = set()
    of_source: Counter[str] = Counter()
    for stanza in stanzas:
        fields: dict[str, str] = dict(re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
        title, *body = (fields.get("Description-en") or fields.get("Description") or "").split("\n")
        text = _paragraphs(body)
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        section = fields.get("Section", "").split("/")[-1]
        first = text.split("\n")[0]
        if len(text.split()) < PASSAGE[0] or section in ("debug", "localization", "oldlibs", "metapackages"):
            continue
        if first in seen or of_source[source] == PER_SOURCE:
            continue
        seen.add(first)
        of_source[source] += 1
        tags = [tag.strip() for tag in fields.get("Tag", "").replace("\n", " ").split(",")]
        kept = [tag for tag in tags if tag.startswith(("field::", "game::", "use::", "works-with::", "sound::"))]
        yield {
            "id": fields["Package"],
            "title": title.strip(),
            "text": _first_words(text, PASSAGE[1]),
            "source": source,
            "tags": [f"section::{section}", *kept],
        }


def _paragraphs(lines: list[str]) -> str:
    """Joins the lines of a long description; an item of a list and what stands after ` .` begin a line of their own."""
    text = ""
    for line in lines:
        bare = line.strip()
        if bare == ".":
            text += "\n"
        elif line.startswith("  ") or text.endswith("\n") or not text:
            text += f"\n{bare}"
        else:
            text += f" {bare}"
    return re.sub(r"\n+", "\n", text).strip()


def _first_words(text: str, most: int) -> str:
    """Returns whole lines up to so many words, and the first one in any case."""
    kept: list[str] = []
    for line in text.split("\n"):
        if kept and sum(len(one.split()) for one in [*kept, line]) > most:
            break
        kept.append(line)
    return "\n".join(kept)


# ---- dictionaries

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def dictd(index: Path) -> Iterator[tuple[str, str]]:
    """Yields (headword, entry) of a dictionary in dictd's format: an index, and beside it the text, gzipped (.dict.dz).

    An index line is the word, and the entry's offset and size as numbers to the base of 64.
    """
    data = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    lines = gzip.decompress(index.read_bytes()) if index.read_bytes()[:2] == b"\x1f\x8b" else index.read_bytes()
    seen = set()
    for line in lines.decode("utf-8", "replace").splitlines():
        word, *place = line.split("\t")
        offset, size = (sum(_DIGITS[c] * 64**i for i, c in enumerate(reversed(number))) for number in place[:2])
        if not word.startswith("00-database") and offset not in seen:
            seen.add(offset)
            yield word, data[offset : offset + size].decode("utf-8", "replace")


_GRAMMAR = re.compile(r"\A\s*(?:/[^/\n]+/,?\s*)*(?:(?:n|v|adj|adv|vt|vi|prov|excl|interj|suff|pref|obs)\.[, ]*)+\n")


def terms(index: Path) -> Iterator[Row]:
    """Yields the entries of FOLDOC, the Jargon File or the Devil's Dictionary, in passages."""
    for word, entry in dictd(index):
        head, _, body = entry.strip("\n").partition("\n")
        if index.stem == "devil":
            head, _, body = entry.strip().partition(",")
            body = re.sub(r"\A\s*(?:n|adj|v|adv|p|pp|x|prep|interj)(?:\.\s*[a-z]*)*\.\s*", "", body)
        body = _GRAMMAR.sub("", body)
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", re.sub(r"\{\s*([^{}]*)\}", r"\1", body))]
        paragraphs = [re.sub(r"\A(?:<[^<>]+>\s*|\[[^\[\]]*\]\s*)+", "", p) for p in paragraphs]
        paragraphs = [p for p in paragraphs if not re.fullmatch(r"\(?\d{4}-\d\d-\d\d\)?", p) and _is_prose(p)]
        for passage in _passages(paragraphs, DICTIONARY):
            title = head.strip().capitalize() if index.stem == "devil" else word
            yield {"id": word, "title": title, "text": passage, "source": word}


_FIELD = re.compile(r"\A(?:\d+\.\s*)?\(([A-Z][a-z]+)\.?(?: [^()]*)?\)\s*")


# Abdomen \Ab*do"men\, n. [its etymology, over lines] (Anat.)
_HEAD = re.compile(r"\A[^\\]*\\[^\\]*\\[^\n\[]*(?:\[(?:[^\[\]]|\[[^\[\]]*\])*\])?[^\n]*\n")
_NO_MEANING = re.compile(r"[?\]`*]|\A[(\"]|\bSee\b|etymol|\b[LFG]r?\. |\bpl\. ")


def gcide(index: Path) -> Iterator[Row]:
    """Yields each meaning in the Collaborative International Dictionary; its field (Bot., Law, Mus.) is its tag."""
    for word, entry in dictd(index):
        name = " ".join(word.split())
        if not re.fullmatch(r"[A-Za-z][a-z]+(?:[ -][A-Za-z][a-z]+)?", name):
            continue
        head = _HEAD.match(entry)
        body = entry[head.end() :] if head else ""
        of_entry = re.search(r"\(([A-Z][a-z]+)\.\)\s*\Z", head[0]) if head else None
        for meaning in re.split(r"\n\s*\n|\n(?=\s*\d+\. )", body):
            # deeper than the meaning: quotations; besides: etymology, derived words, synonyms
            if re.match(r"\s{9,}\S", meaning) or re.match(r"\s*(?:Syn:|\{|\[|--|Note: \[)", meaning):
                continue
            text = re.sub(r"\[[^\[\]]*\]", " ", meaning)
            text = re.sub(r"[{}]", "", " ".join(text.split()))
            text = re.sub(r"\A(?:\d+\.\s*)?(?:Note:\s*)?", "", text)
            field = _FIELD.match(text)
            text = text[field.end() :] if field else text
            text = re.sub(r"(?:[;,:] (?:as|--also|-- also|--called|-- called|-- ),?\b.*|\s--.*)\Z", ".", text)
            text = re.sub(r"\A(?:\([a-z]\)\s*)|\s*\([a-z]\)(?= )", "", text)
            text = re.sub(r"(?<=[.;]) \"[^\"]*\"\.*\Z|(?<=\.)\.+\Z", "", text)  # a quotation
            if len(text.split()) < DICTIONARY or not _is_prose(text) or _NO_MEANING.search(text):
                continue
            mark = field[1] if field else of_entry[1] if of_entry else ""
            yield {
                "id": name,
                "title": name.lower(),
                "text": _first_words(text, PASSAGE[1]),
                "source": name,
                "tags": [f"field::{mark}"] if mark else [],
            }


_LEXNAMES = (  # of noun files 3 to 28
    "tops act animal artifact attribute body cognition communication event feeling food group location motive object"
    " person phenomenon plant possession process quantity relation shape state substance time"
)


def wordnet(data: Path) -> Iterator[Row]:
    """Yields the glosses of one of WordNet's data files under their words; a noun's lexicographer file is its tag."""
    for line in data.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("  "):
            continue
        front, _, gloss = line.partition(" | ")
        offset, number, kind, count, *rest = front.split(" ")
        words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
        yield {
            "id": f"{kind}{offset}",
            "title": ", ".join(words),
            "text": gloss.strip(),
            "source": f"{kind}{offset}",
            "tags": [f"lexname::{_LEXNAMES.split()[int(number) - 3]}"] if kind == "n" and number != "03" else [],
        }


# ---- pages

_SKIPPED_CLASS = re.compile(r"sidebar|nav|related|toc|footer|header|highlight|breadcrumb|copyright|legal|footnote")
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6", "title"}


def _tags(names: str) -> set[str]:
    return set(names.split())


_SKIPPED = _tags(
    "script style nav header footer pre table aside screen code-block info svg head button select listing media"
    " programlisting textarea"
)
_BLOCKS = _tags("p li dd dt blockquote item desc figcaption div section para ul ol dl")
_VOID = _tags("br img hr meta link input col area base source wbr param")


class _Page(HTMLParser):
    """Collects the sections of a page of HTML or Mallard, as (heading, paragraphs)."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sections: list[tuple[str, list[str]]] = [("", [])]
        self._skipped: list[str] = []
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._skipped += [tag] if tag == self._skipped[0] else []
        elif tag in _SKIPPED or (tag not in _VOID and _SKIPPED_CLASS.search(dict(attrs).get("class") or "")):
            if tag not in ("body", "html", "section"):
                self._skipped.append(tag)
        elif tag in _HEADINGS | _BLOCKS:
            self._end()
        elif tag == "br":
            self._text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.pop()
        elif tag in _HEADINGS:
            heading = " ".join("".join(self._text).replace("¶", "").split())
            self._text.clear()
            self.sections.append((re.sub(r"\A(?:[A-Z]?[\d.]+\d[.:]?|\d+[.)]|Chapter \d+\.)\s+", "", heading), []))
        elif tag in _BLOCKS:
            self._end()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text.append(data)

    def _end(self) -> None:
        paragraph = " ".join("".join(self._text).split())
        self._text.clear()
        if paragraph:
            self.sections[-1][1].append(paragraph)


def page(file: Path) -> Iterator[Row]:
    """Yields the passages of a page of HTML or Mallard: prose alone, each under its section's heading."""
    parser = _Page()
    parser.feed(file.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    top = next((heading for heading, _ in parser.sections if heading), "")
    for heading, paragraphs in parser.sections:
        title = heading if len(heading.split()) > 1 or heading == top else f"{top}: {heading}"
        for passage in _passages([p for p in paragraphs if _is_prose(p)], PASSAGE[0]):
            yield {"id": file.stem, "title": title.strip(": "), "text": passage, "source": file.stem}


def crawl(file: Path) -> Iterator[Row]:
    """Yields the descriptions of a game: `%%%%`, a name, an empty line, a text."""
    for block in file.read_text(encoding="utf-8", errors="replace").split("%%%%"):
        head, _, body = block.strip().partition("\n")
        text = " ".join(body.split())
        if len(text.split()) >= PASSAGE[0] and _is_prose(text) and not head.startswith(("#", "<", "w:")):
            yield {"id": head, "title": head, "text": _first_words(text, PASSAGE[1]), "source": head}


def _is_prose(paragraph: str) -> bool:
    """Tells whether a paragraph is sentences in English, not a menu, code or a table."""
    words = paragraph.split()
    letters = sum(char.isalpha() for char in paragraph)
    plain = sum(bool(re.fullmatch(r"[(\"'“‘]?[A-Za-z][a-z’'-]*[a-z]?[.,;:!?)\"'”’]*", word)) for word in words)
    return (
        len(words) >= DICTIONARY
        and paragraph[-1] in ".!?:)”\"'"
        and letters >= 0.75 * len(paragraph.replace(" ", ""))
        and plain >= 0.75 * len(words)
        and not re.search(r"[{}\\]|\bcopyright\b|©|\$\w|--\w", paragraph, re.IGNORECASE)
    )


def _passages(paragraphs: Iterable[str], fewest: int) -> Iterator[str]:
    """Puts paragraphs of one section together up to `PASSAGE` words; a longer one is cut between sentences."""
    pieces: list[str] = []
    for paragraph in paragraphs:
        if len(paragraph.split()) <= PASSAGE[1]:
            pieces.append(paragraph)
        else:
            pieces += re.split(r"(?<=[.!?])\s+(?=[A-Z\"“(])", paragraph)
    passage: list[str] = []
    for piece in [*pieces, ""]:
        size = sum(len(one.split()) for one in passage)
        if passage and (not piece or size + len(piece.split()) > PASSAGE[1]):
            if size >= fewest:
                yield " ".join(passage)
            passage = []
        passage.append(piece)
