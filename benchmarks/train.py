"""A training step, side by side with sentence-transformers on the same weights, adapters, texts and loss.

LoRA of rank 16 on all linear layers of SmolLM2-135M (its first layers), InfoNCE over 32 queries, 32 positives and 32
negatives; from texts to updated adapters. sentence-transformers' loss, mini-batch and kind of bf16 are searched first,
then both sides run A B A B: ours in one forward, and ours in no more memory than its best takes. Loss and gradients are
compared, and each side's peak memory is read in a process of its own.

    python benchmarks/train.py --dtype float32 --layers 4
"""

from __future__ import annotations

from common import (
    MB,
    SHORT,
    bind_main_thread,
    bind_threads,
    in_own_process,
    peak_during,
    ratio,
    record,
    resident,
    rounds,
    timed,
)

bind_threads()

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import batch_to_device  # noqa: E402
from texts import counter, source, text_set  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from embedwright.model.embedder import Embedder  # noqa: E402
from embedwright.processes import ALONE  # noqa: E402
from embedwright.training.batches.batch import Batch, Masks  # noqa: E402
from embedwright.training.batches.feed import local_batch  # noqa: E402
from embedwright.training.engine.optim import make_optimizer, update  # noqa: E402
from embedwright.training.engine.parallel import replicate  # noqa: E402
from embedwright.training.engine.step import accumulate  # noqa: E402
from embedwright.training.parts import OptimPart, TunePart  # noqa: E402
from embedwright.training.stages import ContrastiveStage, DataPart  # noqa: E402

MODEL = "smollm2-135m"
QUERIES, RANK, TEMPERATURE, CLIP = 32, 16, 0.05, 1.0
STAGE = ContrastiveStage(
    name="benchmark",
    data=(DataPart(path="none"),),
    in_batch_negatives="all",
    hard_negatives=1,
    temperature=TEMPERATURE,
    optim=OptimPart(lr=1e-4, steps=2, batch_queries=QUERIES),
)
RATE = 0.0  # of learning: every round has the same gradients, at the cost of any other
WHOLE = 10**6  # tokens: one forward
TEXTS = "texts.json"  # in the folder with the models
BUDGETS = (8192, 6144, 4096, 3072, 2560, 2048, 1792, 1536, 1280, 1024, 768, 512)  # batch_tokens, for equal memory
MINI_BATCHES = (0, 4, 8, 16, 32)  # of the cached loss; 0 is the plain one
# sentence-transformers' ways to compute: type of the frozen weights, of the adapters, and of autocast
KINDS = {
    "float32": {"float32": ("float32", "float32", None)},
    "bfloat16": {
        "bf16 weights, float32 adapters, autocast": ("bfloat16", "float32", torch.bfloat16),
        "float32 weights, autocast": ("float32", "float32", torch.bfloat16),
        "all bf16": ("bfloat16", "bfloat16", None),
    },
}
LARGEST_DIFFERENCE = 1e-4  # relative, of the float32 gradients of the two sides
Gradients = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(KINDS), help="without it, both, one after the other")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=("ours", "peer"), help="measure a side's memory and print it: internal")
    parser.add_argument("--folder", type=Path, help="with the models of both sides: internal")
    parser.add_argument("--batch", type=int, help="of --memory-of: our batch_tokens, or the peer's mini-batch")
    parser.add_argument("--kind", help="of --memory-of peer")
    options = parser.parse_args()
    bind_main_thread()
    if options.memory_of:
        print(json.dumps(memory(options)))
        return
    if not models.installed(MODEL):
        print(f"{MODEL}: its package is not installed, left out")
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        opened(options.layers, "float32").save(options.folder / "peer")
        for dtype in (options.dtype,) if options.dtype else tuple(KINDS):
            options.dtype = dtype
            figures, goals = measure(options)
            record(f"train-{dtype}-{options.layers}-layers", figures, goals)


def measure(options: argparse.Namespace) -> models.Measured:
    mine = Ours(options.layers, options.dtype)
    texts = triples(mine.model)
    (options.folder / TEXTS).write_text(json.dumps(texts))
    compared = compare(options, mine, texts)
    kind, mini_batch, search = best_setting(options, texts)
    peer = Peer(options.folder, options.dtype, kind, mini_batch)
    memory_mb = {"peer": _memory(options, "peer", mini_batch, kind), "ours": _memory(options, "ours", WHOLE)}
    budget, memory_mb["ours_equal"] = equal_memory(options, memory_mb["peer"]["peak_mb"])
    runs = {
        "peer": lambda: peer.step(texts),
        "ours": lambda: mine.step(texts, WHOLE),
        "ours_equal": lambda: mine.step(texts, budget),
    }
    rounds(runs, 1)  # warms up
    seconds = rounds(runs, options.rounds)
    ratios = {name: ratio(seconds["peer"], seconds[name]) for name in ("ours", "ours_equal")}
    figures = {
        "model": f"{models.described(MODEL)}, {options.layers} layers, LoRA of rank {RANK} on all linear layers",
        "dtype": options.dtype,
        "texts": source(),
        "tokens": mine.tokens,
        "peer_setting": {"kind": kind, "mini_batch": mini_batch},
        "peer_search_seconds": search,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "ratio": ratios,
        "batch_tokens_at_equal_memory": budget,
        "memory": memory_mb,
        **compared,
    }
    show(figures)
    kind_of = SHORT[options.dtype]
    about = f"{MODEL}, {options.layers} layers"
    goals = {f"train_{kind_of}": [{"of": about, "value": ratios["ours"]["median"]}]}
    if kind_of == "bf16":
        goals["train_bf16_equal_memory"] = [{"of": about, "value": ratios["ours_equal"]["median"]}]
    return figures, goals


