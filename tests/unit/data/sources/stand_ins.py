"""Local copies of public sets, as small as a test needs them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def repository(folder: Path, **configs: tuple[str, list[dict[str, Any]]]) -> Path:
    """A folder as a repository of the hub is laid out: a split of each config, named in the card."""
    card = ["---", "configs:"]
    for config, (split, rows) in configs.items():
        write(folder / config / split / "0000.parquet", rows)
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - split: {split}", f"    path: {config}/{split}/*.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def beir(folder: Path) -> Path:
    return repository(
        folder,
        default=("train", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1.0} for i in range(5)]),
        queries=("queries", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(5)]),
        corpus=("corpus", [{"_id": f"d{i}", "title": f"Title {i}", "text": "body"} for i in range(9)]),
    )


def _of_files(folder: Path, configs: dict[str, dict[str, str]]) -> Path:
    """Writes the card of a repository whose configs name their files, by split."""
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        card += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


WORDS = ["tide", "moon", "sea", "rise", "fall", "gravity", "sun", "level", "river", "bridge", "stone", "iron", "court"]
WORDS += ["judge", "trial", "cell", "gene", "virus", "bank", "loan"]


def words(*seed: object, count: int = 9) -> str:
    random = Random(repr(seed))
    return " ".join(random.choices(WORDS, k=count))


def nv_embed(folder: Path, rows: int = 30) -> Path:
    """Writes local copies of sets of every kind of rows, as their repositories on the hub have them.

    Files and columns are those of each set's own card or script:
    scifact: card of mteb/scifact on the hub (`dataset_info`, and JSON Lines named by `configs`).
    hover: huggingface/datasets, datasets/hover/hover.py; a fact for each sentence, so titles repeat; and the corpus of
        mteb/hotpotqa, whose card has the columns of mteb/scifact's.
    nq: card of sentence-transformers/natural-questions (its `dataset_info` says query, answer).
    squad: huggingface/datasets, datasets/squad/squad.py; the questions of a paragraph stand together.
    miracl: card of sentence-transformers/miracl (`en-triplet`).
    nli: huggingface/datasets, datasets/snli/snli.py; a pair without a gold label has -1.
    multi_nli: card of nyu-mll/multi_nli; huggingface/datasets, datasets/multi_nli/multi_nli.py.
    sts22: embeddings-benchmark/mteb, scripts/data/sts22-crosslingual-sts/create_data.py; scores are 5 minus the mean of
        ratings from 1 to 4, and a folder a language.
    amazon_polarity: embeddings-benchmark/mteb, scripts/data/amazon_polarity/create_data.py.
    biorxiv_p2p: embeddings-benchmark/mteb, scripts/data/biorxiv/script_raw.py; files of 100,000 rows, gzipped.
    reddit_s2s: UKPLab/TWEAC-qa-agent-selection, data/reddit/train/*.txt.
    """
    numbers = range(rows)
    scifact = _of_files(
        folder / "scifact",
        {
            "default": {"train": "qrels/train.jsonl", "test": "qrels/test.jsonl"},
            "corpus": {"corpus": "corpus.jsonl"},
            "queries": {"queries": "queries.jsonl"},
        },
    )
    documents = [{"_id": str(70 + i), "title": f"Title {i}", "text": words("sci", i)} for i in range(2 * rows)]
    write(scifact / "corpus.jsonl", documents)
    write(
        scifact / "queries.jsonl", [{"_id": str(i), "text": f"claim {i} {words('sci', i, count=4)}"} for i in numbers]
    )
    judged = [{"query-id": str(i), "corpus-id": str(70 + i), "score": 1.0} for i in numbers]
    write(scifact / "qrels" / "train.jsonl", judged[3:])
    write(scifact / "qrels" / "test.jsonl", judged[:3])

    hover = _of_files(folder / "hover", {"corpus": {"corpus": "corpus.jsonl"}})
    pages = [{"_id": str(i), "title": f"Page {i}", "text": words("page", i)} for i in range(2 * rows)]
    write(hover / "corpus.jsonl", pages)
    claims = [
        {
            "id": i,
            "uid": f"u{i}",
            "claim": f"hover {i} {words('page', i, count=4)}",
            "supporting_facts": [{"key": f"Page {page}", "value": line} for page in (i, i + 1) for line in (0, 1)],
            "label": i % 2,
            "num_hops": 2,
            "hpqa_id": f"h{i}",
        }
        for i in numbers
    ]
    write(hover / "default" / "train" / "0000.parquet", claims)

    pairs = [{"query": f"what {i} {words('nq', i, count=4)}", "answer": f"answer {words('nq', i)}"} for i in numbers]
    write(_of_files(folder / "nq", {"pair": {"train": "pair/train-*"}}) / "pair/train-00000-of-00001.parquet", pairs)
    questions = [
        {
            "id": f"5733be{i}",
            "title": f"Article {i // 6}",
            "context": f"paragraph {words('squad', i // 3)}",
            "question": f"which {i} {words('squad', i // 3, count=4)}?",
            "answers": {"text": ["paragraph"], "answer_start": [0]},
        }
        for i in numbers
    ]
    squad = _of_files(folder / "squad", {"plain_text": {"train": "plain_text/train-*"}})
    write(squad / "plain_text" / "train-00000-of-00001.parquet", questions)
    triples = [
        {"anchor": f"where {i} {words('mi', i, count=4)}", "positive": words("mi", i), "negative": words("mi", -i - 1)}
        for i in numbers
    ]
    miracl = _of_files(folder / "miracl", {"en-triplet": {"train": "en-triplet/train-*"}})
    write(miracl / "en-triplet" / "train-00000-of-00001.parquet", triples)

    def nli(name: str) -> list[dict[str, Any]]:
        return [
            {
                "premise": f"{name} {i} {words(name, i)}",
                "hypothesis": f"{label} {words(name, i, label)}",
                "label": label,
            }
            for i in numbers
            for label in (0, 1, 2, -1)
        ]

    snli = _of_files(folder / "nli", {"plain_text": {"train": "plain_text/train-*"}})
    write(snli / "plain_text" / "train-00000-of-00001.parquet", nli("snli"))
    parsed = [
        row
        | {
            "promptID": i // 4,
            "pairID": f"{i}n",
            "genre": "fiction",
            "premise_parse": "(ROOT)",
            "hypothesis_parse": "()",
        }
        for i, row in enumerate(nli("mnli"))
    ]
    write(folder / "multi_nli" / "data" / "train-00000-of-00001.parquet", parsed)

    rated = [
        {
            "id": f"14{i}_15{i}",
            "score": 5 - (1 + (i % 10) / 3),
            "sentence1": f"news {i} {words('news', i)}",
            "sentence2": f"report {i} {words('report', i)}",
        }
        for i in numbers
    ]
    write(_of_files(folder / "sts22", {"en": {"train": "en/train.jsonl"}}) / "en" / "train.jsonl", rated)

    reviews = [
        {"label": i % 2, "text": f"Title {i}\n\n{words('ap', i)}", "label_text": ("negative", "positive")[i % 2]}
        for i in numbers
    ]
    write(folder / "amazon_polarity" / "train.jsonl", reviews)
    for part in range(2):
        papers = [
            {
                "id": f"10.1/{part}{i}",
                "title": f"On {words('bio', part, i, count=4)}",
                "abstract": words("abs", part, i),
            }
            | {"category": ("cell biology", "genetics", "neuroscience")[i % 3]}
            for i in numbers
        ]
        write(folder / "biorxiv_p2p" / f"train_{part}.jsonl.gz", papers)
    for subreddit in ("AFL", "AskReddit", "Astronomy"):
        (folder / "reddit_s2s").mkdir(exist_ok=True)
        titles = [f"{subreddit} {i} &amp; {words(subreddit, i, count=5)}" for i in numbers]
        (folder / "reddit_s2s" / f"{subreddit}.txt").write_text("\n".join(titles))
    return folder
