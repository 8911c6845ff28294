"""Docstrings of installed libraries as training and evaluation data: summary -> body, and text -> part of the library.

This is real technical English that is on every machine, needs no network and comes under its library's licence. The
sources are read with `ast`, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from embedwright.data.clean.clean import Report, clean
from embedwright.data.clean.repeats import repeats
from embedwright.data.keys import near_key
from embedwright.data.schema import Example, Passage, Task
from embedwright.data.tables.table import write_examples
from embedwright.demo.heldout import without_leaks, write_beir, write_rows, write_suite
from embedwright.errors import InputError
from embedwright.files import whole_folder, write_json

# transformers has most docstrings of all, but nearly half are copies of each other: they only cost time
LIBRARIES = ("numpy", "scipy", "pandas", "sklearn", "torch", "networkx")
SUMMARY_WORDS = range(4, 41)
BODY_WORDS_MIN = 15
MAX_WORDS = 40  # longer texts are cut, to train on and to find, so that the demo takes minutes
TOPIC_TEXTS = 12  # texts of a topic that a task scores, and as many that its classifier learns from
TASK = Task(
    name="docs",
    instruction="Given the summary of a Python function or class, retrieve the rest of its documentation",
    licence="of each library",
    source="docstrings of installed libraries",
)
_PART = "Identify the part of a Python library that a docstring belongs to"
_CLASS = "Classify a docstring by the part of the Python library that it belongs to"
SUITE = (
    {"name": "docs", "kind": "retrieval", "path": "retrieval", "instruction": TASK.instruction},
    {"name": "topics", "kind": "clustering", "path": "topics.jsonl", "instruction": _PART},
    {"name": "modules", "kind": "classification", "path": "topics.jsonl", "train": "topics-train.jsonl"}
    | {"instruction": _CLASS},
)

# Folders and files that hold no documentation of the library itself.
_FOREIGN = {"test", "tests", "testing", "_testing", "conftest", "setup"}
_FOREIGN |= {"vendor", "_vendor", "vendored", "extern", "external", "externals", "third_party"}


def harvest(packages: Iterable[str]) -> Iterator[Example]:
    """Yields the public functions and classes of `packages` (top-level names), in order of package, file and line.

    The query is the summary of the docstring, the positive the rest, the id `module:name`. Tests, vendored code and
    private top-level folders are left out. Private files and deeper private folders stay: scipy and scikit-learn define
    their public functions there, and numpy in `_core`. Raises InputError for a package that is not installed.
    """
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"{package!r} is not an installed package")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            private = len(parts) > 1 and parts[0].startswith("_") and parts[0] != "_core"
            if not private and _FOREIGN.isdisjoint(parts):
                yield from _read(path, ".".join([package, *parts]).removesuffix(".__init__"))


def _read(path: Path, module: str) -> Iterator[Example]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or source of a newer Python
        return
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for name, node in {node.name: node for node in defined if not node.name.startswith("_")}.items():
        if split := split_docstring(ast.get_docstring(node) or ""):
            yield Example(f"{module}:{name}", TASK.name, split[0], positives=(Passage(split[1], f"{module}:{name}"),))


_SECTION = r"(?:Args|Arguments|Parameters?|Params|Returns?|Yields?|Raises|Attributes|Notes?|Inputs?|Shape)"
_DIRECTIVE = r"(?:version\w+|deprecated|legacy|plot|image|figure|math|index|autosummary|currentmodule|code\S*)"

_SIGNATURE = re.compile(r"\A[\w.]+\([^\n]*\)[^\n]*\n+")  # torch: `conv1d(input, weight) -> Tensor` in front
# The summary ends with its sentence (not after `e.g.`), with its paragraph, or where the first section starts.
_SUMMARY_END = re.compile(
    r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.)(?<! al\.)\s+(?=[A-Z])|\n[ \t]*\n|\n(?=[ \t]*:\w)"
    rf"|\n(?=[ \t]*{_SECTION}[ \t]*:{{0,2}}[ \t]*\n)"
)
# The body ends where code starts, or See Also: it says what *other* objects do, and would answer their summaries.
_BODY_END = re.compile(r"^[ \t]*(?:```|>>>|\.\. \[|(?:See Also|References|Examples?)[ \t]*:{0,2}[ \t]*$)", re.M)
_REMOVED = re.compile(
    # Removes directives that are not prose, with all that is indented below; of other directives, only the marker.
    rf"^(?P<indent>[ \t]*)\.\. {_DIRECTIVE}::.*(?:\n(?P=indent)[ \t]+\S.*|\n[ \t]*(?=\n))*|\.\. [\w-]+::"
    # Underlines of headings, footnote marks, scipy's docstring templates, addresses, roles.
    r"|^[ \t]*([-=~^*#])\2{2,}[ \t]*$|\[\w+\]_|%\(\w+\)s|https?://[^\s>)]+|:[\w:+-]+:(?=`)",
    re.M,
)
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*|`[~!](?:[^`]*\.)?([^`.]+)`")  # `text <target>`, `~a.b.C`


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Returns summary and body of a dedented docstring as plain running text, or None if it makes no good pair.

    A summary has 4 to 40 words. A body has 15 or more and does not repeat the summary.
    """
    text = _REMOVED.sub("", _BODY_END.split(_SIGNATURE.sub("", docstring.strip()), maxsplit=1)[0])
    summary, body = map(_plain, [*_SUMMARY_END.split(text.strip(), maxsplit=1), ""][:2])
    words = sum(any(map(str.isalpha, word)) for word in body.split())
    if len(summary.split()) not in SUMMARY_WORDS or words < BODY_WORDS_MIN:
        return None
    if not (summary + body).isprintable():  # `\b` or a lone surrogate in a docstring that should have been raw
        return None
    if near_key(summary) in near_key(body):  # the pair would be answered by matching strings
        return None
    return summary, body


