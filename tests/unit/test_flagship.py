"""The flagship: its recipes are valid, and the scripts for its data read what Debian's packages hold."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from embedwright import Embedder
from embedwright.data.schema import Task
from embedwright.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "flagship"
RECIPES = sorted((ROOT / "recipes").glob("flagship-*.yaml"))

# Cuts of real packages, as they are.
SCRAM = """Package: scram
Version: 0.16.2-4
Source: scram-pra (0.16.2-4)
Description-en: Probabilistic Risk Analysis Tool
 A command line probabilistic risk analysis tool capable of performing event
 tree analysis, static fault tree analysis, and importance analysis:
  * analysis with common cause failure models
  * uncertainty analysis
 .
 This package contains the program.
Tag: field::statistics, implemented-in::c++,
 use::analysing
Section: science"""
GCIDE = r"""Dichogamy \Di*chog"a*my\, n. [Gr. ? in two, asunder + ?
   marriage.] (Bot.)
   The condition of certain species of plants, in which the
   stamens and pistil do not mature simultaneously, so that
   these plants can never fertilize themselves.
   [1913 Webster]

Dichotomize \Di*chot"o*mize\, v. t. [imp. & p. p.
   {Dichotomized}; p. pr. & vb. n. {Dichotomizing}.] [See
   {Dichotomous}.]
   1. To cut into two parts; to part into two divisions; to
      divide into pairs; to bisect. [R.]
      [1913 Webster]

            The apostolical benediction dichotomizes all good
            things into grace and peace.          --Bp. Hall.
      [1913 Webster]

   2. (Astron.) To exhibit as a half disk. See {Dichotomy}, 3.
      "[The moon] was dichotomized." --Whewell.
      [1913 Webster]
"""
JARGON = """benchmark
 n.

    [techspeak] An inaccurate measure of computer performance. “In the computer
    industry, there are three kinds of lies: lies, damn lies, and benchmarks.”
    Well-known ones include Whetstone, Dhrystone, Rhealstone (see {h}), the
    Gabriel LISP benchmarks, the SPECmark suite, and LINPACK. See also {
    machoflops}, {MIPS}, {smoke and mirrors}.
"""
NOUN = (
    "03553428 06 n 02 instrumentality 0 instrumentation 0 002 @ 00021939 n 0000 ~ 02728440 n 0000 |"
    ' an artifact (or system of artifacts) that is instrumental in accomplishing some end; "the tool"  \n'
)
MALLARD = """<page xmlns="http://projectmallard.org/1.0/" type="topic">
  <info><credit type="author"><name>Phil Bull</name></credit><desc>Double-check the password.</desc></info>
<title>I’ve entered the correct password, but I still can’t connect</title>
<p>If you’re sure that you entered the correct <link xref="net-wireless-wepwpa">wireless password</link> but you still
can’t successfully connect to a wireless network, try some of the following:</p>
<list><item><p>Double-check that you have the correct password</p></item></list>
<screen><output>sudo lshw -C network</output></screen>
</page>"""
HTML = """<html><head><title>A</title><style>p {color: red}</style></head><body><div class="navheader"><p>Up to the
contents of this long guide, where you find all of its chapters.</p></div><h1>2.3. Adding Input Fields</h1><p>An input
field is a variable that you can click in a document to open a dialog where you can edit it.</p><pre>x = 1</pre>
<table><tr><td>A cell of a table that has as many words in it as a passage needs to have.</td></tr></table></body>"""


@pytest.fixture(scope="module")
def readers() -> Iterator[ModuleType]:
    yield _module("readers")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"flagship_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _dictionary(folder: Path, name: str, entries: dict[str, str]) -> Path:
    """Writes entries as dictd has them: offsets and sizes to the base of 64, the text gzipped."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    data, lines = b"", []
    for word, entry in {"00-database-short": "a dictionary\n", **entries}.items():
        lines.append(f"{word}\t{number(len(data))}\t{number(len(entry.encode()))}\n")
        data += entry.encode()
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(data))
    (folder / f"{name}.index").write_text("".join(sorted(lines)))
    return folder / f"{name}.index"


