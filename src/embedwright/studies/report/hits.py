"""Example queries of the report: what a run's model finds for a few queries of a retrieval set."""

from __future__ import annotations

from typing import Any

import numpy as np

from embedwright.data.files.beir import read_beir
from embedwright.encoders.protocol import Encoder, encode_finite, task_for
from embedwright.evaluation.tasks import SuiteTask, split_of

QUERIES = 8
HITS = 5
DOCUMENTS = 5_000  # of a larger corpus, the right ones and a random draw: the report is no evaluation
SHOWN = 160  # characters of a text
SEED = 0


def example_hits(encoder: Encoder, task: SuiteTask) -> dict[str, Any]:
    """Returns a few queries of a retrieval task, drawn at random, each with its best hits and its right documents.

    The instruction goes on queries alone. Raises InputError if the data cannot be read.
    """
    beir = read_beir(task.path, split_of(task.path))
    random = np.random.default_rng(SEED)
    own_id = task.ignore_identical_ids
    right = {
        query: {document for document, score in judged.items() if score > 0 and not (own_id and document == query)}
        for query, judged in beir.qrels.items()
    }
    judged = [query for query in beir.queries if right.get(query)]
    queries = [judged[i] for i in np.sort(random.permutation(len(judged))[:QUERIES])]
    ids = list(beir.corpus)
    if len(ids) > DOCUMENTS:
        drawn = {ids[i] for i in random.permutation(len(ids))[:DOCUMENTS]}.union(*(right[query] for query in queries))
        ids = [document for document in ids if document in drawn]
    instruction = task_for(encoder, task.instruction)
    query_QE = encode_finite(encoder, [beir.queries[query] for query in queries], instruction)
    corpus_CE = encode_finite(encoder, [beir.corpus[document] for document in ids])
    examples = []
    for query, scores_C in zip(queries, query_QE @ corpus_CE.T, strict=True):
        order = [c for c in np.argsort(-scores_C, kind="stable") if not (own_id and ids[c] == query)]
        shown = [(rank, c) for rank, c in enumerate(order, start=1) if rank <= HITS or ids[c] in right[query]]
        hits = [
            {
                "rank": rank,
                "score": scores_C[c],
                "right": ids[c] in right[query],
                "text": shortened(beir.corpus[ids[c]]),
            }
            for rank, c in shown[: 2 * HITS]
        ]
        first = min(rank for rank, c in enumerate(order, start=1) if ids[c] in right[query])
        examples.append({"query": shortened(beir.queries[query]), "first": first, "hits": hits})
    whole = len(ids) == len(beir.corpus)
    return {
        "task": task.name,
        "instruction": instruction,
        "documents": f"{len(ids):,} documents" if whole else f"{len(ids):,} of {len(beir.corpus):,} documents",
        "queries": len(judged),
        "examples": examples,
    }


def shortened(text: str, length: int = SHOWN) -> str:
    """Returns the text in one line, cut after so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
