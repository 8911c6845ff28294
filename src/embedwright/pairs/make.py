"""Makes training examples from plain documents, in the ways that are asked for: `data pairs`."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from embedwright.config import did_you_mean
from embedwright.data.answers import collection_id
from embedwright.data.files.documents import COLUMNS, Document, read_documents
from embedwright.data.files.folders import stem_of
from embedwright.data.files.parts import Counts, claim, write_once
from embedwright.data.files.quarantine import Quarantine, good_rows
from embedwright.data.files.rows import read_rows
from embedwright.data.keys import exact_key
from embedwright.data.schema import DataError, Example, Family, Passage, Task, parse_example
from embedwright.data.tables.table import write_examples
from embedwright.errors import InputError, OutputExistsError
from embedwright.files import check_file, remove_leftovers
from embedwright.pairs import cut
from embedwright.pairs.classes import classes
from embedwright.pairs.cloze import cloze
from embedwright.pairs.dictionary import gloss
from embedwright.pairs.lemma import lemma
from embedwright.pairs.links import see_also
from embedwright.pairs.swap import swap
from embedwright.pairs.templates import templates
from embedwright.pairs.way import Made, Make
from embedwright.pairs.wordnet import WHERE, WordNet

FORMAT = 3  # version of the parts: raise it when a way makes other examples
BLOCK = 2048  # documents of a part: what a killed run loses at most


class Options(NamedTuple):
    """Holds what some ways need: the most negatives of an example, and WordNet."""

    negatives: int
    wordnet: WordNet | None


class Way(NamedTuple):
    """Names a way: `make` gets all documents, which it may read or not, and returns what makes the examples of one.

    It also gets the options of ways. `draws`: it is asked `per_document` times, and makes other examples each time.
    """

    make: Callable[[Iterable[Document], Options], Make]
    draws: bool = False


class Meaning(NamedTuple):
    """Says what the rows of a way ask for, for their task."""

    family: Family
    instruction: str
    symmetric: bool = False


def _bm25(documents: Iterable[Document], options: Options) -> Make:
    from embedwright.pairs.bm25 import taught  # needs a package that the other ways do without

    return taught(documents, options.negatives)


def _lemma(documents: Iterable[Document], options: Options) -> Make:
    assert options.wordnet is not None
    return lemma(options.wordnet)


WAYS: dict[str, Way] = {
    "title": Way(lambda *_: cut.title),
    "summary": Way(lambda *_: cut.summary),
    "crops": Way(lambda *_: cut.crops, draws=True),
    "sentence": Way(lambda *_: cut.sentence, draws=True),
    "bm25": Way(_bm25, draws=True),
    "cloze": Way(lambda *_: cloze, draws=True),
    "templates": Way(lambda *_: templates),  # draws no more than the words of a question
    "gloss": Way(lambda documents, options: gloss(documents, options.negatives), draws=True),
    "swap": Way(lambda *_: swap, draws=True),
    "classes": Way(lambda documents, options: classes(documents, options.negatives), draws=True),
    "see-also": Way(lambda documents, _: see_also(documents)),
    "lemma": Way(_lemma, draws=True),
}
ANSWER = "Given a question, retrieve passages that answer the question"
MEANINGS: dict[str, Meaning] = {
    "title": Meaning("retrieval", "Given a title, retrieve the text that it stands above"),
    "summary": Meaning("retrieval", "Given a summary, retrieve the text that it begins"),
    "crops": Meaning("retrieval", "Given a part of a text, retrieve another part of the same text"),
    "sentence": Meaning("retrieval", "Given a sentence, retrieve the passage that it comes from"),
    "bm25": Meaning("retrieval", "Given a part of a text, retrieve texts that share its words"),
    "cloze": Meaning("retrieval", ANSWER),
    "templates": Meaning("retrieval", ANSWER),
    "templates-term": Meaning("retrieval", "Given a question, retrieve the term that it asks for"),
    "gloss": Meaning("retrieval", "Given a word and an example of its use, retrieve what it means there"),
    "gloss-usage": Meaning("retrieval", "Given a word and its meaning, retrieve an example of its use"),
    "swap": Meaning("pair", "Given a claim, retrieve the passage that supports it"),
    "classes": Meaning("clustering", "Identify the category of the text", symmetric=True),
    "see-also": Meaning("retrieval", "Given a text, retrieve texts on related subjects", symmetric=True),
    "lemma": Meaning("sts", "Retrieve semantically similar text", symmetric=True),
}


def make_pairs(
    path: Path,
    out: Path,
    how: Sequence[str],
    *,
    columns: Mapping[str, tuple[str, ...]] = COLUMNS,
    per_document: int = 1,
    negatives: int = 7,
    wordnet: Path | None = None,
    name: str | None = None,
    licence: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the examples that the ways `how` make of the documents at `path` to `out`, whole or not at all.

    The ways follow each other in the file, each in the order of the documents, with their tasks `<name>-<way>` beside
    it (`name`: by default the file's). What a way draws for a document depends on `seed`, the way and the document's id
    alone; `bm25`, `gloss`, `classes` and `see-also` look at other documents, too, and hold them in memory. Documents
    are read once for each way, and once before, to find bad lines: these are kept in `<out>.quarantine.jsonl`. What is
    made waits in the folder `<out>.parts`. The same call, after a kill, goes on from there.

    `per_document`: how often a way that draws does so for a document; equal examples are written once. `negatives`: the
    most of an example, where a way gives some. `wordnet`: the folder of WordNet's files, for `lemma`. `licence`: of the
    documents, written into the tasks.

    Returns counts: `documents` read, lines `quarantined`, and for each way the `documents` that it used, the `examples`
    that it made, and the documents `skipped` by reason. Raises InputError for an unknown way, and DataError if there is
    no document, or no example.
    """
    ways = check_ways(how)
    options = Options(negatives, _wordnet(ways, wordnet))
    check_file(out)
    if path.is_dir() and out.resolve().parent == path.resolve():
        raise InputError(f"--out {out} lies among the documents, and the next run would read it as one")
    name = name or stem_of(path)
    quarantine_path = out.with_name(f"{out.name}.quarantine.jsonl")
    quarantine_path.unlink(missing_ok=True)
    with Quarantine(path, quarantine_path) as quarantine:
        documents, digest = 0, hashlib.sha256()
        for document in read_documents(path, columns, quarantine.add):
            documents += 1
            digest.update(repr(document).encode())
    if not documents:
        raise DataError(f"{path}: no document ({[*quarantine.reasons, 'it is empty'][0]})")
    all_of_them = _Documents(path, columns)
    counts: dict[str, Any] = {way: {"documents": 0, "examples": 0, "skipped": Counter()} for way in ways}

    facts = {"format": FORMAT, "documents": digest.hexdigest(), "seed": seed, "per_document": per_document}
    facts |= {"negatives": negatives, "wordnet": options.wordnet.digest if options.wordnet else None}
    parts = out.with_name(f"{out.name}.parts")
    _clear(parts, facts)

    def write_block(way: str, make: Callable[[], Make], block: list[Document], file: Path) -> Counts:
        count: Counts = {"documents": 0, "examples": 0, "skipped": Counter()}
        draws = range(per_document if WAYS[way].draws else 1)

        def of_block() -> Iterator[Example]:
            for document in block:
                seeds = [f"{seed}:{way}:{document.id}:{n}" for n in draws]
                yield from _of_document(way, make(), document, seeds, count)

        write_examples(file, of_block(), {})
        return count

    def examples() -> Iterator[Example]:
        for way in ways:
            make = cache(partial(WAYS[way].make, all_of_them, options))  # read when a part is missing, and once
            for number, block in enumerate(_blocks(all_of_them)):
                file = parts / f"{way}-{number}.jsonl"
                count = write_once(file, facts, partial(write_block, way, make, block))
                for key, value in count.items():
                    counts[way][key] += Counter(value) if key == "skipped" else value
                yield from good_rows(read_rows(file), _example, file.name, None, file)
        if not any(count["examples"] for count in counts.values()):
            shutil.rmtree(parts)
            raise DataError(f"{path}: no example of {documents} documents ({_reasons(counts)})")

    tasks = {
        f"{name}-{kind}": Task(
            name=f"{name}-{kind}",
            licence=licence,
            source=f"{path.name}, by rules: {kind}",
            **meaning._asdict(),
        )
        for kind, meaning in MEANINGS.items()
    }
    write_examples(out, (_of_collection(name, example) for example in examples()), tasks)
    shutil.rmtree(parts)
    return {"documents": documents, "quarantined": quarantine.count, "ways": counts}


