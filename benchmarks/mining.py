"""Hard-negative mining, side by side with sentence-transformers and faiss: exact top 100, negatives below 95 % of the
positive.

Random unit vectors with near neighbours planted round each query; both sides are given them by a stand-in for a model,
so that no encoding is timed. The peer runs at its best: torch and faiss, each at its best batch of queries, searched
first; vectors are unit vectors and it multiplies them as such. Then A B A B. Negatives are compared, and the top 100 of
some queries with brute force in float64; exits 1 where they differ. Memory is what a run adds to the vectors given.

    python benchmarks/mining.py
    python benchmarks/mining.py --documents 1000000 --width 1024 --queries 512
"""

from __future__ import annotations

from common import MB, bind_main_thread, bind_threads, own_seconds, peak_during, ratio, record, resident, rounded, timed

bind_threads()

from embedwright import threads  # noqa: E402

threads.load_faiss()  # before others do, so that it sees all cores

import argparse  # noqa: E402
import contextlib  # noqa: E402
import gc  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import datasets  # noqa: E402
import faiss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from sentence_transformers.util import dot_score, mine_hard_negatives, pairwise_dot_score  # noqa: E402

from embedwright.cpu import kernels, onednn  # noqa: E402
from embedwright.data.schema import Example, Passage  # noqa: E402
from embedwright.mining import choose, rank  # noqa: E402
from embedwright.mining.mine import mine  # noqa: E402
from embedwright.vectors import search as topk  # noqa: E402

DEPTH = 100
SHARE = 0.95
NEAR = 8  # documents planted round each query, its positive the first of them
BATCHES = (64, 512, 2048, 16384)  # of queries, for the peer
LARGEST_SCORES = 2 * 2**30  # bytes: no batch whose score matrix is larger
CHECKED = 16  # queries compared with brute force
CLOSE = 1e-5  # of two float32 scores of one pair
THEIRS = ("peer, torch", "peer, faiss")

# What is timed within one run of ours.
PARTS = (
    (onednn, "whole", "products in int8"),
    (kernels, "reaches", "which may be of the best"),
    (kernels, "dots", "scores in float64"),
    (topk, "_merged", "ranking"),
    (kernels, "quantised", "quantising"),
    (rank, "top_k", "rest of the search"),
    (choose.Pool, "keys_of", "same texts"),
    (choose.Miner, "_take", "near-duplicates, choice"),
)

# Each piece of the search that is in C, and what takes its place without it.
PIECES: dict[str, tuple[Any, str, Any]] = {
    "nomination in int8 (csrc/search.c)": (topk.int8, "available", lambda width: False),
    "scores in float64 (csrc/search.c)": (topk, "kernels", SimpleNamespace(available=lambda: False)),
}

