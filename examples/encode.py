"""Encode queries and passages with the packaged SmolLM2 and print how well each query fits each passage.

Run it: .venv/bin/python examples/encode.py

The model is a fresh one: its pooling is still the identity, so this is what the decoder knows before any training.
`embedwright train` makes the numbers on the diagonal stand out; the calls stay the same.
"""

from embedwright import Embedder

QUERIES = ["how do tides work?", "who wrote the first computer program?", "why is bread dough kneaded?"]
PASSAGES = [
    "Tides are the rise and fall of sea levels caused by the gravity of the moon and the sun.",
    "Ada Lovelace published an algorithm for the Analytical Engine in 1843.",
    "Kneading aligns the gluten of the flour, so that the dough holds the gas that yeast makes.",
]


def main() -> None:
    model = Embedder.from_decoder("smollm2-135m", layers=6, max_tokens=128)

    # Queries come with an instruction, passages without. The vectors have length 1: a product is a cosine.
    query_QE = model.encode(QUERIES, task="Given a question, retrieve passages that answer it")
    passage_NE = model.encode(PASSAGES)
    score_QN = query_QE @ passage_NE.T

    print(f"{len(QUERIES)} queries x {len(PASSAGES)} passages, {model.embedding_dim} dimensions")
    for number, passage in enumerate(PASSAGES):
        print(f"  [{number}] {passage}")
    print(" " * 40, *(f"[{number}]".rjust(6) for number in range(len(PASSAGES))))
    for query, score_N in zip(QUERIES, score_QN, strict=True):
        print(query.ljust(40), *(f"{score:6.3f}" for score in score_N))


if __name__ == "__main__":
    main()
