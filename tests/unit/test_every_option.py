"""Every option and argument of every command acts: another value changes what a tiny run prints, asks or writes.

They are read from the command itself, so that a new one without an entry here fails.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer.core
import typer.main
import yaml
from fake_llm import Body, FakeLLM, Reply
from fastapi import FastAPI
from small_wordnet import ENTRIES, TEXT, write_wordnet
from starlette.testclient import TestClient

from embedwright.cli import main as cli
from embedwright.cli import mining
from embedwright.evaluation.results import Result, Results, write_results
from embedwright.index.build import build_index
from embedwright.llm.client import Server
from embedwright.model.embedder import Embedder
from embedwright.serve import run as serve_run
from embedwright.studies.ablate import jobs as ablate_jobs
from embedwright.synth.plan import PROMPTS

TESTS = Path(__file__).parents[1]
Words = dict[str, str]  # of a command line, by the parameter that they are for


def parameters(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """`data check --against`, by the parameter's own name: `data check.against`."""
    if isinstance(command, typer.core.TyperGroup):
        for name, inner in command.commands.items():
            yield from parameters(inner, (*path, name))
    else:
        yield from (f"{' '.join(path)}.{parameter.name}" for parameter in command.params)


# ---- what changes

OUT = {"out": "--out OUT.jsonl"}
SERVER = {"base_url": "--base-url {server}", "model": "--model m"}
BASE: dict[str, Words] = {
    "train": {"recipe": "{recipe}", "out": "--out OUT", "plan_only": "--plan"},
    "eval": {"models": "{model}", "suite": "{suite}"},
    "compare": {"results": "{results} {other_results}"},
    "report": {"sources": "{results}", "out": "--out OUT.html"},
    "bench": {"model": "{model}", "names": "SciFact", "out": "--out OUT"},  # whose data are not here
    "merge": {"models": "{model} {near}", "out": "OUT"},
    "compress": {"model": "{model}", "out": "OUT", "layers": "--layers 2", "texts": "--texts {documents}"},
    "encode": {"model": "{model}", "source": "{documents}", "out": "OUT"},
    "index": {"model": "{model}", "source": "{documents}", "out": "OUT"},
    "search": {"model": "{model}", "folder": "{index}", "queries": "tides"},
    "serve": {"model": "{model}"},
    "export": {"model": "{nvembed}", "out": "OUT"},
    "doctor": {},
    "ablate": {"file": "{ablation}", "out": "--out OUT"},
    "mine": {"examples": "{examples}", **OUT, "teacher": "--teacher {model}", "negatives": "--negatives 3"},
    "synth": {**OUT, **SERVER, "count": "--count 4", "types": "--types short-short"},
    "data list": {},
    "data build": {"name": "emotion", **OUT, "source": "--source {kinds}"},
    "data check": {"path": "{examples}"},
    "data clean": {"path": "{examples}", **OUT},
    "data export": {"path": "{examples}", "out": "--out OUT.parquet"},
    "data labels": {"path": "{kinds}", **OUT, "negatives": "--negatives 2"},
    "data relabel": {"path": "{examples}", **OUT, **SERVER},
    "data pairs": {"path": "{articles}", "how": "--how title", **OUT},
}
OWN = {
    "recipe": "",
    "data": "--data {own}",
    "base": "--base {decoder}",
    "teacher": "--teacher {model}",
}
NAIVE = {"rule": "--rule naive"}
SAMPLED = {**NAIVE, "sampled": "--sampled"}
HTTP = {**NAIVE, "teacher": "--teacher {server}#m", "task": "--task 'Find it'"}
HELD = {"against": "--against {held}"}
BEIR = {"against": "--against {beir}"}
LICENCES = {"licences": "--licences {licences}"}
LABELS = {"form": "--form label", "words": "--words {words}"}
EXAMPLES = {"form": "--form example"}
CROPS = {"how": "--how crops"}
PAGE = {"index": "--index {index}", "ui": "--ui"}
TWO = {**PAGE, "against": "--against {model}", "against_index": "--against-index {index}"}
SCORED = {"base_url": "", "model": "", "cross_encoder": "--cross-encoder a", "threshold": "--threshold 0.5"}
LIMITS: dict[str, tuple[str, str, Words]] = {
    "concurrency": ("at once", "--concurrency 1", {}),
    "token_budget": ("asked", "--token-budget 1", {}),
    "max_tokens": ("asked", "--max-tokens 77", {}),
    "timeout": ("error", "--timeout 0.000001", {}),
    "api_key_env": ("asked", "--api-key-env SOME_KEY", {}),
}