def _example(row: Mapping[str, Any], _: str) -> Example:
    return parse_example(row, default_task="")


def _clear(parts: Path, facts: Counts) -> None:
    """Makes the folder ready for parts of these facts. Removes those of others, and what a killed run has left."""
    remove_leftovers(parts)
    try:
        claim(parts, facts)
    except OutputExistsError:
        raise
    except InputError:
        shutil.rmtree(parts)


def _of_collection(name: str, example: Example) -> Example:
    """Names the collection in the task and in all ids, so that a document is known in the rows of other ways, too."""

    def within(passages: Sequence[Passage]) -> tuple[Passage, ...]:
        return tuple(replace(one, id=None if one.id is None else collection_id(name, one.id)) for one in passages)

    task, positives, negatives = f"{name}-{example.task}", within(example.positives), within(example.negatives)
    return replace(example, task=task, positives=positives, negatives=negatives)


def check_ways(how: Sequence[str]) -> list[str]:
    """Returns the ways, each once. Raises InputError for a name that is none, and for none at all."""
    for way in how:
        if way not in WAYS:
            raise InputError(f"--how {way!r}: no such way{did_you_mean(way, WAYS)}; there are {', '.join(WAYS)}")
    if not how:
        raise InputError(f"--how: name at least one way: {', '.join(WAYS)}")
    return list(dict.fromkeys(how))


