"""Labels to triples, cleaned, as Parquet, trained on by sentence-transformers itself, in a few seconds.

Run it: .venv/bin/python examples/train_in_sentence_transformers.py

The labelled texts are docstrings of the standard library, the label is the module. `label_triples` makes a triple of
each text (NV-Embed's example-based form), `clean` removes repeats, `export` writes the columns that the trainer of
sentence-transformers reads: anchor, positive, negative_1, ... The model is a tiny bag of words with random weights.
"""

import ast
import importlib.util
import inspect
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from embedwright.data.clean.clean import Report, clean
from embedwright.data.export import export
from embedwright.data.labels import label_triples
from embedwright.data.tables.table import write_examples

MODULES = ["argparse", "datetime", "logging", "pathlib", "shutil", "statistics", "tarfile", "threading", "zipfile"]
NEGATIVES = 3


def docstrings(module: str) -> Iterator[str]:
    """First paragraphs of the docstrings of a module; nothing is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the standard library has no source for {module}")
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
            if len(text) > 20:
                yield " ".join(text.split())


def tiny_model(texts: list[str]) -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=["<unk>"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")


def main() -> None:
    rows = [(text, module) for module in MODULES for text in docstrings(module)]
    triples, _ = label_triples(rows, task="modules", negatives=NEGATIVES, seed=1)
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_examples(folder / "triples.jsonl", clean(triples, report, by="query"))
        print("cleaned:", json.dumps(report.to_json()))
        counts = export(folder / "triples.jsonl", folder / "triples.parquet", negatives=NEGATIVES)
        print("exported:", json.dumps(counts))
        data = load_dataset(
            "parquet", data_files=str(folder / "triples.parquet"), split="train", cache_dir=str(folder / "cache")
        )
        print("columns:", ", ".join(data.column_names))

        model = tiny_model([text for text, _ in rows])
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(folder / "run"),
                num_train_epochs=5,
                per_device_train_batch_size=32,
                learning_rate=0.05,
                batch_sampler=BatchSamplers.NO_DUPLICATES,  # a text twice in a batch would be its own negative
                prompts={"anchor": "Identify the module of a docstring: "},
                logging_strategy="epoch",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss of the first epoch {float(losses[0]):.2f}, of the last {float(losses[-1]):.2f}")
    if float(losses[-1]) >= float(losses[0]):
        raise SystemExit("it has learnt nothing")


if __name__ == "__main__":
    main()