def shown(where: str, both: Words | None = None) -> dict[str, tuple[str, str, Words]]:
    """Of a command that encodes. With another number type, or with shorter texts, it is another model."""
    words = {"dtype": "--dtype bfloat16", "max_tokens": "--max-tokens 5"}
    changes = {name: (where, word, both or {}) for name, word in words.items()}
    return {"device": ("error", "--device nowhere", both or {}), **changes}


# command -> parameter -> (where it must show, its other words, what else both runs have)
CHANGES: dict[str, dict[str, tuple[str, str, Words]]] = {
    "train": {
        "recipe": ("said", "{other_recipe}", {}),
        "data": ("said", "--data {more}", OWN),
        "base": ("said", "--base {other_decoder}", OWN),
        "out": ("names", "--out elsewhere", OWN),
        "layers": ("said", "--layers 2", OWN),
        "instruction": ("files", "--instruction 'Find another'", OWN),
        "teacher": ("files", "--teacher {other}", OWN),
        "plan_only": ("names", "", {}),
        "processes": ("said", "--processes 2", {}),
        "dry": ("names", "--dry-run", {"plan_only": ""}),
    },
    "eval": {
        "models": ("said", "{other}", {}),
        "suite": ("said", "{other_suite}", {}),
        "out": ("names", "--out OUT.json", {}),
        **shown("said"),
    },
    "compare": {
        "results": ("said", "{other_results} {results}", {}),
        "suite": ("said", "--suite {other_suite}", {"results": "{model} {other}", "suite": "--suite {suite}"}),
        "equivalent": ("said", "--equivalent 0.5", {}),
        **shown("said", {"results": "{model} {other}", "suite": "--suite {suite}"}),
        "picture": ("names", "--picture OUT.svg", {}),
        "out": ("names", "--out OUT.json", {}),
    },
    "report": {
        "sources": ("files", "{other_results}", {}),
        "out": ("names", "--out elsewhere.html", {}),
    },
    "bench": {
        "model": ("error", "{near}", {}),
        "names": ("error", "NFCorpus", {}),
        "out": ("error", "--out elsewhere", {}),
        "api_key_env": ("error", "--api-key-env UNSET_KEY", {"model": "{server}#m"}),
        **shown("error"),
    },
    "merge": {
        "models": ("files", "{model} {model}", {}),
        "out": ("names", "elsewhere", {}),
        "how": ("files", "--how slerp", {}),
        "weights": ("files", "--weights 3,1", {}),
        "suite": ("said", "--suite {suite}", {}),
    },
    "compress": {
        "model": ("files", "{other}", {}),
        "out": ("names", "elsewhere", {}),
        "layers": ("files", "--layers 1", {}),
        "by": ("files", "--by influence", {}),
        "width": ("files", "--width 0.7", {}),
        "width_by": ("files", "--width-by magnitude", {"width": "--width 0.7"}),
        "heal": ("files", "--heal {recipe}", {}),
        "weights": ("files", "--weights int8", {}),
        "texts": ("files", "--texts {other_documents}", {}),
        "student": ("files", "--student 2", {"layers": "", "texts": "", "distil": "--distil {follows}"}),
        "distil": ("files", "--distil {follows}", {}),
        "aligned": ("files", "--aligned", {"distil": "--distil {follows}"}),
        "dim": ("error", "--dim 8", {}),  # which only a static student has
        "report": ("names", "--report {suite}", {}),
    },
    "encode": {
        "model": ("files", "{other}", {}),
        "source": ("files", "{other_documents}", {}),
        "out": ("names", "elsewhere", {}),
        "task": ("files", "--task 'Find it'", {}),
        "precision": ("files", "--precision float16", {}),
        "shard": ("names", "--shard 0/2", {}),
        **shown("files"),
    },
    "index": {
        "model": ("files", "{other}", {}),
        "source": ("files", "{other_documents}", {}),
        "out": ("names", "elsewhere", {}),
        "chunk_tokens": ("files", "--chunk-tokens 4", {}),
        "overlap": ("files", "--overlap 2", {"chunk_tokens": "--chunk-tokens 4"}),
        "metadata": ("files", "--metadata part", {}),
        "precision": ("files", "--precision float16", {}),
        "faiss": ("names", "--faiss", {}),
        "lancedb": ("names" if find_spec("lancedb") else "error", "--lancedb", {}),
        "task": ("error", "--task 'Find it'", {}),  # which wants a table; what it does: test_lancedb.py
        "dim": ("files", "--dim 8", {}),
        "append": ("error", "--append", {}),
        "replace": ("error", "--replace", {}),
        "delete": ("error", "--delete nothing", {}),
        "compact": ("error", "--compact", {}),
        "reencode": ("error", "--reencode", {}),
        **shown("files"),
    },
    "search": {
        "model": ("error", "{other}", {}),
        "folder": ("said", "{other_index}", {}),
        "queries": ("said", "'the moon' tides", {}),
        "k": ("said", "--k 2", {}),
        "task": ("said", "--task 'Find it'", {}),
        "where": ("said", "--where part=odd", {}),
        "each_chunk": ("said", "--chunks", {}),
        "as_json": ("said", "--json", {}),
        "by": ("error", "--by hybrid", {}),  # there is no table
        **shown("error"),  # the index is of the model as it was saved
    },
    "export": {
        "model": ("files", "{other_nvembed}", {}),
        "out": ("names", "elsewhere", {}),
        "layout": ("error", "--format gguf", {}),  # which has no latent pooling
        "weights": ("files", "--weights f32", {"model": "{other}", "out": "OUT.gguf", "layout": "--format gguf"}),
    },
    "serve": {
        "model": ("said", "{other}", {}),
        "index": ("said", "--index {index}", {}),
        "ui": ("said", "", PAGE),
        "against": ("error", "--against {other}", TWO),  # which has made no index
        "against_index": ("said", "--against-index {other_index}", TWO),
        "host": ("said", "--host ::1", {}),
        "port": ("said", "--port 7", {}),
        "name": ("said", "--name another", {}),
        "api_key_env": ("said", "--api-key-env SOME_KEY", {}),
        "api_key_file": ("said", "--api-key-file {keys}", {}),
        "token_ids": ("said", "--token-ids", {}),
        **shown("said"),
        "max_inputs": ("said", "--max-inputs 2", {}),
        "max_body": ("said", "--max-body 40", {}),
        "batch_tokens": ("said", "--batch-tokens 7", {}),
        "queue_tokens": ("said", "--queue-tokens 7", {}),
        "drain": ("said", "--drain 7", {}),
    },
    "doctor": {"model": ("said", "{model}", {})},
    "ablate": {
        "file": ("said", "{other_ablation}", {}),
        "out": ("names", "--out elsewhere", {}),
        "jobs": ("error", "--jobs 2", {}),
        "smoke": ("names", "--smoke", {}),
        "only": ("names", "--only plain/1 --only warm/1", {}),
        "look": ("names", "--look", {}),
    },
    "mine": {
        "examples": ("files", "{own}", NAIVE),
        "out": ("names", "--out elsewhere.parquet", NAIVE),
        "corpus": ("files", "--corpus {documents}", NAIVE),
        "teacher": ("files", "--teacher {other}", NAIVE),
        "rule": ("files", "--rule abs", NAIVE),
        "margin": ("said", "--margin 0.2", {}),
        "negatives": ("files", "--negatives 1", NAIVE),
        "depth": ("said", "--depth 3", NAIVE),
        "task": ("files", "--task 'Find another thing'", NAIVE),
        "positives": ("said", "--positives each", {"rule": "--rule perc", "margin": "--margin 0.9"}),
        "sampled": ("files", "--sampled", NAIVE),
        "sample_from": ("files", "--sample-from 3", SAMPLED),
        "seed": ("files", "--seed 1", SAMPLED),
        "ensemble": (
            "files",
            "--ensemble intra-sample",
            {**NAIVE, "teacher": "--teacher {model} --teacher {other}"},
        ),
        "vectors": ("names", "--vectors kept", NAIVE),
        "precision": ("names", "--precision float16", {**NAIVE, "vectors": "--vectors kept"}),
        "shard": ("names", "--shard 0/2", NAIVE),
        "report": ("names", "--report report", NAIVE),
        "query_template": ("asked", "--query-template 'Q {text}'", HTTP),
        "document_template": ("asked", "--document-template 'D {text}'", HTTP),
        "api_key_env": ("asked", "--api-key-env SOME_KEY", HTTP),
        **shown("files", NAIVE),
    },
    "synth": {
        "out": ("names", "--out elsewhere.parquet", {}),
        "base_url": ("asked", "--base-url {other_server}", {}),
        "model": ("asked", "--model another", {}),
        "count": ("files", "--count 3", {}),
        "types": ("files", "--types sts", {}),
        "per_task": ("files", "--per-task 4", {}),
        "seed": ("files", "--seed 1", {}),
        "licence": ("files", "--licence MIT", {}),
        "prompts": ("asked", "--prompts {prompts}", {}),
        "shard": ("names", "--shard 0/2", {}),
        **LIMITS,
    },
    "data list": {
        "family": ("said", "--family sts", {}),
        "version": ("said", "--version v1", {}),
        "as_markdown": ("said", "--markdown", {}),
    },
    "data build": {
        "name": ("files", "{other_entry}", {"name": "{entry}", "source": "--source {own}"}),
        "out": ("names", "--out elsewhere.parquet", {}),
        "source": ("files", "--source {few_kinds}", {}),
        "limit": ("files", "--limit 5", {}),
        "share": ("files", "--share 1", {"name": "{sampled_entry}", "source": "--source {own}"}),
        "corpus_out": ("names", "--corpus-out corpus.jsonl", {"name": "{entry}", "source": "--source {own}"}),
        "seed": ("files", "--seed 1", EXAMPLES),
        "form": ("files", "--form example", {"form": "--form label"}),
        "negatives": ("files", "--negatives 1", {}),
        "label": ("files", "--label 0 --label 1", {}),
    },
    "data check": {
        "path": ("said", "{own}", {}),
        "against": ("said", "--against {held}", {}),
        "corpus": ("said", "--corpus", BEIR),
        "bm25": ("said", "--bm25 0", HELD),
        "leaks": ("names", "--leaks leaks.jsonl", HELD),
    },
    "data clean": {
        "path": ("files", "{own}", {}),
        "out": ("names", "--out elsewhere.parquet", {}),
        "against": ("said", "--against {held}", {}),
        "corpus": ("files", "--corpus", BEIR),
        "bm25": ("files", "--bm25 0", HELD),
        "leaks": ("names", "--leaks leaks.jsonl", HELD),
        "repeats": ("files", "--repeats none", {}),
        "language": ("files", "--language de", {}),
        "min_chars": ("files", "--min-chars 30", {}),
        "max_chars": ("files", "--max-chars 40", {}),
        "min_words": ("files", "--min-words 6", {}),
        "max_words": ("files", "--max-words 7", {}),
        "licence": ("files", "--licence 'CC-BY*'", LICENCES),
        "not_licence": ("files", "--not-licence 'CC-BY*'", LICENCES),
        "licences": ("files", "--licences {other_licences}", {**LICENCES, "licence": "--licence 'CC-BY*'"}),
        "shard": ("names", "--shard 0/2", {}),
    },
    "data export": {
        "path": ("files", "{few_examples}", {}),
        "out": ("names", "--out elsewhere.parquet", {}),
        "format": ("error", "--format another", {}),  # there is one as yet
        "negatives": ("files", "--negatives 2", {}),
        "task": ("files", "--task second", {}),
    },
    "data pairs": {
        "path": ("files", "{other_articles}", {}),
        "how": ("files", "--how sentence", {}),
        "out": ("names", "--out elsewhere.parquet", {}),
        "column": ("files", "--column title=heading", {}),
        "per_document": ("files", "--per-document 3", CROPS),
        "negatives": ("files", "--negatives 1", {"how": "--how classes"}),
        "wordnet": ("files", "--wordnet {other_wordnet}", {"how": "--how lemma", "wordnet": "--wordnet {wordnet}"}),
        "name": ("files", "--name mine", {}),
        "licence": ("files", "--licence MIT", {}),
        "seed": ("files", "--seed 1", CROPS),
    },
    "data labels": {
        "path": ("files", "{few_kinds}", {}),
        "out": ("names", "--out elsewhere.parquet", {}),
        "task": ("files", "--task others", {}),
        "negatives": ("files", "--negatives 1", {}),
        "seed": ("files", "--seed 1", EXAMPLES),
        "form": ("files", "--form label", {"path": "{named}", **EXAMPLES}),
        "label": ("files", "--label 0 --label 1", EXAMPLES),
        "words": ("files", "--words {other_words}", LABELS),
    },
    "data relabel": {
        "path": ("files", "{few_examples}", {}),
        "out": ("names", "--out elsewhere.parquet", {}),
        "base_url": ("asked", "--base-url {other_server}", {}),
        "model": ("asked", "--model another", {}),
        "cross_encoder": ("files", "--cross-encoder b", SCORED),
        "threshold": ("files", "--threshold 0.9", SCORED),
        "action": ("files", "--action promote", {}),
        "tasks": ("asked", "--tasks {tasks}", {}),
        "max_chars": ("asked", "--max-chars 9", {}),
        "shard": ("names", "--shard 0/2", {}),
        **LIMITS,
    },
}