def test_a_description_is_a_document_with_its_section_and_tags(readers: ModuleType) -> None:
    debug = SCRAM.replace("Section: science", "Section: debug").replace("A command", "Another command")
    copy = SCRAM.replace("Package: scram", "Package: libscram")
    [row] = readers.packages([SCRAM, "", debug, copy])
    assert row == {
        "id": "scram",
        "title": "Probabilistic Risk Analysis Tool",
        "text": "A command line probabilistic risk analysis tool capable of performing event tree analysis, static"
        " fault tree analysis, and importance analysis:\n* analysis with common cause failure models\n* uncertainty"
        " analysis\nThis package contains the program.",
        "source": "scram-pra",
        "tags": ["section::science", "field::statistics", "use::analysing"],
    }


def test_a_dictionary_gives_its_meanings_and_their_fields(readers: ModuleType, tmp_path: Path) -> None:
    first, second = GCIDE.split("\n\nDichotomize")
    entries = {"Dichogamy": first, "Dichotomize": f"Dichotomize{second}", "filler": "x" * 5000, "zoo": first}
    rows = list(readers.gcide(_dictionary(tmp_path, "gcide", entries)))
    assert [(row["title"], row["tags"]) for row in rows] == [
        ("dichogamy", ["field::Bot"]),
        ("dichotomize", []),
        ("zoo", ["field::Bot"]),
    ]
    assert rows[0]["text"] == (
        "The condition of certain species of plants, in which the stamens and pistil do not mature simultaneously, so"
        " that these plants can never fertilize themselves."
    )
    assert rows[1]["text"] == "To cut into two parts; to part into two divisions; to divide into pairs; to bisect."


def test_an_entry_of_the_jargon_file_is_without_its_grammar(readers: ModuleType, tmp_path: Path) -> None:
    [row] = readers.terms(_dictionary(tmp_path, "jargon", {"benchmark": JARGON}))
    assert str(row["text"]).startswith("An inaccurate measure of computer performance. “In")
    assert str(row["text"]).endswith("See also machoflops, MIPS, smoke and mirrors.") and row["title"] == "benchmark"