def _plain(text: str) -> str:
    """Returns the text without links and backticks, on one line."""
    return " ".join(_LINK.sub(r"\1\2", text).replace("`", "").split())


def build(
    out: Path,
    *,
    packages: Sequence[str] = LIBRARIES,
    heldout_share: float = 0.1,
    max_train: int = 1_500,
    max_queries: int = 200,
    topic_min: int = 40,
    topic_max: int = 60,
) -> dict[str, int]:
    """Writes training data and a held-out suite from the docstrings of `packages` into `out`, whole or not at all.

    `train/pairs.jsonl` has pairs of summary and body, `train/topics.jsonl` texts and labels, `heldout/` a suite of
    whole modules. What repeats a held-out text is not trained on. A topic counts if it has `topic_min` training texts
    and its share of that held out; at most `topic_max` are trained on. The same libraries and arguments give the same
    bytes. Returns the counts, which `report.json` has too.

    Raises OutputExistsError if `out` is not empty, InputError for a package that is not installed, and where too little
    is left to evaluate.
    """
    rows = sorted(map(_shortened, harvest(packages)), key=lambda row: (_draw(row.id), row.id))
    # by module: the docstrings of a file share their wording, so no file may give to both sides
    sides = [[row for row in rows if (_draw(_module(row)) < heldout_share) is held] for held in (False, True)]
    unique, heldout = (list(clean(side, Report(), by="positive")) for side in sides)
    train, _ = without_leaks(unique, [text for row in heldout for text in (row.query, row.positives[0].text)])
    pairs, asked = _answerable(train)[:max_train], _answerable(heldout)[:max_queries]
    train_topics, heldout_topics = _topics(train, packages), _topics(heldout, packages)
    labels = [
        label
        for label, texts in sorted(train_topics.items())
        if len(texts) >= topic_min and len(heldout_topics.get(label, ())) >= topic_min * heldout_share
    ]
    if not asked or len(labels) < 2:
        raise InputError(f"{len(asked)} queries, {len(labels)} topics to evaluate: add packages or lower topic_min")
    report = {
        "docstrings": len(rows),
        "copies of others removed": len(rows) - len(unique) - len(heldout),
        "removed from training, since they repeat a held-out text": len(unique) - len(train),
        "pairs of a summary and the text below it to train on": len(pairs),
        "parts of libraries that texts are labelled with": len(labels),
        "texts held out": len(heldout),
        "summaries held out, whose text is to be found among these": len(asked),
    }
    with whole_folder(out) as temp:
        write_examples(temp / "train" / "pairs.jsonl", pairs, {TASK.name: TASK})
        write_rows(temp / "train" / "topics.jsonl", _labelled(train_topics, labels, topic_max))
        write_rows(temp / "heldout" / "topics-train.jsonl", _labelled(train_topics, labels, TOPIC_TEXTS))
        write_rows(temp / "heldout" / "topics.jsonl", _labelled(heldout_topics, labels, TOPIC_TEXTS))
        documents, queries = {row.id: row.positives[0].text for row in heldout}, {row.id: row.query for row in asked}
        write_beir(temp / "heldout" / "retrieval", documents, queries, [(row.id, row.id) for row in asked])
        write_suite(temp / "heldout", "docstrings", SUITE)
        write_json(temp / "report.json", report)
    return report


def _shortened(row: Example) -> Example:
    words = row.positives[0].text.split()[:MAX_WORDS]
    return replace(row, positives=(Passage(" ".join(words), row.id),))


def _draw(name: str) -> float:
    """Returns a number in [0, 1) that depends on the name alone, whatever else is installed."""
    return int.from_bytes(hashlib.blake2b(f"0:{name}".encode(), digest_size=8).digest()) / 2**64


def _module(row: Example) -> str:
    return row.id.partition(":")[0]


def _answerable(rows: Sequence[Example]) -> list[Example]:
    """Returns those whose summary fits one object alone: others would have right answers that count as wrong."""
    found = repeats(row.query for row in rows)
    shared = found.keys() | {match.first for match in found.values()}
    return [row for i, row in enumerate(rows) if i not in shared]


# Libraries by the names that their docstrings use.
_ALIASES = {"numpy": ["np"], "pandas": ["pd"], "sklearn": ["scikit-learn"], "networkx": ["nx"], "torch": ["pytorch"]}


def _topics(rows: Iterable[Example], packages: Iterable[str]) -> dict[str, list[str]]:
    """Maps each topic, which is a library and its part (`scipy.stats`; `numpy._core` is `numpy.core`), to its texts.

    Names of libraries, and dotted paths that begin with them, are removed from the texts. They give half of the label
    away, and clustering would become string matching.
    """
    names = [name for package in packages for name in [package, *_ALIASES.get(package, [])]]
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b(?:\.\w+)*", re.I)
    texts: dict[str, list[str]] = {}
    for row in rows:
        label = ".".join(part.strip("_") for part in _module(row).split(".")[:2])
        words = named.sub(" ", f"{row.query} {row.positives[0].text}").split()
        texts.setdefault(label, []).append(" ".join(words[:MAX_WORDS]))
    return texts


def _labelled(topics: dict[str, list[str]], labels: Iterable[str], limit: int) -> list[dict[str, str]]:
    return [{"text": text, "label": label} for label in labels for text in topics[label][:limit]]
