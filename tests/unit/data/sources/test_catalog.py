from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedwright.config import ConfigError
from embedwright.data.sources.catalog import (
    HEADER,
    LabelledRows,
    ScoredRows,
    find_entry,
    find_task,
    load_catalog,
    markdown,
    plain,
    table_rows,
)

PAGE = Path(__file__).parents[4] / "docs" / "data.md"
OWN: dict[str, Any] = {
    "name": "mine",
    "hub": "someone/mine",
    "rows": {"kind": "pairs", "query": "q", "positive": "a"},
    "family": "retrieval",
    "instructions": ["Find it"],
    "target": {"v2": "passage"},
    "marks": dict.fromkeys(("columns", "source", "instructions", "samples", "target"), "guess"),
}


def write(tmp_path: Path, entry: dict[str, Any]) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entry))
    return str(path)


def test_every_set_of_both_versions_is_there() -> None:
    """The numbers of sets of each family: NV-Embed v2, section 3; v1's 11, 8 and 4 sources of clustering (7 sets)."""
    sets = load_catalog().values()
    found = Counter(e.family for e in sets)  # MultiNLI stands beside the SNLI that the paper cites
    assert found == {"retrieval": 16 + 1, "classification": 12, "clustering": 11, "sts": 3}
    assert all("v2" in entry.target for entry in sets)
    first = Counter(entry.family for entry in sets if "v1" in entry.target)
    assert first == {"retrieval": 11 + 1, "classification": 8, "clustering": 7, "sts": 3}


def test_what_the_paper_says_of_targets() -> None:
    sets = load_catalog()
    by_target = {
        target: {name for name, entry in sets.items() if entry.target["v2"] == target}
        for target in ("example", "label")
    }
    clustering = {name for name, entry in sets.items() if entry.family == "clustering"}
    five = {"emotion", "massive_intent", "massive_scenario", "mtop_domain", "mtop_intent"}
    assert by_target["example"] == clustering | five  # 16 sets: section 3.3 and Table 5
    assert by_target["label"] == {name for name, e in sets.items() if e.family == "classification"} - five
    for name in ("amazon_counterfactual", "amazon_polarity", "imdb", "toxic_conversations"):
        rows = sets[name].rows
        assert isinstance(rows, LabelledRows) and rows.words and list(rows.words) == ["0", "1"]
    assert all(entry.target["v1"] == "label" for entry in sets.values() if entry.form and "v1" in entry.target)


def test_every_set_says_what_it_needs_and_marks_what_is_not_sure() -> None:
    for name, entry in load_catalog().items():
        assert re.fullmatch("[a-z0-9_]+", name)  # a dot would be the number of a wording
        assert all(wording and not wording.endswith(".") for wording in entry.instructions)
        assert bool(entry.hub) != bool(entry.url)
        assert entry.hub is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)
        split = name in ("nli", "multi_nli", "massive_intent", "massive_scenario")
        assert entry.samples and entry.marks.samples == ("derived" if split else "recalled")  # no table could be read
        assert entry.marks.instructions in ("recalled", "sister")
        assert entry.family == "sts" or not entry.symmetric
        assert (entry.marks.target != "derived") or entry.note
    several = {name for name, entry in load_catalog().items() if len(entry.instructions) > 1}
    assert several == {
        "msmarco",
        "paq",
        "nli",
        "multi_nli",
    }  # a comma that YAML takes for the end of a wording would add to them
    scored = {name: e.rows for name, e in load_catalog().items() if isinstance(e.rows, ScoredRows)}
    assert {name: (rows.scale, rows.threshold) for name, rows in scored.items()} == {
        "sts12": ((0, 5), 4),
        "sts22": ((1, 4), 4),
        "stsb": ((0, 5), 4),
    }


@pytest.mark.long
def test_revisions_and_licences_are_those_of_mteb() -> None:
    mteb = pytest.importorskip("mteb")
    pinned = {e.hub: e for e in load_catalog().values() if e.revision}
    seen = {}
    for task in mteb.get_tasks(languages=["eng"], exclude_superseded=False):
        where = task.metadata.dataset
        if where["path"] in pinned:
            seen.setdefault(where["path"], set()).add((where["revision"], task.metadata.license))
    assert seen.keys() == pinned.keys()
    for hub, entry in pinned.items():
        revisions, licences = zip(*seen[hub], strict=True)
        assert entry.revision in revisions, hub
        assert entry.licence == "unknown" or entry.licence in licences, hub