# command.parameter -> (why it has no row above, the test of what it does)
EXCEPTIONS = {
    "cache clear.names": ("one cache is for all", "unit/cli/test_cache.py::test_clear_removes_what_is_named"),
    "cache clear.days": ("one cache is for all", "unit/cli/test_cache.py::test_clear_leaves_what_is_young_or_in_use"),
    "ablate.anyway": (
        "it refuses without",
        "unit/studies/ablate/test_study.py::test_a_file_for_another_machine_runs_here_if_asked",
    ),
    "mine.cut": (
        "the server here takes all",
        "unit/encoders/test_http.py::test_mine_names_what_is_too_long_or_cuts_it",
    ),
    "data build.strict": ("needs the hub", "e2e/test_cli.py::test_a_set_is_built_by_name_or_from_a_file_of_ones_own"),
    "demo.recipe": ("a demo takes minutes", "e2e/test_wheel.py::test_the_wheel_has_all_that_a_demo_needs"),
}


def test_every_option_has_an_entry() -> None:
    known = set(parameters(typer.main.get_command(cli.app)))
    shown = {f"{command}.{name}" for command, rows in CHANGES.items() for name in rows}
    assert known == shown | EXCEPTIONS.keys() and not shown & EXCEPTIONS.keys()
    assert len(EXCEPTIONS) <= 10
    for reason, place in EXCEPTIONS.values():
        file, _, test = place.partition("::")
        assert reason and re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), place


