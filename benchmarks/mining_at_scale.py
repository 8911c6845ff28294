"""Mining as it grows: search alone with vectors on disk, memory by the number of examples, and end to end.

`search` writes unit vectors in shards, as `mine --vectors` does, and searches them in a process of its own: seconds,
bytes that the search reads, peak memory. docs/scale.md extrapolates. Some queries are held to brute force. `memory`
mines more and more examples and documents that lie on disk. `end-to-end` encodes and searches real pairs on both sides,
ours and sentence-transformers' `mine_hard_negatives`, with one teacher and the 95 % rule.

    python benchmarks/mining_at_scale.py search --documents 1000000 --width 768 --queries 100000
    python benchmarks/mining_at_scale.py memory --examples 20000 80000 320000
    python benchmarks/mining_at_scale.py end-to-end --texts 50000 --model minilm
    python benchmarks/mining_at_scale.py end-to-end --texts 50000 --model MERGED --dtype bfloat16
"""

from __future__ import annotations

from common import MB, bind_main_thread, bind_threads, in_own_process, peak_during, ratio, record, resident, timed

bind_threads()

from embedwright import threads  # noqa: E402

threads.load_faiss()  # before others do, so that it sees all cores

import argparse  # noqa: E402
import contextlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import texts  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from embedwright.data.schema import Example, Passage  # noqa: E402
from embedwright.data.tables.documents import open_corpus  # noqa: E402
from embedwright.data.tables.table import open_examples  # noqa: E402
from embedwright.encoders.open import open_encoder  # noqa: E402
from embedwright.mining import mine as mining  # noqa: E402
from embedwright.mining.pool import positives_of  # noqa: E402
from embedwright.model.embedder import Embedder  # noqa: E402
from embedwright.vectors.search import top_k  # noqa: E402
from embedwright.vectors.shards import Vectors, write_shard  # noqa: E402

DEPTH = 100
SHARD = 65_536
CHECKED = 8  # queries compared with brute force


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    search = kinds.add_parser("search")
    search.add_argument("--documents", type=int, default=1_000_000)
    search.add_argument("--width", type=int, default=768)
    search.add_argument("--queries", type=int, default=100_000)
    search.add_argument("--precision", choices=("float32", "float16"), default="float32")
    search.add_argument("--folder", type=Path, help="where the vectors lie; default: a temporary one")
    search.add_argument("--measure", action="store_true", help="internal")
    memory = kinds.add_parser("memory")
    memory.add_argument("--examples", type=int, nargs="+", default=[20_000, 80_000])
    memory.add_argument("--documents", type=int, default=50_000, help="the corpus, whatever the number of examples")
    memory.add_argument("--width", type=int, default=256)
    memory.add_argument("--at-once", type=int, default=8192, help="examples at work: 131,072 in earnest")
    memory.add_argument("--folder", type=Path, help="internal")
    end = kinds.add_parser("end-to-end")
    end.add_argument("--texts", type=int, default=50_000, help="queries and documents together")
    end.add_argument("--model", default="minilm", help="minilm, or a folder that `embedwright merge` or `save` wrote")
    end.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    end.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    bind_main_thread()
    {"search": search_alone, "memory": memory_by_examples, "end-to-end": end_to_end}[options.kind](options)


# ---- search alone


def search_alone(options: argparse.Namespace) -> None:
    if options.measure:
        print(json.dumps(measured(options)))
        return
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_vectors(folder, options)
        arguments = [
            part
            for key in ("documents", "width", "queries", "precision")
            for part in (f"--{key}", str(getattr(options, key)))
        ]
        found = in_own_process(["search", *arguments, "--folder", str(folder), "--measure"])
    print(
        f"{found['seconds']:,.1f} s, {found['read'] / 1e9:,.2f} GB read, {found['added_mb']:,.0f} MB beside libraries "
        f"and queries, {found['peak_mb']:,.0f} MB in all; top {DEPTH} of {CHECKED} queries equal to brute force"
    )
    size = {key: getattr(options, key) for key in ("documents", "width", "queries", "precision")}
    name = f"search-{options.documents}x{options.width}-{options.queries}-{options.precision}"
    record(name, {"size": size, **found}, None)


