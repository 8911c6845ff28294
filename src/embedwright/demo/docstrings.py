"""Docstrings of installed libraries as training and evaluation data: summary -> body, and text -> part of the library.

Real technical English that is on every machine, needs no network and comes under its library's licence. Sources are
read with `ast`, never imported. Whole modules are held out, and training rows that repeat held-out text are removed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from embedwright.data.clean.repeats import Counts, drop_duplicates, leaks, repeats
from embedwright.data.keys import near_key
from embedwright.data.schema import Example, Passage, Task, to_row
from embedwright.errors import InputError, OutputExistsError

logger = logging.getLogger(__name__)

LIBRARIES = ("numpy", "scipy", "pandas", "sklearn", "torch", "networkx", "transformers")

SUMMARY_WORDS = range(4, 41)
BODY_WORDS_MIN = 15

# Folders and files that hold no documentation of the library itself.
_TESTS = {"test", "tests", "testing", "_testing", "conftest", "setup"}
_VENDORED = {"vendor", "_vendor", "vendored", "extern", "external", "externals", "third_party"}


@dataclass(frozen=True, slots=True)
class Docstring:
    """A public function, class or method: the first sentence of its docstring, and the rest, as running text."""

    package: str
    module: str
    qualname: str
    summary: str
    body: str

    @property
    def id(self) -> str:
        return f"{self.module}:{self.qualname}"


def harvest(packages: Sequence[str]) -> Iterator[Docstring]:
    """The docstrings of `packages` (top-level names), in order of package, file and line.

    Only those whose summary has 4 to 40 words and whose body has 15 or more and does not repeat the summary.
    Raises ModuleNotFoundError for a package that is not installed, ValueError for a name that is no package folder.
    """
    for package in packages:
        root = _folder(package)
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not _skipped(parts):
                yield from _read(path, package, ".".join([package, *parts]).removesuffix(".__init__"))


def _folder(package: str) -> Path:
    if "." in package:  # find_spec would import the parent
        raise InputError(f"{package!r}: give the top-level package")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"package {package!r} is not installed", name=package)
    if not spec.submodule_search_locations:
        raise InputError(f"{package!r} is a single module, not a package")
    return Path(next(iter(spec.submodule_search_locations)))


def _skipped(parts: tuple[str, ...]) -> bool:
    """Tests, vendored code, and private top-level folders.

    Private files and deeper private folders stay: scipy and scikit-learn define their public functions in them, and
    numpy in `_core`.
    """
    private = len(parts) > 1 and parts[0].startswith("_") and parts[0] != "_core"
    return private or not (_TESTS | _VENDORED).isdisjoint(parts)


def _read(path: Path, package: str, module: str) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:  # a template, or source of a newer Python
        logger.warning("%s: not read: %s", path, error)
        return
    seen: set[str] = set()  # a name defined in both branches of an `if` counts once
    for qualname, raw in _documented(tree.body):
        if qualname not in seen and (split := split_docstring(raw)):
            seen.add(qualname)
            yield Docstring(package, module, qualname, *split)


def _documented(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of the public definitions in `body`, those behind `if` and `try` included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            if docstring := ast.get_docstring(node):
                yield prefix + node.name, docstring
            if isinstance(node, ast.ClassDef):
                yield from _documented(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _documented([*node.body, *node.orelse], prefix)
            for handler in getattr(node, "handlers", []):
                yield from _documented(handler.body, prefix)


_SECTION = r"(?:Args|Arguments|Parameters?|Params|Returns?|Yields?|Raises|Attributes|Examples?|Notes?|Inputs?|Shape)"
_DIRECTIVE = r"(?:version\w+|deprecated|legacy|plot|image|figure|math|index|autosummary|currentmodule|code\S*)"

_SIGNATURE = re.compile(r"\A[\w.]+\([^\n]*\)[^\n]*\n+")  # torch: `conv1d(input, weight) -> Tensor` in front
_ARGUMENT = re.compile(r"[*\w]+ \([^:]*\):")  # transformers: nothing but a list of arguments
# The summary ends with its sentence (not after `e.g.`), with its paragraph, or where the first section starts.
_SUMMARY_END = re.compile(
    r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.)(?<! al\.)\s+(?=[A-Z])|\n[ \t]*\n|\n(?=[ \t]*:\w)"
    rf"|\n(?=[ \t]*{_SECTION}[ \t]*:{{0,2}}[ \t]*\n)"
)
_REMOVED = [
    # Fenced code; doctests with their output.
    re.compile(r"^[ \t]*```.*?(?:^[ \t]*```[ \t]*$|\Z)", re.M | re.S),
    re.compile(r"^[ \t]*>>>.*?(?=^[ \t]*$|\Z)", re.M | re.S),
    # Directives that are no prose and citations, with all that is indented below; of other directives, the marker.
    re.compile(rf"^([ \t]*)\.\. {_DIRECTIVE}::.*(?:\n\1[ \t]+\S.*|\n[ \t]*(?=\n))*", re.M),
    re.compile(r"^([ \t]*)\.\. \[[^\]]*\].*(?:\n\1[ \t]+\S.*)*", re.M),
    re.compile(r"\.\. [\w-]+::"),
    # Sections of code, and See Also: it says what *other* objects do, so that a body would answer their summaries.
    re.compile(r"^(?:See Also|References|Examples?)\s*\n[-=~]{3,}\s*\n.*?(?=^\S[^\n]*\n[-=~]{3,}|\Z)", re.M | re.S),
    # What is left of headings, then inline noise: tips, footnote marks, scipy's docstring templates, addresses.
    re.compile(r"^[ \t]*([-=~^*#])\1{2,}[ \t]*$", re.M),
    re.compile(r"^[ \t]*Examples?[ \t]*:{0,2}[ \t]*$", re.M),
    re.compile(r"</?Tip[^>]*>"),
    re.compile(r"\[\w+\]_"),
    re.compile(r"%\(\w+\)s"),
    re.compile(r"https?://[^\s>)]+"),
]
_ROLE = re.compile(r":[\w:+-]+:(?=`)")
_TARGET = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*")  # `text <target>`
_SHORTENED = re.compile(r"`[~!](?:[^`]*\.)?([^`.]+)`")  # `~a.b.C`
_LINK = re.compile(r"\[([^\[\]]+)\]\([^)]*\)")


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Summary and body of a dedented docstring as plain running text, or None where it does not make a good pair."""
    text = _SIGNATURE.sub("", docstring.strip())
    for pattern in _REMOVED:
        text = pattern.sub("", text)
    summary, body = map(_plain, [*_SUMMARY_END.split(text.strip(), maxsplit=1), ""][:2])
    if not (summary + body).isprintable():  # `\b` or a lone surrogate in a docstring that should have been raw
        return None
    if len(summary.split()) not in SUMMARY_WORDS or _ARGUMENT.match(summary):
        return None
    if sum(any(map(str.isalpha, word)) for word in body.split()) < BODY_WORDS_MIN:
        return None
    if near_key(summary) in near_key(body):  # the pair would be answered by matching strings
        return None
    return summary, body