def test_every_help_is_a_phrase_and_ends_with_its_default() -> None:
    """typer adds `[default: ...]`; a default that is worked out is the last thing of the text."""
    for command in walk(typer.main.get_command(cli.app)):
        for parameter in command.params:
            phrases = (parameter.help or "").split(". ")
            assert re.fullmatch(r"[A-Z].*\.", parameter.help or "", re.DOTALL), (command.name, parameter.name)
            assert not any("efault:" in phrase for phrase in phrases[:-1]), (command.name, parameter.name)


def walk(command: Any) -> Iterator[Any]:
    if isinstance(command, typer.core.TyperGroup):
        for inner in command.commands.values():
            yield from walk(inner)
    else:
        yield command


# ---- what is read

WORDS = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "dog", "fox", "lazy", "quick"]


def some(seed: object, least: int = 3, most: int = 9) -> str:
    random = np.random.default_rng(list(str(seed).encode()))
    return " ".join(random.choice(WORDS, random.integers(least, most)))


def example(i: int) -> dict[str, Any]:
    negatives = [f"n{i}{k} {some(('n', i, k))}" for k in range(1 + i % 3)]
    positives = [f"p{i}{k} {some(('p', i, k))}" for k in range(1 + i % 2)]
    return {
        "query": f"q{i} {some(('q', i))}",
        "positives": positives,
        "negatives": negatives,
        "task": "second" if i % 4 else "first",
    }