def show(figures: dict[str, Any]) -> None:
    setting = figures["peer_setting"]
    print(f"{figures['model']}, {figures['dtype']}, {figures['tokens']} tokens; ST at its best: {setting}")
    for name, seconds in figures["median_seconds"].items():
        gain = figures["ratio"].get(name, {}).get("median", 1.0)
        print(f"{name:>12} {seconds:7.2f} s  {gain:5.2f}x  {figures['memory'][name]['peak_mb']:6.0f} MB")
    print({name: value for name, value in figures.items() if "difference" in name})


# ---- texts and adapters, the same on both sides


def triples(model: Embedder, count: int = QUERIES) -> tuple[list[str], list[str], list[str]]:
    """So many queries, their passages, and passages of others."""
    mixed, _ = text_set("mixed", 4 * count * 128, counter(model))
    queries, passages = mixed[0::2], mixed[1::2]
    return queries[:count], passages[:count], passages[count : 2 * count]


@torch.no_grad()
def fill_adapters(named: dict[str, nn.Parameter]) -> None:
    """Values that depend on the name and on nothing else; B adds a few percent of what the weights give."""
    for name, parameter in sorted(named.items()):
        random = torch.Generator().manual_seed(sum(name.encode()))
        scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
        parameter.copy_(scale * torch.randn(parameter.shape, generator=random))


def adapters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def gradients(backbone: nn.Module) -> Gradients:
    found = {n: p.grad.float().clone() for n, p in adapters(backbone).items() if p.grad is not None}
    backbone.zero_grad(set_to_none=True)
    return found


def difference(a: Gradients, b: Gradients) -> float:
    """Relative, of all gradients together."""
    assert a.keys() == b.keys() and a
    return (sum(float((a[n] - b[n]).square().sum()) for n in b) / sum(float(b[n].square().sum()) for n in b)) ** 0.5


# ---- the two sides


def opened(layers: int | None, dtype: str, device: str = "cpu") -> Embedder:
    return Embedder.from_decoder(MODEL, pooling="mean", layers=layers, dtype=dtype, device=device)


class Ours:
    def __init__(self, layers: int | None, dtype: str, device: str = "cpu") -> None:
        self.model = opened(layers, dtype, device)
        network = self.model.network
        network.mixed = dtype == "bfloat16"
        self.model.add_lora(RANK, 2 * RANK)
        network.train()
        self.backbone = network.backbone
        fill_adapters(adapters(self.backbone))
        self.optimizer = make_optimizer(network, TunePart(), STAGE.optim)
        self.replica = replicate(ALONE, network)
        self.tokens = 0

    def backward(self, texts: tuple[list[str], ...], batch_tokens: int) -> float:
        queries, *passages = texts
        candidates = [("", text) for column in passages for text in column]
        count, rows = len(queries), np.arange(len(queries))
        allowed_QC = np.ones((count, len(candidates)), dtype=bool)
        allowed_QC[rows, rows] = False
        own_QC = np.zeros_like(allowed_QC)
        for first in range(count, len(candidates), count):
            own_QC[rows, first + rows] = True
        ids = [str(row) for row in rows]
        batch = Batch([("", text) for text in queries], candidates, ids, Masks(rows, allowed_QC, own_QC))
        local = local_batch(batch, self.model.text_tokenizer, self.model.contract, ALONE)
        loss, self.tokens = accumulate(self.replica, local, STAGE, batch_tokens=batch_tokens, seed=0)
        return loss

    def step(self, texts: tuple[list[str], ...], batch_tokens: int) -> None:
        self.backward(texts, batch_tokens)
        update(self.model.network, self.optimizer, RATE, CLIP)