def drawn(rows: int, width: int, seed: int) -> NDArray[np.float32]:
    vectors_NE = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    vectors_NE /= np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return vectors_NE


def files(folder: Path, options: argparse.Namespace) -> list[tuple[Path, int]]:
    starts = range(0, options.documents, SHARD)
    name = f"{options.precision}-{options.width}"
    return [(folder / f"{name}-{s // SHARD:05d}.arrow", min(SHARD, options.documents - s)) for s in starts]


def write_vectors(folder: Path, options: argparse.Namespace) -> None:
    for number, (path, rows) in enumerate(files(folder, options)):
        if not path.is_file():
            write_shard(path, drawn(rows, options.width, number).astype(options.precision), {}, {})


def measured(options: argparse.Namespace) -> dict[str, Any]:
    shards = files(options.folder, options)
    vectors = Vectors([path for path, _ in shards], [rows for _, rows in shards], options.width)
    queries_QE = drawn(options.queries, options.width, 10**6)
    top_k(queries_QE[:2], drawn(300, options.width, 1), DEPTH)  # libraries, kernels
    read, tiles = 0, Vectors.tiles

    def counted(self: Vectors, size: int) -> Any:
        nonlocal read
        for first, tile_NE in tiles(self, size):
            read += tile_NE.size * np.dtype(options.precision).itemsize
            yield first, tile_NE

    Vectors.tiles = counted  # type: ignore[method-assign]
    found: list[Any] = []
    before = resident()
    seconds: list[float] = []
    peak = peak_during(lambda: seconds.append(timed(lambda: found.append(top_k(queries_QE, vectors, DEPTH)))))
    Vectors.tiles = tiles  # type: ignore[method-assign]
    check(found[0], queries_QE, vectors)
    return {"seconds": seconds[0], "read": read, "added_mb": (peak - before) / MB, "peak_mb": peak / MB}


def check(
    found: tuple[NDArray[np.float32], NDArray[np.int64]], queries_QE: NDArray[np.float32], vectors: Vectors
) -> None:
    exact_QC = np.concatenate(
        [queries_QE[:CHECKED].astype(float) @ tile.astype(float).T for _, tile in vectors.tiles(SHARD)], 1
    )
    rows_QK = np.argsort(-exact_QC.astype(np.float32), axis=1, kind="stable")[:, :DEPTH]
    if not np.array_equal(rows_QK, found[1][:CHECKED]):
        sys.exit("the search differs from brute force")


# ---- memory


class HashTeacher:
    """A text's vector is drawn by its length and last characters: no model, so that memory is that of mining."""

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, given: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        seeds = np.array([int(text.rsplit(" ", 1)[1]) for text in given], np.int64)
        angle_NE = np.outer(seeds + 1, np.arange(1, self.width + 1)) * 0.6180339887 % 1
        return (np.cos(2 * np.pi * angle_NE) / self.width**0.5).astype(np.float32)