def pair(i: int) -> dict[str, str]:
    return {"query": f"own{i} q{i} {some(i)}", "positive": f"name{i} p{i} {some(-i)}"}


def article(i: int) -> dict[str, Any]:
    sentences = [f"Number {i} says that {some((i, k), 12, 18)}." for k in range(6)]
    named = {"title": f"title{i} {some(i)}", "heading": f"heading{i} {some(-i)}"}
    return {**named, "text": " ".join([*sentences, TEXT]), "label": f"kind {i % 3}"}


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def scored(rows: int) -> list[dict[str, Any]]:
    return [{"text1": f"a text {i}", "text2": f"text {i * i}", "score": i % 4} for i in range(rows)]


def write_data(at: Path) -> Words:
    examples = [example(i) for i in range(12)]
    german = {"query": "Wie entstehen die Gezeiten?", "positives": ["Durch die Anziehungskraft des Mondes."]}
    examples += [examples[0], {**german, "negatives": ["Das weiß niemand so genau."], "task": "first"}]
    held = [{"text": examples[3]["query"], "label": "x"}, {"text": " ".join(examples[5]["query"].split()[::-1])}]
    documents = [{"_id": f"d{i}", "text": f"d{i} {some(('d', i))}", "part": ["even", "odd"][i % 2]} for i in range(10)]
    copied = [{"_id": "c", "text": examples[6]["positives"][0]}]
    articles = [article(i) for i in range(12)]
    write(at / "beir" / "queries.jsonl", [{"_id": "q", "text": "something else"}])
    write(at / "beir" / "corpus.jsonl", copied)
    (at / "beir" / "qrels").mkdir()
    (at / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tc\t1\n")
    entry: dict[str, Any] = {"name": "own", "family": "retrieval", "instructions": ["Find it"], "hub": "someone/own"}
    entry |= {"target": {"v2": "passage"}, "rows": {"kind": "pairs", "query": "query", "positive": ["positive"]}}
    entry["marks"] = dict.fromkeys(("columns", "source", "instructions", "samples", "target"), "guess")
    texts = {
        "entry": yaml.safe_dump(entry),
        "sampled_entry": yaml.safe_dump(entry | {"samples": 8}),
        "other_entry": yaml.safe_dump(entry | {"instructions": ["Find another"]}),
        "licences": "first: CC-BY-4.0\nsecond: MIT\n",
        "other_licences": "first: MIT\nsecond: CC-BY-4.0\n",
        "keys": "a-key\n",
        "words": "".join(f"{i}: word{i}\n" for i in range(6)),
        "other_words": "".join(f"{i}: name{i}\n" for i in range(6)),
        "prompts": PROMPTS.read_text().replace("one training example", "a single training example"),
    }
    for name, text in texts.items():
        (at / f"{name}.yaml").write_text(text)
    kinds = [{"text": f"text {i} {some(i)}", "label": i % 6} for i in range(24)]
    results = {"results": at / "results.json", "other_results": at / "other_results.json"}
    for value, file in enumerate(results.values()):
        write_results(file, Results("s", (Result("t", "sts", "cosine_spearman", value / 2),), 1.0))
    return (
        {name: str(at / f"{name}.yaml") for name in texts}
        | {name: str(file) for name, file in results.items()}
        | {
            "examples": write(at / "examples.jsonl", examples),
            "few_examples": write(at / "few" / "examples.jsonl", examples[:5]),
            "own": write(
                at / "own.jsonl", [{"query": f"q{i} {some(i)}", "positive": f"p{i} {some(-i)}"} for i in range(32)]
            ),
            "held": write(at / "held.jsonl", [{"label": "x", **row} for row in held]),
            "beir": str(at / "beir"),
            "documents": write(at / "documents.jsonl", documents),
            "articles": write(at / "articles.jsonl", articles),
            "wordnet": str(write_wordnet(at / "wordnet")),
            "other_wordnet": str(write_wordnet(at / "other_wordnet", ENTRIES[:9])),
            "other_articles": write(at / "other_articles.jsonl", articles[:7]),
            "other_documents": write(at / "other.jsonl", [{**row, "text": f"{row['text']} too"} for row in documents]),
            "suite": str(Path(write(at / "suite" / "sts.jsonl", scored(60))).parent),
            "other_suite": str(Path(write(at / "short" / "sts.jsonl", scored(7))).parent),
            "kinds": write(at / "kinds.jsonl", kinds),
            "more": write(at / "more.jsonl", [pair(i) for i in range(50)]),
            "named": write(at / "named.jsonl", [{**row, "label": f"kind {row['label']}"} for row in kinds]),
            "few_kinds": write(at / "few" / "kinds.jsonl", kinds[:14]),
            "tasks": write(at / "of.tasks.jsonl", [{"name": "first", "instruction": "Find the sea"}]),
        }
    )


def write_models(at: Path, decoder: Callable[..., Path], embedder: Callable[..., Embedder]) -> Words:
    """`near` is `model` with another head."""
    model, near, other = embedder("latent"), embedder("latent"), embedder("mean", "qwen3")
    near.network.head.latents.data += 0.5
    for name, made in {"model": model, "near": near, "other": other}.items():
        made.save(at / name)
    tiny = TESTS / "parity" / "fixtures"
    return {name: str(at / name) for name in ("model", "near", "other")} | {
        "decoder": str(decoder("llama")),
        "other_decoder": str(decoder("qwen3")),
        "nvembed": str(tiny / "nvembed-tiny-v2"),
        "other_nvembed": str(tiny / "nvembed-tiny-v1"),
    }


def write_recipe(file: Path, places: Words, steps: int, **stage_keys: Any) -> str:
    stage = {
        "name": "only",
        "data": [{"path": places["examples"], "task": {"name": "first", "instruction": "Find it"}}],
        "in_batch_negatives": "all",
        "hard_negatives": 1,
        "optim": {"lr": 1e-2, "steps": steps, "batch_queries": 4},
        **stage_keys,
    }
    recipe = {
        "name": "tiny",
        "model": {"base": places["decoder"], "layers": 1, "pooling": "mean", "max_tokens": 40},
        "tune": {"rank": 2, "alpha": 4},
        "stages": [stage],
        "run": {"out": str(file.parent / "unset"), "tracker": "none", "workers": 0},
    }
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


def write_ablation(at: Path, places: Words, name: str) -> str:
    said = {"name": name, "base": places["recipe"], "baseline": "plain", "seeds": [1, 2], "suite": places["suite"]}
    said["arms"] = {"plain": {}, "warm": {"stages.only.temperature": 0.5}}
    file = at / f"{name}.yaml"
    file.write_text(yaml.safe_dump(said))
    return str(file)


# Stands for the process that measures a model.
MEASURED = {"parameters": 1000, "seconds": [1.0], "peak_memory": 10**8}


class Finished:
    """Stands for the process of a cell: its result is there at once."""

    returncode = 0

    def __init__(self, words: list[str], **_: Any) -> None:
        folder = Path(words[-2])
        spec = json.loads((folder / "cell.json").read_text())
        value = spec["seed"] / 7 + (spec["arm"] == "plain") / 3
        row = Result("t", "classification", "accuracy", value)
        write_results(folder / "scores.json", Results("s", (row,), 1.0))
        facts = {"recipe": "r", "seconds": {"training": 1.0}, "tokens": 1, "peak_mb": 1}
        facts |= {"mean": value, "scores": {"t": value}}
        (folder / "result.json").write_text(json.dumps(spec | facts))

    def poll(self) -> int:
        return 0


def asked_once(app: FastAPI, listening: Any, drain_s: float) -> None:
    """Stands for the running of a server: it is asked a few times, with a key of each kind and without."""
    batcher = app.state.server.batcher
    print(listening.getsockname(), drain_s, batcher.batch_tokens, batcher.queue_tokens)
    with TestClient(app, "http://localhost") as client:
        print(client.get("/index").text, client.get("/page/sides.json").text, client.get("/against/index").text)
        for headers in ({}, {"Authorization": "Bearer some-key"}, {"Authorization": "Bearer a-key"}):
            for texts in ("tides " * 9, ["a", "b", "c"], [5, 6]):
                sent = {"input": texts, "dimensions": 2}
                print(client.post("/v1/embeddings", json=sent, headers=headers).text)


def answer(body: Body, n: int) -> Reply:
    """Of embeddings, of a judge, of a brainstorm and of an example; each goes by what it is asked alone."""
    if "input" in body:
        vectors = [
            {"object": "embedding", "index": i, "embedding": numbers(text)} for i, text in enumerate(body["input"])
        ]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        return Reply(body=json.dumps({"object": "list", "model": "m", "data": vectors, "usage": usage}).encode())
    prompt, seed = body["messages"][0]["content"], body["seed"]
    if '"verdict"' in prompt:
        said: dict[str, Any] = {"verdict": "positive" if len(prompt) % 2 else "negative"}
    elif '"tasks"' in prompt:
        said = {"tasks": [f"Given {some((seed, i))} {i}, find it" for i in range(20)]}
    else:
        said = {key: f"{some((seed, key), 8, 20)} {key}{seed}" for key in re.findall(r'"(\w+)"', prompt)}
    return Reply(json.dumps(said), stall_s=0.02)


def numbers(text: str) -> list[float]:
    return [float(len(text)), *(1.0 + text.count(letter) for letter in "aeiou")]


class Overlap:
    """A cross-encoder of this name."""

    def __init__(self, name: str, trust_remote_code: bool) -> None:
        self.name = name

    def predict(self, pairs: Sequence[tuple[str, str]], **_: Any) -> np.ndarray:
        return np.array([(len(text) * 7 + len(self.name) + ord(self.name[0])) % 10 / 10 for _, text in pairs])


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, FakeLLM]]:
    with FakeLLM(answer) as one, FakeLLM(answer) as other:
        yield {"server": one, "other_server": other}


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_decoder: Callable[..., Path],
    tiny_embedder: Callable[..., Embedder],
    servers: dict[str, FakeLLM],
) -> Words:
    at = tmp_path_factory.mktemp("every-option")
    found = write_data(at) | write_models(at, tiny_decoder, tiny_embedder)
    for name, documents in (("index", "documents"), ("other_index", "other_documents")):
        build_index(Embedder.load(found["model"]), Path(found[documents]), at / name, chunk_tokens=4, metadata=["all"])
        found[name] = str(at / name)
    found["recipe"] = write_recipe(at / "recipe.yaml", found, 1)
    found["other_recipe"] = write_recipe(at / "other.yaml", found, 2)
    found["follows"] = write_recipe(at / "follows.yaml", found, 1, loss={"distill": {"vector_weight": 1.0}})
    for key, name in (("ablation", "tiny"), ("other_ablation", "another")):
        found[key] = write_ablation(at, found, name)
    return found | {name: server.url for name, server in servers.items()}