def test_a_gloss_of_wordnet_stands_under_its_words(readers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text("  1 This software and database is provided by Princeton\n" + NOUN)
    [row] = readers.wordnet(tmp_path / "data.noun")
    assert row["title"] == "instrumentality, instrumentation" and row["tags"] == ["lexname::artifact"]
    assert row["text"] == (
        'an artifact (or system of artifacts) that is instrumental in accomplishing some end; "the tool"'
    )


@pytest.mark.parametrize(
    ("page", "title", "begins", "ends"),
    [
        (MALLARD, "I’ve entered the correct password, but I still can’t connect", "If you’re sure", "the following:"),
        (HTML, "Adding Input Fields", "An input field is", "you can edit it."),
    ],
)
def test_of_a_page_its_prose_stays_under_its_heading(
    readers: ModuleType, tmp_path: Path, page: str, title: str, begins: str, ends: str
) -> None:
    (tmp_path / "page.html").write_text(page)
    [row] = readers.page(tmp_path / "page.html")
    assert row["title"] == title
    assert row["text"].startswith(begins) and row["text"].endswith(ends)


def test_a_long_section_is_cut_between_sentences(readers: ModuleType, tmp_path: Path) -> None:
    sentences = [f"This is sentence number {i} of a paragraph that is far too long to stay whole." for i in range(40)]
    (tmp_path / "page.html").write_text(f"<h1>A long one</h1><p>{' '.join(sentences)}</p>")
    texts = [str(row["text"]) for row in readers.page(tmp_path / "page.html")]
    assert len(texts) > 3 and " ".join(texts) == " ".join(sentences)
    assert all(len(text.split()) <= readers.PASSAGE[1] for text in texts)


def test_without_apt_the_script_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "texts.py"), str(tmp_path)],
        env={"PATH": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "apt-get is missing" in done.stderr and "copy" in done.stderr


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipe_is_valid_and_its_data_is_made_by_the_script(file: Path) -> None:
    recipe = Recipe.load(file)
    script = (FOLDER / "data.sh").read_text()
    names = {"debian", "manuals", "prose", "terms", "wordnet", "gcide", "news"}
    for stage in recipe.stages:
        for entry in stage.data:
            path = Path(entry.path)
            assert path.parent.parent == Path("runs/flagship-data")
            assert path.stem.split("-")[0] in names or path.stem in script
        described = [entry.task for entry in stage.data if isinstance(entry.task, Task)]
        assert all(task.instruction and task.licence for task in described)
        # texts of one class are not each other's negatives
        labels = [task for task in described if task.family in ("classification", "clustering")]
        assert all(task.in_batch_negatives == "none" for task in labels)


def test_the_distilled_recipe_trains_on_the_delivered_adapters() -> None:
    recipe = Recipe.load(ROOT / "recipes" / "flagship-135m-distilled.yaml")
    adapter = json.loads((ROOT / str(recipe.model.from_) / "adapter_config.json").read_text())
    assert recipe.tune.adapters == "continue"
    assert (recipe.tune.rank, recipe.tune.alpha) == (adapter["r"], adapter["lora_alpha"])
    assert [stage.loss.teachers for stage in recipe.stages] == [("minilm",)]


@pytest.mark.long
@pytest.mark.skipif("EMBEDWRIGHT_DATA" not in os.environ, reason="real data")
def test_the_script_makes_all_that_the_recipe_reads_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole script on few documents: FOLDOC and WordNet's glosses stand in for all texts.

    Of Debian's packages, only WordNet itself is fetched.
    """
    data, out = Path(os.environ["EMBEDWRIGHT_DATA"]), tmp_path / "runs" / "flagship-data"
    (out / "text").mkdir(parents=True)
    for name in ("debian", "manuals", "prose", "terms", "wordnet", "gcide"):
        source = "foldoc" if name in ("manuals", "prose", "terms", "debian") else "wordnet-glosses"
        with gzip.open(data / "train" / f"{source}.pairs.jsonl.gz", "rt") as file:
            pairs = [json.loads(line) for _, line in zip(range(400), file, strict=False)]
        rows = [
            {"id": str(i), "title": one["query"], "text": one["positive"], "tags": [f"tag::{i % 3}"]}
            for i, one in enumerate(pairs)
        ]
        (out / "text" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (out / "text" / f"{name}.licence").write_text("GFDL-1.1+\n")
    monkeypatch.syspath_prepend(str(FOLDER))
    apt = _module("texts").Apt(out / "text" / "apt")
    apt.run("apt-get", "update", "-qq")
    assert apt.unpacked("wordnet-base", ["wordnet-base"])
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "embedwright"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m embedwright "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "DOCS": "300", "ASKED": "400", "PATH": f"{command.parent}:{os.environ['PATH']}"}

    def run() -> str:
        done = subprocess.run(
            ["bash", str(FOLDER / "data.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "mine debian" in run()
    made = {file: file.stat().st_mtime_ns for stage in "12" for file in (out / stage).iterdir()}
    for stage in Recipe.load(ROOT / "recipes" / "flagship-135m.yaml").stages:
        for entry in stage.data:
            assert [json.loads(line) for line in (tmp_path / entry.path).read_text().splitlines()], entry.path
    assert {line.split()[1] for line in run().splitlines()} == {"texts", "done:"}
    assert {file: file.stat().st_mtime_ns for file in made} == made


@pytest.mark.parametrize("name", ["flagship", "flagship-distilled"])
def test_the_delivered_flagship_loads_with_its_base_and_searches(smollm2_folder: Path, name: str) -> None:
    folder = ROOT / "results" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40e6
    model = Embedder.load(folder)  # held to its record of vectors when it is loaded
    assert (model.embedding_dim, model.max_tokens) == (576, 256)
    texts = [
        "Yeast eats sugar and gives off carbon dioxide, which makes dough rise.",
        "The gravity of the moon pulls the oceans, which makes the tides.",
        "A stack returns first what was put on it last.",
    ]
    asked = [
        "why does the sea go up and down?",
        "what makes bread grow in the oven?",
        "data structure, last in first out",
    ]
    scores = model.encode(asked, task="Given a question, retrieve passages that answer it") @ model.encode(texts).T
    assert scores.argmax(axis=1).tolist() == [1, 0, 2]