def test_the_set_of_the_page_is_a_set(tmp_path: Path) -> None:
    path = tmp_path / "my_set.yaml"
    path.write_text(PAGE.read_text().split("```yaml\n")[1].split("```")[0])
    entry = find_entry(str(path))
    assert (entry.name, entry.instructions) == ("my_set", ("Given a question, retrieve answers",))


def test_the_tables_hold_every_set() -> None:
    sets = list(load_catalog().values())
    for text in (plain(sets), markdown(sets)):
        lines = text.splitlines()
        assert all(any(re.match(rf"\W*{entry.name}\b", line) for line in lines) for entry in sets)
    (row,) = table_rows([load_catalog()["emotion"]])
    assert dict(zip(HEADER, row, strict=True)) == {
        "name": "emotion",
        "family": "classification",
        "in": "v1, v2",
        "target": "label, example",
        "rows": "labelled",
        "source": "mteb/emotion",
        "pinned": "4f58c6b",
        "samples": "16,000 (recalled)",
        "licence": "unknown",
        "columns": "confirmed",
    }
    assert len({line.index("  retrieval") for line in plain(sets).splitlines()[1:17]}) == 1


# ---- tasks


def test_each_wording_is_a_task_and_examples_are_spread_over_them() -> None:
    entry = load_catalog()["nli"]
    one, two = entry.tasks()
    assert (one.name, two.name) == ("nli", "nli.2")
    assert one.instruction.startswith("Given a premise") and two.instruction == "Retrieve semantically similar text"
    assert (one.licence, one.source, one.family) == ("cc-by-sa-4.0", "stanfordnlp/snli", "retrieval")
    drawn = [entry.task_of(f"nli:{i}", 3) for i in range(200)]
    assert drawn == [entry.task_of(f"nli:{i}", 3) for i in range(200)]
    assert drawn != [entry.task_of(f"nli:{i}", 4) for i in range(200)]
    assert 70 < drawn.count("nli.2") < 130  # 100 +- 4 standard deviations
    assert {load_catalog()["emotion"].task_of(str(i), 0) for i in range(9)} == {"emotion"}


def test_a_task_is_found_by_the_name_in_its_rows() -> None:
    found = find_task("paq.2")
    assert found is not None and found.instruction == load_catalog()["paq"].instructions[1]
    assert find_task("paq.3") is None and find_task("unheard") is None
    unknown = find_task("nfcorpus")
    assert unknown is not None and unknown.licence == ""


def test_texts_of_one_kind_bear_the_instruction_on_both_sides() -> None:
    sets = load_catalog()
    assert [sets[name].tasks()[0].symmetric for name in ("sts12", "arxiv_s2s", "imdb", "msmarco")] == [1, 1, 0, 0]
    assert not sets["arxiv_s2s"].tasks("label")[0].symmetric and sets["imdb"].tasks("example")[0].symmetric


# ---- a set of the user's own


def test_a_set_is_one_yaml_file(tmp_path: Path) -> None:
    entry = find_entry(write(tmp_path, OWN))
    assert entry.name == "mine" and entry.split == "train" and entry.revision is None and entry.licence == "unknown"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instruction": "x"}, "instruction: unknown key; did you mean 'instructions'"),
        ({"rows": {"kind": "pairs", "query": "q", "positve": "a"}}, "did you mean 'positive'"),
        ({"rows": {"kind": "pears", "query": "q", "positive": "a"}}, "rows"),
        ({"revision": "main"}, "revision"),
        ({"target": {"v2": "label"}}, "target 'label' of v2 does not fit rows of kind 'pairs'"),
        ({"target": {"v3": "passage"}}, "v3"),
        ({"rows": {"kind": "labelled", "text": "t", "label": "l"}}, "target 'passage' of v2 does not fit"),
        ({"instructions": []}, "instructions"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path, OWN | change)
    with pytest.raises(ConfigError) as caught:
        find_entry(path)
    assert path in str(caught.value) and said in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no data set 'mscarco'; known: docstrings, msmarco, .*did you mean 'msmarco'"
    ):
        find_entry("mscarco")
    with pytest.raises(FileNotFoundError):
        find_entry(str(tmp_path / "absent.yaml"))
