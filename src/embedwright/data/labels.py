"""Turns class labels into contrastive examples (NV-Embed, arXiv 2405.17428, section 3.3).

With several classes or clusters, the positive is another text of the class, and the negatives are texts of other
classes. They are drawn at random, not mined, for coverage. With two classes, the positive is the label's text, and the
negative is the other label's text. If a text has several labels, its positive shares at least one of them, and a
negative shares none. A text of a class carries the class as its id, so that no text of a row's class is its in-batch
negative.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from embedwright.data.answers import class_id
from embedwright.data.keys import exact_key
from embedwright.data.schema import DataError, Example, Passage

Form = Literal["auto", "example", "label"]
Labels = str | Sequence[str]  # one text's
LabelRow = tuple[str, Labels]
Classes = dict[str, list[str]]  # label -> its texts, each once, in the order of the rows

_WORDLESS = re.compile(r"[-+]?\d+([.,]\d+)?|true|false", re.IGNORECASE)
TRIES = 50  # draws for one negative, before the texts that are left are listed instead


class LabelRules(NamedTuple):
    """How labels become examples, as `label_triples` says. Without a form it is the set's own, or auto."""

    form: Form | None = None
    negatives: int = 7
    known: Collection[str] | None = None


USUAL = LabelRules()


def label_triples(
    rows: Sequence[LabelRow],
    *,
    task: str,
    negatives: int = 7,
    seed: int = 0,
    form: Form = "auto",
    ids: Sequence[str] | None = None,
    known: Collection[str] | None = None,
    words: Mapping[str, str] | None = None,
    on_form: Callable[[Literal["example", "label"]], None] = lambda form: None,
) -> tuple[list[Example], dict[str, int]]:
    """Makes examples from `rows` of (text, its label or labels), and counts the rows that gave none, by reason.

    `form` auto is `label` for exactly two labels and `example` for more; `on_form` is told which form it is. What row i
    draws depends on the rows, `seed` and i alone. `ids` (default `task:i`) name the rows. `known` closes the list of
    labels. `words` says what stands for a label in the label form (default: the label). The report counts `unseen`
    (with `known`): rows with a label that is not known, of no use on either side; `conflicting`: rows whose text has
    other labels in another row, of no use on either side; `singleton` (example form): rows whose text is the only one
    of its classes, which still serves as a negative; `fewer_negatives`: examples with fewer than `negatives` where
    there are no more texts, or (label form) without any. Raises DataError if fewer than two labels are left, where a
    row has none, and where `words` lacks a label or says the same for two; without `words` also where labels that stand
    for themselves are numbers, true or false.
    """
    report = Counter({"unseen": 0} if known is not None else {})
    report.update(conflicting=0, singleton=0, fewer_negatives=0)
    labels_of = [dict.fromkeys([labels] if isinstance(labels, str) else labels) for _, labels in rows]
    if not all(labels_of):
        raise DataError(f"row {labels_of.index({})}: no label")
    unseen = {i for i, own in enumerate(labels_of) if known is not None and not own.keys() <= set(known)}
    first: dict[str, str] = {}  # the look in which a text comes first stands for all of its looks
    same = [first.setdefault(exact_key(text), text) for text, _ in rows]
    label_sets, conflicting = _label_sets(same, labels_of, unseen)
    classes: Classes = {}
    for text, labels in label_sets.items():
        for label in labels:
            classes.setdefault(label, []).append(text)
    if len(classes) < 2:
        raise DataError(f"task {task}: {len(classes)} label without conflicts; examples need at least two")
    if form == "auto":
        form = "label" if len(classes) == 2 else "example"
    on_form(form)
    draw = _Draw(classes, label_sets, negatives)
    spoken = _spoken(task, list(classes), words) if form == "label" else {}
    examples = []
    for i, (text, _) in enumerate(rows):
        own = list(labels_of[i])
        shared = [label for label in own if len(classes.get(label, ())) > 1]
        alone = form == "example" and not shared
        useless = {"unseen": i in unseen, "conflicting": same[i] in conflicting, "singleton": alone}
        if any(useless.values()):
            report[max(useless, key=lambda reason: useless[reason])] += 1  # the first of several
            continue
        rng = random.Random(f"{seed}:{i}")  # a str is hashed with SHA-512, not with Python's salted hash
        if form == "example":
            right = [draw.passage(draw.other(shared, same[i], rng), own)]
            wrong = [draw.passage(other) for other in draw.of_other_classes(own, rng)]
            report["fewer_negatives"] += len(wrong) < negatives
        else:
            right = [Passage(spoken[label]) for label in own]
            others = [label for label in classes if label not in own]
            wrong = [Passage(spoken[label]) for label in rng.sample(others, min(negatives, len(others)))]
            report["fewer_negatives"] += not others
        row_id = f"{task}:{i}" if ids is None else ids[i]
        examples.append(Example(row_id, task, text, tuple(right), tuple(wrong)))
    return examples, dict(report)


