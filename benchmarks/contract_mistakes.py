"""What single mistakes of the text contract cost: a model, scored on a suite as it is to be read and with each mistake.

Each mistake has been made with a real model. They live here and nowhere in the library: no recipe can ask for one.

    python benchmarks/contract_mistakes.py runs/mine/model dev-mini --out mistakes.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from embedwright.evaluation.about import about
from embedwright.evaluation.suite import Suite, evaluate, load_suite
from embedwright.files import write_json
from embedwright.model.embedder import Embedder
from embedwright.packing import pack
from embedwright.text import Contract, TokenizedText, tokenize_checked

BATCH = 32  # texts that are padded to one length, in the order given
Tokens = Callable[[TokenizedText, Contract], TokenizedText]


class Mistake(NamedTuple):
    """One way to read a text wrongly. What is not given stays right."""

    said: str
    asks: Callable[[str | None, str], str | None] = lambda task, of_queries: task
    prefix: Callable[[str], str] = lambda prefix: prefix
    tokens: Tokens = lambda text, contract: text
    pad: Callable[[TokenizedText, TokenizedText], TokenizedText] | None = None  # text and padding -> text
    other_mask: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an embedder of ours: a folder or a hub id")
    parser.add_argument("suite", help="a suite file, or the name of a packaged one")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=MISTAKES, default=[*MISTAKES], help="mistakes to make")
    options = parser.parse_args()
    model, suite = Embedder.load(options.model), load_suite(options.suite)
    found = {"right": {task.name: _score(suite, task, model) for task in suite.tasks}}
    print(f"{'':24}" + "".join(f"{name[:20]:>22}" for name in found["right"]))
    for name in ("right", *options.only):
        if name != "right":
            mistake = MISTAKES[name]
            found[name] = {t.name: _score(suite, t, Mistaken(model, mistake, t.instruction)) for t in suite.tasks}
        row = [f"{score:.4f} ({score - found['right'][task]:+.4f})" for task, score in found[name].items()]
        print(f"{name:24}" + "".join(f"{cell:>22}" for cell in row))
    said = {name: MISTAKES[name].said for name in options.only}
    facts = about(options.model, model.fingerprint())
    write_json(options.out, {"suite": suite.name, "about": facts, "mistakes": said, "scores": found})


class Mistaken:
    """An embedder that makes one mistake. `of_queries` is the instruction of the queries beside these texts."""

    def __init__(self, model: Embedder, mistake: Mistake, of_queries: str) -> None:
        self.model, self.mistake, self.of_queries = model, mistake, of_queries

    def encode(self, texts: Sequence[str], task: str | None = None) -> NDArray[np.float32]:
        model, mistake = self.model, self.mistake
        prefix = mistake.prefix(model.contract.prefix(mistake.asks(task, self.of_queries)))
        vectors = []
        with torch.inference_mode(), _mask(model, mistake.other_mask):
            for start in range(0, len(texts), BATCH):
                some = list(texts[start : start + BATCH])
                tokens = tokenize_checked(model.text_tokenizer, model.contract, some, prefix, model.max_tokens)
                tokens = [mistake.tokens(text, model.contract) for text in tokens]
                if mistake.pad is not None:
                    longest = max(len(text.ids) for text in tokens)
                    tokens = [mistake.pad(text, _padding(model, longest - len(text.ids))) for text in tokens]
                vectors.append(model.embed(pack(tokens)).cpu().numpy())
        return np.concatenate(vectors)


@contextmanager
def _mask(model: Embedder, other: bool) -> Iterator[None]:
    """Makes a bidirectional model causal within the block, or a causal one bidirectional, if `other`."""
    config = model.network.backbone.config
    right = config.is_causal
    config.is_causal = right is not other
    try:
        yield
    finally:
        config.is_causal = right


def _padding(model: Embedder, count: int) -> TokenizedText:
    pad = model.own_tokenizer.pad_token_id
    pad = model.contract.eos_id if pad is None else pad
    return TokenizedText(np.full(count, pad, np.int64), np.ones(count, bool))


def _joined(*parts: TokenizedText) -> TokenizedText:
    ids, pool = (np.concatenate(some) for some in zip(*parts, strict=True))
    return TokenizedText(ids, pool)


def _padded_after(text: TokenizedText, padding: TokenizedText) -> TokenizedText:
    return _joined(text, TokenizedText(padding.ids, ~padding.pool))


def _padded_before(text: TokenizedText, padding: TokenizedText) -> TokenizedText:
    return _joined(TokenizedText(padding.ids, ~padding.pool), text)


def _all_pooled(text: TokenizedText, contract: Contract) -> TokenizedText:
    return TokenizedText(text.ids, np.arange(len(text.ids)) >= len(contract.bos_ids))


def _without_eos(text: TokenizedText, contract: Contract) -> TokenizedText:
    ends = contract.eos_id is not None and len(text.ids) > 1 and text.ids[-1] == contract.eos_id
    return TokenizedText(text.ids[:-1], text.pool[:-1]) if ends else text


def _eos_twice(text: TokenizedText, contract: Contract) -> TokenizedText:
    return _joined(text, TokenizedText(text.ids[-1:], text.pool[-1:])) if contract.eos_id is not None else text


def _eos_unpooled(text: TokenizedText, contract: Contract) -> TokenizedText:
    others = text.pool[:-1]
    return TokenizedText(text.ids, np.append(others, False)) if contract.eos_id is not None and others.any() else text


MISTAKES = {
    "no-instruction": Mistake("queries are read as documents are", asks=lambda task, of_queries: None),
    "on-documents": Mistake("documents get the queries' instruction", asks=lambda task, of_queries: of_queries),
    "no-newline": Mistake("a space stands where the template has a newline", prefix=lambda p: p.replace("\n", " ")),
    "prefix-pooled": Mistake("the instruction's tokens are pooled, too", tokens=_all_pooled),
    "no-eos": Mistake("EOS is missing", tokens=_without_eos),
    "eos-twice": Mistake("EOS stands there twice: tokenizer and program each add it", tokens=_eos_twice),
    "eos-not-pooled": Mistake("EOS is left out of the mean", tokens=_eos_unpooled),
    "padding-read": Mistake("tokens see the padding after a text", pad=_padded_after),
    "padding-pooled": Mistake("the padding after a text is seen and pooled", pad=_joined),
    "padding-left": Mistake("tokens see the padding before a text", pad=_padded_before),
    "other-mask": Mistake("causal attention in place of bidirectional, or the other way round", other_mask=True),
}


def _score(suite: Suite, task: Any, encoder: Any) -> float:
    return evaluate(encoder, suite.model_copy(update={"tasks": (task,)})).rows[0].value


if __name__ == "__main__":
    main()