class Peer:
    """As its Trainer does it: autocast around the model's forward and not the loss, AdamW, gradients clipped."""

    def __init__(self, folder: Path, dtype: str, kind: str, mini_batch: int, device: str = "cpu") -> None:
        weights, adapter, autocast = KINDS[dtype][kind]
        self.model = models.peer(folder, weights, device)
        self.backbone = self.model[0].model
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        self.model.add_adapter(config)
        for parameter in adapters(self.backbone).values():
            parameter.data = parameter.data.to(getattr(torch, adapter))
        fill_adapters(adapters(self.backbone))
        self.model.train()
        if autocast is not None:
            self.model.forward = torch.autocast(device, autocast)(self.model.forward)
        self.use(mini_batch)
        self.optimizer = torch.optim.AdamW(adapters(self.backbone).values(), lr=RATE, fused=True)

    def use(self, mini_batch: int) -> None:
        scale = 1 / TEMPERATURE
        self.loss = (
            CachedMultipleNegativesRankingLoss(self.model, scale=scale, mini_batch_size=mini_batch)
            if mini_batch
            else MultipleNegativesRankingLoss(self.model, scale=scale)
        )

    def backward(self, texts: tuple[list[str], ...]) -> float:
        columns = [batch_to_device(self.model.preprocess(column), self.model.device) for column in texts]
        loss = self.loss(columns, None)
        loss.backward()
        return float(loss)

    def step(self, texts: tuple[list[str], ...]) -> None:
        self.backward(texts)
        torch.nn.utils.clip_grad_norm_(adapters(self.backbone).values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# ---- what is compared


def compare(options: argparse.Namespace, mine: Ours, texts: tuple[list[str], ...]) -> dict[str, Any]:
    """Losses, and relative differences of gradients: of the two sides in float32, else of each to our float32."""
    exact = mine if options.dtype == "float32" else Ours(options.layers, "float32")
    losses = {"float32": exact.backward(texts, WHOLE)}
    reference = gradients(exact.backbone)
    found = {}
    for kind in KINDS[options.dtype]:
        peer = Peer(options.folder, options.dtype, kind, 8)
        losses[f"peer, {kind}"] = peer.backward(texts)
        found[f"peer, {kind}"] = difference(gradients(peer.backbone), reference)
    for name, budget in {"ours": WHOLE, "ours in parts": 1024}.items():
        losses[name] = mine.backward(texts, budget)
        found[name] = difference(gradients(mine.backbone), reference)
    if options.dtype == "float32" and not max(found.values()) < LARGEST_DIFFERENCE:
        raise SystemExit(f"gradients differ: {found}")
    return {"losses": losses, "gradient_difference_to_float32": found}


def best_setting(options: argparse.Namespace, texts: tuple[list[str], ...]) -> tuple[str, int, dict[str, float]]:
    """The peer's fastest kind and mini-batch, and the seconds of all: each once, its kind warmed up."""
    seconds: dict[tuple[str, int], float] = {}
    for kind in KINDS[options.dtype]:
        peer = Peer(options.folder, options.dtype, kind, 8)
        peer.step(texts)
        for mini_batch in MINI_BATCHES:
            peer.use(mini_batch)
            seconds[kind, mini_batch] = timed(lambda peer=peer: peer.step(texts))
    kind, mini_batch = min(seconds, key=lambda setting: seconds[setting])
    return kind, mini_batch, {f"{k}, {m or 'plain'}": s for (k, m), s in seconds.items()}


# ---- memory


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Of one side alone, in megabytes: `step_mb` is what two steps add at their peak to the loaded model, `peak_mb`
    model and step together."""
    texts = json.loads((options.folder / TEXTS).read_text())  # no model of ours is opened on the peer's side
    libraries = resident()
    run: Callable[[], None]
    if options.memory_of == "ours":
        mine = Ours(options.layers, options.dtype)
        run = lambda: mine.step(texts, options.batch)  # noqa: E731
    else:
        peer = Peer(options.folder, options.dtype, options.kind, options.batch)
        run = lambda: peer.step(texts)  # noqa: E731
    loaded = resident()
    peak = max(peak_during(run) for _ in range(2))
    return {"batch": options.batch, "step_mb": (peak - loaded) / MB, "peak_mb": (peak - libraries) / MB}


def _memory(options: argparse.Namespace, side: str, batch: int, kind: str = "") -> dict[str, Any]:
    named = {"dtype": options.dtype, "layers": options.layers, "folder": options.folder}
    named |= {"memory-of": side, "batch": batch, "kind": kind}
    return in_own_process([part for name, value in named.items() for part in (f"--{name}", str(value))])


def equal_memory(options: argparse.Namespace, most: float) -> tuple[int, dict[str, Any]]:
    """Our largest `batch_tokens` whose peak is not above `most` megabytes, and its memory."""
    for budget in BUDGETS:
        found = _memory(options, "ours", budget)
        if found["peak_mb"] <= most:
            return budget, found
    raise SystemExit(f"no batch_tokens of {BUDGETS} stays below {most:.0f} MB")


if __name__ == "__main__":
    main()
