"""Writes small database files in WordNet's format, wndb(5WN), for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# A synset: its words, its pointers as (symbol, number of the other synset, word of this one, word of the other one).
Entry = tuple[str, Sequence[str], Sequence[tuple[str, int, int, int]]]
LICENCE = "  1 This software and database is being provided to you, the LICENSEE\n"
PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
NUMBERS = {"n": 1, "v": 2, "a": 3, "r": 4}

CHAIN = ["entity", "object", "artifact", "instrumentality", "device", "machine", "vehicle", "boat"]
ENTRIES: list[Entry] = [
    *(("n", [word], [("@", i - 1, 0, 0)] if i else []) for i, word in enumerate(CHAIN)),
    ("n", ["ferry", "ferryboat"], [("@", 7, 0, 0)]),  # 8
    ("n", ["barge"], [("@", 7, 0, 0)]),
    ("n", ["canoe"], [("@", 7, 0, 0)]),
    ("a", ["usual", "customary"], [("!", 12, 1, 1)]),  # 11
    ("a", ["unusual"], [("!", 11, 1, 1)]),
    ("r", ["often", "frequently"], [("!", 14, 1, 1)]),  # 13
    ("r", ["rarely"], [("!", 13, 1, 1)]),
    ("v", ["enable"], [("!", 16, 1, 1)]),
    ("v", ["disable", "incapacitate"], [("!", 15, 1, 1)]),
    ("n", ["bank"], []),  # 17
    ("n", ["bank", "slope"], []),
    ("n", ["river_boat"], []),
]
TEXT = (
    "The ferry is often slow, and its usual captain sleeps. A ferry may enable the people of both towns to meet. "
    "They took an unusual way home past the river boat and the bank. Nobody rarely asks why the ferries came."
)


def write_wordnet(
    folder: Path, entries: Sequence[Entry] = ENTRIES, uses: Mapping[str, Sequence[int]] | None = None
) -> Path:
    """Writes the files of these synsets. `uses`: the tagged uses of the senses of a noun."""
    folder.mkdir(parents=True, exist_ok=True)
    down = [[("~", j, 0, 0) for j, (_, _, links) in enumerate(entries) if ("@", i, 0, 0) in links] for i in range(99)]

    def line(number: int, offsets: Sequence[int]) -> str:
        pos, words, links = entries[number]
        links = [*links, *down[number]]
        said = " ".join(f"{word} 0" for word in words)
        points = "".join(f" {s} {offsets[other]:08d} {entries[other][0]} {a:02x}{b:02x}" for s, other, a, b in links)
        gloss = " ".join(word for _, words, _ in entries for word in words)  # so that all words are common
        return f"{offsets[number]:08d} 06 {pos} {len(words):02x} {said} {len(links):03d}{points} | {gloss}  \n"

    offsets = [0] * len(entries)
    ends = {pos: len(LICENCE) for pos in PARTS}
    for number, (pos, _, _) in enumerate(entries):
        offsets[number] = ends[pos]
        ends[pos] += len(line(number, offsets))
    for pos, part in PARTS.items():
        own = [number for number in range(len(entries)) if entries[number][0] == pos]
        (folder / f"data.{part}").write_text(LICENCE + "".join(line(number, offsets) for number in own))
        senses: dict[str, list[int]] = {}
        for number in own:
            for word in entries[number][1]:
                senses.setdefault(word, []).append(offsets[number])
        rows = [
            f"{word} {pos} {len(at)} 1 @ {len(at)} 0 {' '.join(f'{each:08d}' for each in at)}  \n"
            for word, at in sorted(senses.items())
        ]
        (folder / f"index.{part}").write_text(LICENCE + "".join(rows))
        (folder / f"{part}.exc").write_text("took take\n" if pos == "v" else "")
    counts = [f"{word}%1:06:00:: {n} {count}\n" for word, of in (uses or {}).items() for n, count in enumerate(of, 1)]
    (folder / "cntlist.rev").write_text("".join(counts))
    return folder