def _wordnet(ways: Sequence[str], folder: Path | None) -> WordNet | None:
    if "lemma" in ways and folder is None:
        raise InputError(f"--how lemma needs --wordnet FOLDER: {WHERE}")
    if "lemma" not in ways and folder is not None:
        raise InputError("--wordnet is read by the way lemma alone: add it to --how, or leave --wordnet out")
    return None if folder is None else WordNet(folder)


class _Documents:
    """Reads the documents anew each time they are iterated over, without the bad lines."""

    def __init__(self, path: Path, columns: Mapping[str, tuple[str, ...]]) -> None:
        self.path, self.columns = path, columns

    def __iter__(self) -> Iterator[Document]:
        return read_documents(self.path, self.columns, lambda *_: None)


def _blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    given = iter(documents)
    while block := list(islice(given, BLOCK)):
        yield block


def _of_document(way: str, make: Make, document: Document, seeds: Sequence[str], count: Counts) -> Iterator[Example]:
    """Yields the examples of one document, one draw a seed, with their ids and the kind of row as their task."""
    found: dict[tuple[str, str], Example] = {}
    reasons = []
    for seed in seeds:
        made = _sound(
            make(document, random.Random(seed))
        )  # a str is hashed with SHA-512, not with Python's salted hash
        if isinstance(made, str):
            reasons.append(made)
            continue
        for one in made:
            found.setdefault((one.query, one.paired[0].text), one)
    if not found:
        count["skipped"][reasons[0]] += 1
        return
    count["documents"] += 1
    count["examples"] += len(found)
    for number, one in enumerate(found.values()):
        yield replace(one, id=f"{way}:{document.id}:{number}", task=f"{way}-{one.task}" if one.task else way)


def _sound(made: Made) -> Made:
    """Leaves out examples whose query is a paired text, and negatives that are the query or a positive."""
    if isinstance(made, str):
        return made
    sound = []
    for one in made:
        paired = {exact_key(passage.text) for passage in one.paired}
        if "" in paired or exact_key(one.query) in {"", *paired}:
            continue
        right = {exact_key(text) for text in (one.query, *(passage.text for passage in one.positives))}
        stay = [i for i, passage in enumerate(one.negatives) if exact_key(passage.text) not in right]
        scores = one.negative_scores
        sound.append(
            replace(
                one,
                negatives=tuple(one.negatives[i] for i in stay),
                negative_scores=None if scores is None else tuple(scores[i] for i in stay),
            )
        )
    return sound or "query_is_positive"


def _reasons(counts: Mapping[str, Any]) -> str:
    return "; ".join(f"{way}: {', '.join(f'{k} {n}' for k, n in c['skipped'].items())}" for way, c in counts.items())