def _plain(text: str) -> str:
    """Text without roles, links and backticks, on one line."""
    text = _ROLE.sub("", text)
    for pattern in (_TARGET, _SHORTENED, _LINK):
        text = pattern.sub(r"\1", text)
    return " ".join(text.replace("`", "").split())


@dataclass(frozen=True, slots=True)
class Report:
    """What `build` read, left out and wrote, in rows. The same as `report.json`."""

    harvested: dict[str, int]  # by package
    exact_duplicates: int  # bodies that repeat an earlier one on their side of the split
    near_duplicates: int
    exact_leaks: int  # training rows whose body or summary repeats a held-out one
    near_leaks: int
    shared_summaries: int  # kept as documents, but no query: their summary fits other objects too
    written: dict[str, int]  # by file
    topics: dict[str, int]  # training texts by label, before the cap


def build(
    out: Path,
    *,
    packages: Sequence[str] = LIBRARIES,
    heldout_share: float = 0.06,
    max_train: int = 2_500,
    max_eval_queries: int = 300,
    max_body_words: int = 60,
    labels_min: int = 20,
    labels_max: int = 120,
    seed: int = 0,
) -> Report:
    """Writes training data and a held-out suite from the docstrings of `packages` into `out`, whole or not at all.

    `train/pairs.jsonl` (Example rows, summary -> body), `train/topics.jsonl` (text, label), `corpus.jsonl` (the
    training bodies, to mine in), `heldout/` (`suite.yaml`: retrieval, clustering, classification), `report.json`.
    A topic counts if it has `labels_min` training texts and its share of that held out; at most `labels_max` texts of
    it are trained on, `labels_min` evaluated. Same installed libraries and arguments, same bytes.

    Raises FileExistsError where `out` is not empty, ValueError for a share outside (0, 1), a name that is no package
    folder, or where too little is left to evaluate, ModuleNotFoundError for a package that is not installed.
    """
    if not 0 < heldout_share < 1:
        raise InputError(f"heldout_share is {heldout_share}, not between 0 and 1")
    if out.exists() and any(out.iterdir()):
        raise OutputExistsError(f"{out} is not empty")

    docs = [replace(doc, body=" ".join(doc.body.split()[:max_body_words])) for doc in harvest(packages)]
    # By module: the docstrings of a file share their wording, so no file may give to both sides.
    sides = [[doc for doc in docs if (_draw(seed, doc.module) < heldout_share) is held] for held in (False, True)]
    (train, train_repeats), (heldout, heldout_repeats) = map(_deduplicated, sides)
    train, leaked = _without_leaks(train, heldout)
    train, heldout = _shuffled(train, seed), _shuffled(heldout, seed)

    pairs, queries = _answerable(train), _answerable(heldout)
    shared = len(train) - len(pairs) + len(heldout) - len(queries)
    pairs, queries = pairs[:max_train], queries[:max_eval_queries]

    train_topics, heldout_topics = (_topics(side, packages, max_body_words) for side in (train, heldout))
    sizes = {
        label: len(texts)
        for label, texts in sorted(train_topics.items())
        if len(texts) >= labels_min and len(heldout_topics.get(label, ())) >= labels_min * heldout_share
    }
    if not queries or len(sizes) < 2:
        raise InputError(f"{len(queries)} queries, {len(sizes)} topics to evaluate: add packages or lower labels_min")

    test = _labelled(heldout_topics, sizes, labels_min)
    rows = {
        "train/pairs.jsonl": [_example(doc) for doc in pairs],
        "train/topics.jsonl": _labelled(train_topics, sizes, labels_max),
        "corpus.jsonl": [{"_id": doc.id, "text": doc.body} for doc in train],
        "heldout/retrieval/corpus.jsonl": [{"_id": doc.id, "text": doc.body} for doc in heldout],
        "heldout/retrieval/queries.jsonl": [{"_id": doc.id, "text": doc.summary} for doc in queries],
        "heldout/topics.jsonl": test,
        "heldout/topics-train.jsonl": _labelled(train_topics, sizes, labels_min),
        "heldout/topics-test.jsonl": test,
    }
    report = Report(
        harvested={package: sum(doc.package == package for doc in docs) for package in packages},
        exact_duplicates=train_repeats.exact + heldout_repeats.exact,
        near_duplicates=train_repeats.near + heldout_repeats.near,
        exact_leaks=leaked.exact,
        near_leaks=leaked.near,
        shared_summaries=shared,
        written={name: len(kept) for name, kept in rows.items()},
        topics=sizes,
    )
    files = {name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept) for name, kept in rows.items()}
    files["heldout/retrieval/qrels/test.tsv"] = _qrels(queries)
    files["train/pairs.jsonl.tasks.jsonl"] = json.dumps(_TASK.model_dump(exclude_defaults=True)) + "\n"
    files["heldout/suite.yaml"] = _SUITE
    files["report.json"] = json.dumps(asdict(report), indent=2) + "\n"
    _write(out, files)
    logger.info("%s: %s", out, report)
    return report


