"""Class labels as contrastive examples (NV-Embed, arXiv 2405.17428, section 3.3).

Several classes, or clusters: the positive is another text of the class, the negatives are texts of other classes; drawn
at random, not mined, for coverage. Two classes: the positive is the label's text, the negative the other label's text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from embedwright.data.example import DataError, Example, Passage

Form = Literal["auto", "example", "label"]
Classes = dict[str, list[str]]  # label -> its texts, each once, in the order of the rows


def label_triples(
    rows: Sequence[tuple[str, str]],
    *,
    task: str,
    negatives: int = 7,
    seed: int = 0,
    form: Form = "auto",
    ids: Sequence[str] | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """Examples from `rows` of (text, label), and how many rows gave none, by reason.

    `form` auto is `label` for exactly two labels and `example` for more. What row i draws depends on the rows, `seed`
    and i alone. `ids` (default `task:i`) name the rows. The report counts
    `conflicting`: rows whose text has several labels, of no use on either side;
    `singleton` (example form): rows whose text is the only one of its class, which still serves as a negative;
    `fewer_negatives` (example form): examples with fewer than `negatives`, where the other classes have no more texts.
    Raises DataError where fewer than two labels are left.
    """
    classes, conflicting = _classes(rows)
    if len(classes) < 2:
        raise DataError(f"task {task}: {len(classes)} label without conflicts; examples need at least two")
    if form == "auto":
        form = "label" if len(classes) == 2 else "example"
    labels = list(classes)
    rank = {label: i for i, label in enumerate(labels)}
    texts = sum(map(len, classes.values()))
    report = Counter(conflicting=0, singleton=0, fewer_negatives=0)
    examples = []
    for i, (text, label) in enumerate(rows):
        if text in conflicting:
            report["conflicting"] += 1
            continue
        if form == "example" and len(classes[label]) == 1:
            report["singleton"] += 1
            continue
        rng = random.Random(f"{seed}:{i}")  # a str is hashed with SHA-512, not with Python's salted hash
        if form == "example":
            positive = _other(classes[label], text, rng)
            count = min(negatives, texts - len(classes[label]))
            wrong = _of_other_classes(classes, labels, rank[label], count, rng)
            report["fewer_negatives"] += count < negatives
        else:
            positive = label
            others = labels[: rank[label]] + labels[rank[label] + 1 :]
            wrong = rng.sample(others, min(negatives, len(others)))
        row_id = f"{task}:{i}" if ids is None else ids[i]
        examples.append(Example(row_id, task, text, (Passage(positive),), tuple(map(Passage, wrong))))
    return examples, dict(report)


def _classes(rows: Sequence[tuple[str, str]]) -> tuple[Classes, set[str]]:
    """The texts of each label, and the texts that stand under several, which are in no class."""
    label_of: dict[str, str] = {}
    conflicting = {text for text, label in rows if label_of.setdefault(text, label) != label}
    classes: Classes = {}
    for text, label in label_of.items():
        if text not in conflicting:
            classes.setdefault(label, []).append(text)
    return classes, conflicting


def _other(texts: Sequence[str], text: str, rng: random.Random) -> str:
    """One of the distinct `texts` that is not `text`; there are at least two."""
    while (other := rng.choice(texts)) == text:
        pass
    return other


def _of_other_classes(classes: Classes, labels: Sequence[str], own: int, count: int, rng: random.Random) -> list[str]:
    """`count` distinct texts: each time a class other than `own` drawn uniformly, then one of its texts."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        other = rng.randrange(len(labels) - 1)
        drawn[rng.choice(classes[labels[other + (other >= own)]])] = None  # one that is drawn again changes nothing
    return list(drawn)