def memory_by_examples(options: argparse.Namespace) -> None:
    if options.folder:
        print(json.dumps(memory_of(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EMBEDWRIGHT_CACHE"] = f"{folder}/cache"
        for examples in options.examples:
            write_rows(Path(folder), examples, options.documents)
            named = {
                "examples": examples,
                "documents": options.documents,
                "width": options.width,
                "at-once": options.at_once,
            }
            arguments = [part for key, value in named.items() for part in (f"--{key}", str(value))]
            rows.append({"examples": examples, **in_own_process(["memory", *arguments, "--folder", folder])})
            print(json.dumps(rows[-1]), flush=True)
    size = {key: getattr(options, key) for key in ("documents", "width", "at_once")}
    record("mine-memory", {"size": size, "rows": rows}, None)


def passage(number: int) -> str:
    """40 words, so that no passage nearly repeats another one."""
    drawn_words = random.Random(number).choices(range(10_000), k=40)
    return " ".join(f"w{word}" for word in drawn_words) + f" {number}"


def write_rows(folder: Path, examples: int, documents: int) -> None:
    with (folder / "corpus.jsonl").open("w") as out:
        for i in range(documents):
            out.write(json.dumps({"_id": f"d{i}", "text": passage(i)}) + "\n")
    with (folder / "rows.jsonl").open("w") as out:
        for i in range(examples):
            positive = {"id": f"d{i % documents}", "text": passage(i % documents)}
            out.write(json.dumps({"id": f"e{i}", "query": f"query {i}", "positives": [positive]}) + "\n")


def memory_of(options: argparse.Namespace) -> dict[str, Any]:
    mining.AT_ONCE = options.at_once
    table, corpus = open_examples(options.folder / "rows.jsonl"), open_corpus(options.folder / "corpus.jsonl")
    before, seconds = resident(), []
    settings: dict[str, Any] = {
        "rule": "naive",
        "vectors": options.folder / "vectors",
        "out": options.folder / "mined.parquet",
    }
    run = lambda: mining.mine(table, corpus, HashTeacher(options.width), task="", **settings)  # noqa: E731
    peak = peak_during(lambda: seconds.append(timed(run)))
    return {"peak_mb": peak / MB, "added_mb": (peak - before) / MB, "seconds": seconds[0]}


# ---- end to end


def end_to_end(options: argparse.Namespace) -> None:
    import datasets
    from sentence_transformers.util import mine_hard_negatives

    pairs = some_pairs(options.texts // 2)
    examples = [Example(f"e{i}", "", query, (Passage(text),)) for i, (query, text) in enumerate(pairs)]
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "minilm":
            teacher: Any = open_encoder("minilm")
            peer = teacher.model
        else:  # of sentence-transformers' own modules: both open it
            (Path(folder) / "peer").symlink_to(Path(options.model).resolve())
            teacher = Embedder.load(options.model, dtype=options.dtype)
            peer = models.peer(Path(folder), options.dtype)
        sample = [text for pair in pairs[:100] for text in pair]
        batch, tried = models.best_batch(partial(models.encode_peer, peer), sample, None)
        teacher.encode(sample, task=None)
        rows = {"query": [query for query, _ in pairs], "positive": [text for _, text in pairs]}
        found: dict[str, Any] = {}

        def ours() -> None:
            mined, _ = mining.mine(examples, positives_of(examples), teacher, depth=DEPTH + 1, task=None)
            found["ours"] = [[p.text for p in row.negatives] for row in mined]

        def theirs() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                mined = mine_hard_negatives(
                    datasets.Dataset.from_dict(rows), peer, range_max=DEPTH, num_negatives=7, relative_margin=0.05,
                    output_format="labeled-list", batch_size=batch, use_faiss=True, verbose=False,
                )  # fmt: skip
            found["peer"] = {
                row["query"]: [t for t, y in zip(row["positive"], row["labels"], strict=True) if not y] for row in mined
            }

        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(options.rounds):
            seconds["ours"].append(timed(ours))
            seconds["peer"].append(timed(theirs))
    shared = [
        len(set(mine) & set(found["peer"].get(query, ()))) / max(1, len(mine))
        for mine, (query, _) in zip(found["ours"], pairs, strict=True)
    ]
    name = Path(options.model).name
    figures = {
        "size": {"texts": len(pairs) * 2, "model": name, "dtype": options.dtype, "texts_of": texts.source()},
        "peer_batch": batch, "peer_batches": tried,
        "seconds": seconds, "ratio": ratio(seconds["peer"], seconds["ours"]),
        "negatives_that_the_peer_found_too": float(np.mean(shared)),
    }  # fmt: skip
    print(json.dumps(figures))
    record(f"mine-end-to-end-{name}-{options.dtype}-{len(pairs) * 2}", figures, None)


def some_pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of different queries and different passages, drawn from all sources."""
    pool = [pair for origin in texts._origins() for pair in origin]
    random.Random(0).shuffle(pool)
    by_query = dict(pool)
    by_text = {text: query for query, text in by_query.items()}
    pairs = [(query, text) for text, query in by_text.items()][:count]
    if len(pairs) < count:
        sys.exit(f"the sources have {len(pairs)} pairs: take --texts {2 * len(pairs)}")
    return pairs


if __name__ == "__main__":
    main()