def _draw(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, whatever else is installed."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()) / 2**64


def _shuffled(docs: Iterable[Docstring], seed: int) -> list[Docstring]:
    return sorted(docs, key=lambda doc: (_draw(seed, doc.id), doc.id))


def _deduplicated(docs: Sequence[Docstring]) -> tuple[list[Docstring], Counts]:
    kept, counts = drop_duplicates([doc.body for doc in docs])
    return [docs[i] for i in kept], counts


def _without_leaks(train: Sequence[Docstring], heldout: Sequence[Docstring]) -> tuple[list[Docstring], Counts]:
    """Training rows of which neither body nor summary repeats a held-out one."""
    exact = near = 0
    for field in (attrgetter("body"), attrgetter("summary")):
        indices, counts = leaks(map(field, train), map(field, heldout))
        leaked = set(indices)
        train = [doc for i, doc in enumerate(train) if i not in leaked]
        exact, near = exact + counts.exact, near + counts.near
    return list(train), Counts(exact, near)


def _answerable(docs: Sequence[Docstring]) -> list[Docstring]:
    """Those whose summary fits one object alone: as a query, any other would have right answers that count as wrong."""
    found = repeats(doc.summary for doc in docs)
    shared = found.keys() | {match.first for match in found.values()}
    return [doc for i, doc in enumerate(docs) if i not in shared]


# Libraries by the names that their docstrings use.
_ALIASES = {"numpy": ["np"], "pandas": ["pd"], "sklearn": ["scikit-learn"], "networkx": ["nx"], "torch": ["pytorch"]}


def _topics(docs: Iterable[Docstring], packages: Sequence[str], max_words: int) -> dict[str, list[str]]:
    """Texts by topic, which is the library and its part (`scipy.stats`; `numpy._core` is `numpy.core`).

    The names of the libraries, and dotted paths below them, are taken out of the texts: half of the label would be
    there to read, and clusters would be found by matching strings. What the text is about stays.
    """
    names = [name for package in packages for name in [package, *_ALIASES.get(package, [])]]
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b(?:\.\w+)*", re.I)
    texts: dict[str, list[str]] = {}
    for doc in docs:
        label = ".".join(part.strip("_") for part in doc.module.split(".")[:2])
        words = named.sub(" ", f"{doc.summary} {doc.body}").split()
        texts.setdefault(label, []).append(" ".join(words[:max_words]))
    return texts


def _labelled(topics: dict[str, list[str]], labels: Iterable[str], limit: int) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for label in labels for text in topics[label][:limit]]