# ---- runs


class Outcome(NamedTuple):
    said: str
    error: str
    names: list[str]
    files: dict[str, bytes]
    asked: list[str]
    at_once: bool


Run = Callable[[str, Words], Outcome]


def plain_text(printed: str) -> str:
    """Without progress, and how long it took."""
    printed = re.sub(r"(?m)^  [\d,]+/[\d,]+ \w+.*\n", "", printed)
    return re.sub(r"[\d.,]+ (\w+/s|s\b|seconds)|, \d+:\d\d left|\"seconds\": [\d.]+", "", printed)


def kept(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): b"" if file.suffix == ".sqlite" else file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def asked(servers: dict[str, FakeLLM]) -> list[str]:
    return sorted(
        json.dumps([name, server.headers[i].get("authorization"), body], sort_keys=True)
        for name, server in servers.items()
        for i, body in enumerate(server.requests)
    )


@pytest.fixture(scope="module")
def run(places: Words, servers: dict[str, FakeLLM], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`run(command, words)`: all that a call says, asks and leaves in the folder that it is called in."""

    def call(command: str, words: Words) -> Outcome:
        folder = tmp_path_factory.mktemp("run")
        line = f"{command} {' '.join(words.values())}"
        for name, place in places.items():
            line = line.replace(f"{{{name}}}", place)
        for server in servers.values():
            server.requests.clear()
            server.headers.clear()
            server.most_at_once = 0
        said, error = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(error):
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["embedwright", *shlex.split(line)])
            try:
                cli.main()
            except SystemExit as stop:
                error.write(f"exit {stop.code}")
        files = kept(folder)
        shutil.rmtree(folder)
        most = max(server.most_at_once for server in servers.values())
        printed, noted = (plain_text(text.getvalue().replace(str(folder), "")) for text in (said, error))
        return Outcome(printed, noted, list(files), files, asked(servers), most > 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_KEY", "some-key")
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "error" if name == "TRANSFORMERS_VERBOSITY" else "1")  # so that main leaves none
        patch.setattr("sentence_transformers.CrossEncoder", Overlap)
        patch.setattr(mining, "Server", partial(Server, retries=0))
        patch.setattr("embedwright.compress.report.measured", lambda *_: MEASURED)
        patch.setattr(serve_run, "run", asked_once)
        patch.setattr(serve_run, "listen", lambda *place: SimpleNamespace(getsockname=lambda: place))
        patch.setattr(ablate_jobs, "subprocess", SimpleNamespace(Popen=Finished, DEVNULL=None))
        known = cache(lambda command, words: call(command, dict(words)))
        yield lambda command, words: known(command, tuple(words.items()))


# Commands without --device, --dtype and --max-tokens, and why.
OPEN_NOTHING = {
    "train": "the recipe says it",
    "ablate": "the recipe says it",
    "demo": "the recipe says it",
    "merge": "weights are merged in the type that they are stored in",
    "export": "it writes weights as they are",
    "compress": "it changes weights in the type that they are stored in",
    "doctor": "it proves a model as it is",
    "report": "it draws a run with the run's own model",
    "synth": "a server writes",
    "data relabel": "a server or a cross-encoder judges",
}


def test_every_command_that_encodes_says_how_its_models_are_opened() -> None:
    """A new command has the three options, or a reason above."""
    parts = [parameter.rpartition(".")[::2] for parameter in parameters(typer.main.get_command(cli.app))]
    options: dict[str, set[str]] = {}
    for command, name in parts:
        options.setdefault(command, set()).add(name)
    for command, names in options.items():
        if not command.startswith(("data ", "cache ")) and command not in OPEN_NOTHING:
            assert {"device", "dtype", "max_tokens"} <= names, command
        elif command in OPEN_NOTHING:
            assert not {"device", "dtype"} & names, command


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, rows in CHANGES.items() for name in rows])
def test_another_value_of_an_option_shows(command: str, name: str, run: Run) -> None:
    where, other, both = CHANGES[command][name]
    words = BASE[command] | both
    plain, changed = run(command, words), run(command, {**words, name: other})
    assert "exit 2" not in plain.error and "Traceback" not in plain.error, "the run compared with"
    if where != "error":
        assert "exit 2" not in changed.error and "Traceback" not in changed.error, changed.error
    field = where.replace(" ", "_")
    assert getattr(changed, field) != getattr(plain, field)


# What standard output begins with, where it is no report as JSON.
RESULTS: dict[str, str] = {
    "train": "stage only: ",
    "eval": "task +metric ",
    "compare": r"\S+ against ",
    "report": "OUT.html: ",
    "bench": "\nSciFact: ",
    "merge": "OUT: average",
    "encode": "OUT\n$",
    "index": "OUT: 10 documents",
    "serve": r"\S+ at http://",
    "search": "tides\n  \\d",
    "export": "OUT: nvembed",
    "compress": r"OUT:\n  layers: ",
    "doctor": "torch ",
    "ablate": "tiny: suite",
    "data list": "name +family ",
}


@pytest.mark.parametrize("command", BASE)
def test_standard_output_holds_results_alone(command: str, run: Run) -> None:
    """Progress and remarks come before the results, which would not stand first if these were on the wrong side."""
    both = next((both for _, _, both in CHANGES[command].values()), {})
    said = run(command, BASE[command] | both).said
    assert re.match(RESULTS.get(command, r"\{\n(?s:.*)\}\n$"), said), said


@pytest.mark.parametrize("command", BASE)
def test_a_call_is_the_same_again(command: str, run: Run) -> None:
    """Else nothing above would say anything."""
    both = next((both for _, _, both in CHANGES[command].values()), {})
    words = BASE[command] | both
    plain, again = run(command, words), run(command, {**words, "nothing more": ""})
    assert plain is not again and plain == again