Negatives = list[tuple[list[str], list[float]]]  # by query: texts and their scores, best first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--negatives", type=int, default=7, help="of a query, as both sides return them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if NEAR * options.queries > options.documents:
        parser.error(f"{options.queries} queries need {NEAR * options.queries} documents")
    bind_main_thread()
    vectors = planted(options.documents, options.width, options.queries)
    texts = [f"document {i}" for i in range(options.documents)], [f"query {i}" for i in range(options.queries)]
    batches = [b for b in BATCHES if b * options.documents * 4 <= LARGEST_SCORES and b < 2 * options.queries]

    wanted = options.negatives
    tried = {
        name: {b: timed(lambda name=name, b=b: theirs(name, b, wanted, *texts, *vectors)) for b in batches}
        for name in THEIRS
    }
    best = {name: min(seconds, key=seconds.__getitem__) for name, seconds in tried.items()}
    found: dict[str, Any] = {}
    variants: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(wanted, *texts, *vectors),
        **{name: lambda name=name: theirs(name, best[name], wanted, *texts, *vectors) for name in THEIRS},
        "ours, search": lambda: topk.top_k(vectors[1], vectors[0], DEPTH),
        # what IndexFlatIP.search runs, without the index's copy of the vectors
        "faiss, search": lambda: faiss.knn(vectors[1], vectors[0], DEPTH, metric=faiss.METRIC_INNER_PRODUCT),
        "product alone": lambda: product_alone(*vectors),
    }
    if onednn.int8_matmul_available():
        variants["int8 product alone"] = lambda: whole_product_alone(*vectors)
        for piece, (place, name, instead) in PIECES.items():
            variants[piece] = lambda change=(place, name, instead): without(change, *vectors)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    added: dict[str, int] = dict.fromkeys(variants, 0)
    largest = 0
    for _ in range(options.rounds):
        for name, run in variants.items():
            gc.collect()  # no side pays for what another left behind
            before = resident()
            peak = peak_during(
                lambda name=name, run=run: seconds[name].append(timed(lambda: found.update({name: run()})))
            )
            if name in THEIRS:
                found[name], searched = found[name]
                seconds.setdefault(f"{name}, search", []).append(searched)
            added[name], largest = max(added[name], peak - before), max(largest, peak)

    median = {name: statistics.median(each) for name, each in seconds.items()}
    fastest = min(THEIRS, key=median.__getitem__)
    searches = [f"{name}, search" for name in THEIRS]
    fastest_search = min(searches, key=median.__getitem__)
    ratios = {
        "whole": ratio(seconds[fastest], seconds["ours"]),
        "search": ratio(seconds[fastest_search], seconds["ours, search"]),
        **{f"whole, to {name}": ratio(seconds[name], seconds["ours"]) for name in THEIRS},
        **{f"to {name}": ratio(seconds[name], seconds["ours, search"]) for name in (*searches, "faiss, search")},
        "search, share of the product alone": ratio(seconds["product alone"], seconds["ours, search"]),
    }
    for name in sorted(seconds):
        memory = f"{added[name] / MB:8,.0f} MB" if name in added else ""
        print(f"{name:19} {median[name]:8.2f} s  {memory}", f" batch {best[name]}" if name in best else "")
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.2f} ({value['least']:.2f} to {value['most']:.2f})")
    alone = {piece: ratio(seconds[piece], seconds["ours, search"]) for piece in PIECES if piece in seconds}
    for piece, value in alone.items():
        print(f"{piece}, alone: {value['median']:.2f}")
    same = {name: share_of_equal(found["ours"], found[name]) for name in THEIRS}
    exact = equal_to_brute_force(*found["ours, search"], *vectors)
    print("queries with the same negatives in the same order:", ", ".join(f"{n} {s}" for n, s in same.items()))
    print(f"top {DEPTH} of {CHECKED} queries equal to brute force: {exact}; largest process {largest / MB:,.0f} MB")
    figures = {
        "size": vars(options),
        "batches": tried,
        "seconds": seconds,
        "added_mb": {name: amount / MB for name, amount in added.items()},
        "largest_mb": largest / MB,
        "ratios": ratios,
        "alone": alone,
        "equal": same,
        "exact": exact,
        "parts": own_seconds(variants["ours"], PARTS, "rest of the whole"),
    }
    of = f"{options.documents:,} x {options.width}, {options.queries} queries"
    print(json.dumps(rounded(figures)))
    if not exact or None in same.values():
        sys.exit("results differ")
    goal = {"of": of, "value": ratios["whole"]["median"]}
    record(f"mining-{options.documents}x{options.width}", figures, {"mining": [goal]})