def _label_sets(
    texts: Sequence[str], labels_of: Sequence[dict[str, None]], unseen: Collection[int]
) -> tuple[dict[str, dict[str, None]], set[str]]:
    """Returns the labels of each text, and apart from these the texts that have other labels in another row."""
    sets: dict[str, dict[str, None]] = {}
    conflicting = set()
    for i, text in enumerate(texts):
        if i not in unseen and sets.setdefault(text, labels_of[i]).keys() != labels_of[i].keys():
            conflicting.add(text)
    return {text: own for text, own in sets.items() if text not in conflicting}, conflicting


def _spoken(task: str, labels: Sequence[str], words: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the words for each label. If two labels had the same words, a positive would become a negative."""
    if words is None:
        if wordless := [label for label in labels if _WORDLESS.fullmatch(label)]:
            raise DataError(
                f"task {task}: rows would train towards the labels {', '.join(labels[:5])} as texts; {wordless[0]!r} "
                "says nothing: name the classes (`data labels --words FILE`; `words` or `label_text` of a set's YAML), "
                "or choose the form `example`"
            )
        words = {label: label for label in labels}
    if missing := [label for label in labels if label not in words]:
        raise DataError(f"task {task}: no words for label {missing[0]!r}; there are words for {', '.join(words)}")
    spoken = {label: words[label] for label in labels}
    keys = {label: exact_key(text) for label, text in spoken.items()}
    twice = [key for key, count in Counter(keys.values()).items() if count > 1]
    if twice:
        same = [label for label in labels if keys[label] == twice[0]]
        raise DataError(f"task {task}: {spoken[same[0]]!r} stands for {same}")
    return spoken


class _Draw:
    """Draws texts from the classes. It holds what does not depend on the row."""

    def __init__(self, classes: Classes, label_sets: Mapping[str, dict[str, None]], negatives: int) -> None:
        self.classes, self.label_sets, self.negatives = classes, label_sets, negatives
        self.labels = list(classes)
        self.rank = {label: i for i, label in enumerate(self.labels)}
        self.single = all(len(labels) == 1 for labels in label_sets.values())

    def passage(self, text: str, beside: Sequence[str] = ()) -> Passage:
        """Returns the text as a passage whose id holds its labels, after the labels in `beside`."""
        return Passage(text, class_id(dict.fromkeys([*beside, *self.label_sets[text]])))

    def other(self, labels: Sequence[str], text: str, rng: random.Random) -> str:
        """Draws a text other than `text` of one of its `labels`, each of which has at least two texts."""
        texts = self.classes[labels[0] if len(labels) == 1 else rng.choice(labels)]
        while (other := rng.choice(texts)) == text:
            pass
        return other

    def of_other_classes(self, own: Sequence[str], rng: random.Random) -> list[str]:
        """Draws `negatives` different texts without a label of `own`, or all there are.

        It draws a class uniformly each time, then one of its texts.
        """
        ranks = sorted(self.rank[label] for label in own)
        taken = sum(len(self.classes[label]) for label in own)
        surely = max(0, len(self.label_sets) - taken)  # at least this many; exact if every text has one label
        count = min(self.negatives, surely)
        drawn: dict[str, None] = {}
        for _ in range(TRIES * count if len(ranks) < len(self.labels) else 0):
            if len(drawn) == count:
                break
            j = rng.randrange(len(self.labels) - len(ranks))
            for rank in ranks:
                j += j >= rank  # over the labels of the row
            text = rng.choice(self.classes[self.labels[j]])
            if self.label_sets[text].keys().isdisjoint(own):
                drawn[text] = None  # one that is drawn again changes nothing
        if len(drawn) < (count if self.single else self.negatives):
            left = [t for t, labels in self.label_sets.items() if t not in drawn and labels.keys().isdisjoint(own)]
            drawn |= dict.fromkeys(rng.sample(left, min(self.negatives - len(drawn), len(left))))
        return list(drawn)
