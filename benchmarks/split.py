"""What each part of our encode contributes, the best `batch_tokens`, and where the time goes: SmolLM2-135M.

Parts are taken out here alone, on a loaded model. Each round runs every step, from sentence-transformers to us, and all
that is shipped without each of its pieces alone.

    python benchmarks/split.py --dtype float32
"""

from __future__ import annotations

from common import SHORT, bind_main_thread, bind_threads, own_seconds, ratio, record, rounds

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import models  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from texts import SETS, counter, source, text_set  # noqa: E402
from torch import nn  # noqa: E402

from embedwright.cpu import kernels  # noqa: E402
from embedwright.model import attention, embedder  # noqa: E402
from embedwright.model.embedder import Embedder  # noqa: E402
from embedwright.model.quantized import QuantizedLinear  # noqa: E402
from embedwright.packing import PackedTexts, pack  # noqa: E402
from embedwright.text import TokenizedText  # noqa: E402

MODEL = "smollm2-135m"
SPLIT = ("queries", "mixed")
BATCH_TOKENS = (512, 1024, 2048, 4096, 8192)
PARTS = ("linears", "attention", "norms", "activation", "rotary and layout", "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=(*SHORT, "int8"), default="float32")
    parser.add_argument("--tokens", type=int, default=4000, help="of each text set")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bind_main_thread()
    with tempfile.TemporaryDirectory() as folder:
        models.make_folders(MODEL, Path(folder))
        mine = models.ours(Path(folder), options.dtype)
        peer = models.peer(Path(folder), "bfloat16" if options.dtype == "int8" else options.dtype)
    sets = {name: text_set(name, options.tokens, counter(mine)) for name in SETS}
    longer, _ = text_set("mixed", 3 * options.tokens, counter(mine))
    figures: dict[str, Any] = {
        "contributions": {name: contributions(mine, peer, *sets[name], options.rounds) for name in SPLIT},
        "batch_tokens": by_batch_tokens(mine, longer, options.rounds),
        "profile": {name: profile(mine, *sets[name]) for name in SETS},
    }
    for name, found in figures.items():
        print(name, json.dumps(found), flush=True)
    about = {"model": models.described(MODEL), "dtype": options.dtype, "texts": source()}
    record(f"split-{options.dtype}", {**about, **figures}, {})


# ---- contributions


def contributions(
    mine: Embedder, peer: SentenceTransformer, texts: list[str], prefix: str | None, count: int
) -> dict[str, Any]:
    """Seconds of four steps from sentence-transformers to us, each with one part more, and each one's ratio to the
    step before it: `packed` (stock linears, the fused attention text by text), `linears` (its own, and equal lengths as
    one batch: what runs without a compiler), `ours` (kernels: all that is shipped). `alone`: how much slower it is
    without each of `PIECES`."""

    def run(*changes: Callable[[Embedder], Any]) -> None:
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change(mine))
            mine.encode(texts, prefix=prefix)

    batch, _ = models.best_batch(partial(models.encode_peer, peer), texts, prefix)
    run()
    steps: dict[str, Callable[[], Any]] = {
        "peer": lambda: models.encode_peer(peer, texts, prefix, batch),
        "packed": lambda: run(stock_linears, text_by_text, without_kernels),
        "linears": lambda: run(without_kernels),
        "ours": run,
    }
    pieces = dict(PIECES)
    if any(isinstance(part, QuantizedLinear) for part in mine.network.modules()):
        del steps["packed"], steps["linears"], pieces[PRODUCTS]  # which would multiply dequantised weights
    without = {piece: partial(run, change) for piece, change in pieces.items()}
    seconds = rounds(steps | without, count)
    return {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "gains": {after: ratio(seconds[before], seconds[after]) for before, after in pairwise(steps)},
        "alone": {piece: ratio(seconds[piece], seconds["ours"]) for piece in pieces},
    }


@contextmanager
def as_stock(model: Embedder, ending: str) -> Iterator[None]:
    """The stock class in place of each faster form, for stock classes whose names end so."""
    forms = {part: type(part) for part in model.network.modules() if "stock_class" in vars(type(part))}
    stock = {part: vars(form)["stock_class"] for part, form in forms.items()}
    changed = [part for part in forms if stock[part].__name__.endswith(ending)]
    for part in changed:
        part.__class__ = stock[part]
    try:
        yield
    finally:
        for part in changed:
            part.__class__ = forms[part]


stock_linears = partial(as_stock, ending="Linear")


@contextmanager
def without_kernels(model: Embedder) -> Iterator[None]:
    with mock.patch.object(kernels, "available", lambda: False):
        yield


@contextmanager
def text_by_text(model: Embedder) -> Iterator[None]:
    """torch's fused kernel, called once for every text."""

    def pack_singly(texts: Sequence[TokenizedText]) -> PackedTexts:
        packed = pack(texts)
        return replace(packed, runs=tuple((1, len(text.ids)) for text in texts))

    with mock.patch.object(embedder, "pack", pack_singly):
        yield


PRODUCTS = "products and gated blocks (linears.py, onednn.py)"
# each without what stands or falls with it alone; gated blocks need our products
PIECES: dict[str, Callable[[Embedder], Any]] = {
    "attention (csrc/attention.c)": lambda _: mock.patch.object(kernels, "can_attend", lambda *_: False),
    "norms (csrc/passes.c)": partial(as_stock, ending="Norm"),
    "rotary positions (csrc/passes.c)": partial(as_stock, ending="Attention"),
    "gated blocks (linears.py)": partial(as_stock, ending="MLP"),
    PRODUCTS: stock_linears,
}


# ---- tokens per batch


def by_batch_tokens(mine: Embedder, texts: list[str], count: int) -> dict[str, float]:
    """Tokens per second by `batch_tokens`, median of the rounds."""
    tokens = len(mine.tokenize(texts).ids_T)
    runs = {str(batch): lambda batch=batch: mine.encode(texts, batch_tokens=batch) for batch in BATCH_TOKENS}
    return {batch: tokens / statistics.median(seconds) for batch, seconds in rounds(runs, count).items()}


# ---- where the time goes


def profile(model: Embedder, texts: list[str], prefix: str | None) -> dict[str, float]:
    """Share of each of `PARTS` in the time of `encode`: the time inside modules of a kind, without that of others in
    them. `rest` is tokenisation, embedding lookup, residual sums and pooling."""
    model.encode(texts, prefix=prefix)
    named = model.network.backbone.named_modules()
    kinds = {type(module): part for name, module in named if (part := _part(name, module)) is not None}
    # in their classes: hooks would keep blocks from their faster forms
    parts = [*((kind, "forward", part) for kind, part in kinds.items()), (attention, "attend", "attention")]
    seconds = own_seconds(lambda: model.encode(texts, prefix=prefix), parts, "rest")
    return {part: seconds[part] / sum(seconds.values()) for part in PARTS}


def _part(name: str, module: nn.Module) -> str | None:
    """What the own time of a module counts as: known by transformers' names, which all families share."""
    last = name.rsplit(".", 1)[-1]
    if isinstance(module, nn.Linear | QuantizedLinear):
        return "linears"
    if last.endswith("norm"):
        return "norms"
    if last == "mlp":
        return "activation"  # with the product of gate and up
    if last in ("self_attn", "rotary_emb"):
        return "rotary and layout"
    return None


if __name__ == "__main__":
    main()