def _example(doc: Docstring) -> dict[str, Any]:
    return to_row(Example(doc.id, "docs", doc.summary, positives=(Passage(doc.body, doc.id),)))


def _qrels(queries: Iterable[Docstring]) -> str:
    return "query-id\tcorpus-id\tscore\n" + "".join(f"{doc.id}\t{doc.id}\t1\n" for doc in queries)


_TASK = Task(
    name="docs",
    instruction="Given the summary of a Python function or class, retrieve the rest of its documentation",
    licence="of each library",
    source="docstrings of installed libraries",
)
_SUITE = """\
# Docstrings of modules that no training row comes from.
name: docstrings
tasks:
  - name: docs
    kind: retrieval
    path: retrieval
    instruction: Given the summary of a Python function or class, retrieve the rest of its documentation
  - name: topics
    kind: clustering
    path: topics.jsonl
    instruction: Identify the part of a Python library that a docstring belongs to
  - name: modules
    kind: classification
    path: topics-test.jsonl
    train: topics-train.jsonl
    instruction: Classify a docstring by the part of the Python library that it belongs to
"""


def _write(out: Path, files: dict[str, str]) -> None:
    """All files beside `out`, then one rename: a folder that is there is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        folder = Path(aside) / out.name
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        folder.replace(out)