def planted(documents: int, width: int, queries: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of documents and queries. The document `NEAR` i is the positive of query i, at a cosine of 0.7;
    those after it are at cosines from 0.5 to 0.75, so that the rule takes some away and leaves others."""
    random = torch.Generator().manual_seed(0)
    document_CE = torch.empty(documents, width)
    for tile_NE in document_CE.split(65536):  # in place, tile by tile: no second copy of the corpus
        F.normalize(tile_NE.normal_(generator=random), dim=1, out=tile_NE)
    query_QE = F.normalize(torch.randn(queries, width, generator=random), dim=1)
    for j, cosine in enumerate((0.7, *np.linspace(0.5, 0.75, NEAR - 1).tolist())):
        other_QE = document_CE[j : NEAR * queries : NEAR]
        other_QE -= (other_QE * query_QE).sum(1, keepdim=True) * query_QE
        other_QE.copy_(cosine * query_QE + (1 - cosine**2) ** 0.5 * F.normalize(other_QE, dim=1))
    return document_CE.numpy(), query_QE.numpy()


class Teacher:
    """Knows the vectors of "document i" and "query i" by their numbers."""

    def __init__(self, documents: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
        self.documents, self.queries = documents, queries

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        first = int(texts[0].split()[1])
        return (self.documents if task is None else self.queries)[first : first + len(texts)]


def ours(
    wanted: int,
    documents: list[str],
    queries: list[str],
    document_CE: NDArray[np.float32],
    query_QE: NDArray[np.float32],
) -> Negatives:
    examples = [Example(q, "", q, (Passage(documents[NEAR * i]),)) for i, q in enumerate(queries)]
    teacher = Teacher(document_CE, query_QE)
    # One more than the peer's range_max: it looks one rank deeper for each positive.
    mined, _ = mine(
        examples, dict(zip(documents, documents, strict=True)), teacher,
        rule="perc", margin=SHARE, negatives=wanted, depth=DEPTH + 1, task="find",
    )  # fmt: skip
    return [([p.text for p in row.negatives], list(row.negative_scores or ())) for row in mined]


class Peer:
    """As much of a SentenceTransformer as its mining asks for; it notes when the search begins and when it is over."""

    device = torch.device("cpu")
    similarity = staticmethod(dot_score)  # its default would normalise the unit vectors again in every batch

    def __init__(self, documents: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
        self.documents, self.queries = documents, queries

    def encode_document(self, texts: list[str], **_: Any) -> NDArray[np.float32]:
        return self.documents

    def encode_query(self, texts: list[str], **_: Any) -> NDArray[np.float32]:
        self.begun = time.perf_counter()
        return self.queries

    def similarity_pairwise(self, *pairs: Any) -> torch.Tensor:  # of the positives: the first thing after the search
        self.searched = time.perf_counter() - self.begun
        return pairwise_dot_score(*pairs)

    def get_embedding_dimension(self) -> int:
        return self.documents.shape[1]


def theirs(
    name: str,
    batch: int,
    wanted: int,
    documents: list[str],
    queries: list[str],
    document_CE: NDArray[np.float32],
    query_QE: NDArray[np.float32],
) -> tuple[Negatives, float]:
    """Its negatives, and the seconds of its search alone, which for faiss is filling the index too."""
    pairs = {"query": queries, "positive": [documents[NEAR * i] for i in range(len(queries))]}
    peer = Peer(document_CE, query_QE)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        mined = mine_hard_negatives(
            datasets.Dataset.from_dict(pairs), peer, corpus=documents,
            range_max=DEPTH, num_negatives=wanted, relative_margin=1 - SHARE, output_format="labeled-list",
            output_scores=True, faiss_batch_size=batch, use_faiss=name == "peer, faiss", verbose=False,
        )  # fmt: skip
    found = zip(mined["positive"], mined["scores"], strict=True)
    return [(texts[1:], scores[1:]) for texts, scores in found], peer.searched


def without(change: tuple[Any, str, Any], document_CE: NDArray[np.float32], query_QE: NDArray[np.float32]) -> None:
    """Our search without one of `PIECES`."""
    with mock.patch.object(*change):
        topk.top_k(query_QE, document_CE, DEPTH)


def product_alone(document_CE: NDArray[np.float32], query_QE: NDArray[np.float32]) -> None:
    """The matrix products of a search in float32, and nothing else. Where the processor has int8, ours multiplies in
    that, and may be faster."""
    product = onednn.linear if onednn.available() else F.linear
    documents, queries = torch.from_numpy(document_CE), torch.from_numpy(query_QE)
    for tile_NE in documents.split(4096):
        for tile_QE in queries.split(512):
            product(tile_NE, tile_QE, None)


def whole_product_alone(document_CE: NDArray[np.float32], query_QE: NDArray[np.float32]) -> None:
    """The same in int8, of numbers that are at hand: no search by a pass in int8 is faster."""
    tile_NE, tile_QE = (torch.ones(n, query_QE.shape[1], dtype=torch.int8) for n in (topk._DOCUMENTS, topk._QUERIES))
    for first in range(0, len(document_CE), len(tile_NE)):
        part_NE = tile_NE[: len(document_CE) - first]
        for query in range(0, len(query_QE), len(tile_QE)):
            onednn.int8_matmul(tile_QE[: len(query_QE) - query], part_NE)


def share_of_equal(ours: Negatives, theirs: Negatives) -> float | None:
    """The share of queries with the same negatives in the same order; others may differ in the order of scores that
    float32 rounds alike. None where a score differs by more than that, or the number of negatives does."""
    same = 0
    for (texts, scores), (their_texts, their_scores) in zip(ours, theirs, strict=True):
        if len(scores) != len(their_scores) or not np.allclose(scores, their_scores, rtol=0, atol=CLOSE):
            return None
        same += texts == their_texts
    return same / len(ours)


def equal_to_brute_force(
    scores_QK: NDArray[np.float32],
    rows_QK: NDArray[np.int64],
    document_CE: NDArray[np.float32],
    query_QE: NDArray[np.float32],
) -> bool:
    for q in range(CHECKED):
        exact_C = np.concatenate(
            [document_CE[i : i + 65536].astype(np.float64) @ query_QE[q] for i in range(0, len(document_CE), 65536)]
        ).astype(np.float32)
        rows = np.argsort(-exact_C, kind="stable")[:DEPTH]
        if not np.array_equal(rows, rows_QK[q]) or not np.array_equal(exact_C[rows], scores_QK[q]):
            return False
    return True


if __name__ == "__main__":
    main()
