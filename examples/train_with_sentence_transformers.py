"""Train an Embedder with the trainer of sentence-transformers: the same weights under both names, in half a minute.

Run it: .venv/bin/python examples/train_with_sentence_transformers.py

The model is the first four layers of SmolLM2 with latent attention and LoRA; the data are pairs of (name, docstring)
of the standard library. What the trainer moves is this model: no copy is made, and `encode` shows it.
"""

import ast
import importlib.util
import inspect
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

from embedwright import Embedder

MODULES = ["argparse", "datetime", "logging", "shutil", "statistics", "subprocess", "tarfile", "threading", "zipfile"]
TASK = "Given what a Python function is called, retrieve its documentation"
HOLD_OUT = 9  # every ninth pair


def docstrings(module: str) -> Iterator[tuple[str, str]]:
    """(name in words, first paragraph of the docstring) of functions and classes; nothing is imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the standard library has no source for {module}")
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
            if len(text) > 20:
                yield f"{module} {node.name.replace('_', ' ')}", " ".join(text.split())


def found(model: Embedder, pairs: list[tuple[str, str]]) -> float:
    """How many names have their own docstring nearest, of these."""
    names, texts = zip(*pairs, strict=True)
    score_QC = model.encode(names, task=TASK) @ model.encode(texts).T
    return float((score_QC.argmax(axis=1) == range(len(pairs))).mean())


def main() -> None:
    pairs = list({text: (name, text) for module in MODULES for name, text in docstrings(module)}.values())
    torch.manual_seed(0)  # adapters start from random numbers
    held_out = pairs[::HOLD_OUT]
    train = [pair for pair in pairs if pair not in held_out]
    model = Embedder.from_decoder("smollm2-135m", layers=4, latents=32, heads=4, multiple=1, max_tokens=64)
    model.add_lora(rank=8, alpha=16)
    before = found(model, held_out)

    st = model.to_sentence_transformer()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=st,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                max_steps=20,
                per_device_train_batch_size=16,
                learning_rate=1e-3,
                warmup_steps=2,
                prompts={"anchor": model.contract.prefix(TASK)},  # documents have none
                batch_sampler=BatchSamplers.NO_DUPLICATES,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"anchor": [n for n, _ in train], "positive": [t for _, t in train]}),
            loss=MultipleNegativesRankingLoss(st, scale=50.0),
        )
        trainer.train()

    print(f"{len(train)} pairs; docstring found first, of {len(held_out)} held out: {before:.0%} before, ", end="")
    print(f"{found(model, held_out):.0%} after")
    names = [name for name, _ in held_out[:2]]
    theirs = st.encode(names, prompt=model.contract.prefix(TASK))
    print(f"largest difference from sentence-transformers: {abs(theirs - model.encode(names, task=TASK)).max():.1e}")
    if found(model, held_out) <= before:
        raise SystemExit("it has learnt nothing")


if __name__ == "__main__":
    main()
