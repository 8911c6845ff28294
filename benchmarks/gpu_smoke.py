"""One GPU: the attention kernel, packed = one text at a time, gradients; encode and training step against
sentence-transformers, in bfloat16. Writes results/gpu.json. Exits 1 where a check fails, 2 where there is no CUDA.

    python benchmarks/gpu_smoke.py
"""

from __future__ import annotations

from common import MB, bind_threads, ratio, record, rounds

bind_threads()

import argparse  # noqa: E402
import gc  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from contextlib import suppress  # noqa: E402
from functools import partial  # noqa: E402
from itertools import product  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402
from encode import least_cosine  # noqa: E402
from gpu_profile import compiled, profile  # noqa: E402
from peaks import flops  # noqa: E402
from texts import counter, source, text_set  # noqa: E402
from torch import Tensor  # noqa: E402

from embedwright.cpu.accelerate import stock  # noqa: E402
from embedwright.model.attention import attend  # noqa: E402
from embedwright.model.embedder import Embedder  # noqa: E402
from embedwright.model.pooling import PoolingConfig, make_head, pool_tokens  # noqa: E402
from embedwright.packing import pack  # noqa: E402
from embedwright.text import TokenizedText  # noqa: E402

MODELS = ("smollm2-135m", "qwen3-0.6b-shape")  # encode; the first one trains
# Of a check at most. Vectors have unit length; gradients are compared by norm.
TOLERANCES = {
    "attention kernel, bfloat16 to float32": 1e-2,
    "its gradients": 1e-2,
    "packed to single, float32": 1e-4,
    "packed to single, bfloat16": 2e-2,
    "gradients to stock sdpa's, float32": 5e-4,
    "latent pooling twice, float32": 0.0,
    "its products in bfloat16": 1e-2,
}
ALIKE = 5e-3  # relative, of the losses of both sides, in bfloat16
NO_WORSE = 1.1  # times sentence-transformers' own distance from float32, in bfloat16
CHECK_TOKENS = 2000
QUERIES = 64  # of a training step, each with a passage and a negative
PART = 4096  # tokens of it at a time, where it is not one forward
SIZES = (0, 16, 64)  # mini-batches of the peer's cached loss; 0 is the plain one
BATCHES = (16_384, 32_768, 65_536)  # batch_tokens of encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="of the timed texts")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-smoke: torch sees no CUDA device, nothing was measured", file=sys.stderr)
        sys.exit(2)
    torch.backends.cuda.matmul.allow_tf32 = False
    figures: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "texts": source(),
        "checks": {},
        "peak_flops": peak_flops(),
        "encode": {},
    }
    wrong = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            models.make_folders(name, Path(folder))
            exact = models.ours(Path(folder), "float32", "cuda")
            if not figures["checks"]:
                figures["checks"] = checks(exact, models.ours(Path(folder), "bfloat16", "cuda"))
                print(json.dumps(figures["checks"]), flush=True)
                wrong += [what for what, seen in figures["checks"].items() if not seen <= TOLERANCES[what]]
            found = encode(name, Path(folder), exact, options, figures["peak_flops"])
            print(json.dumps(found), flush=True)
            far = {side: 1 - of["cosine"] for side, of in found["sides"].items()}
            wrong += [f"{name}, bfloat16"] if not far["ours"] <= NO_WORSE * far["sdpa"] else []
            figures["encode"][models.described(name)] = found
            record("gpu", {"cut_off_behind": f"encode of {name}", **figures}, {})  # a run that is cut off keeps this
            del exact
            if name == MODELS[0]:
                figures["train"] = training(Path(folder), options.rounds)
                print(json.dumps(figures["train"]), flush=True)
                losses = figures["train"]["losses"].values()
                wrong += ["losses"] if not max(losses) <= (1 + ALIKE) * min(losses) else []
                record("gpu", {"cut_off_behind": f"training of {name}", **figures}, {})
    record("gpu", figures, {})
    if wrong:
        sys.exit(f"gpu-smoke: {', '.join(wrong)} out of tolerance")


# ---- equality


def checks(exact: Embedder, low: Embedder) -> dict[str, float]:
    """The largest difference of each kind, by the names of TOLERANCES; infinite where something is not finite."""
    forward, backward = attention()
    found = [forward, backward, packed_to_single(exact), packed_to_single(low), gradients(exact), *latent_pooling()]
    return {
        name: float(np.nan_to_num(seen, nan=np.inf)) for name, seen in zip(TOLERANCES, map(float, found), strict=True)
    }


def attention() -> tuple[float, float]:
    """torch's varlen kernel against the path by runs of equal length in float32, which CPUs test: of outputs, and of
    the gradients of queries, keys and values at once, the largest over masks, windows and groupings of heads."""
    random = torch.Generator("cuda").manual_seed(0)
    lengths = [700, 350, 350, 64, 64, 64, 17, 1, 1]
    packed = pack([TokenizedText(np.zeros(n, np.int64), np.ones(n, bool)) for n in lengths]).to("cuda")
    outputs, slopes = [0.0], [0.0]
    for (heads, kv_heads, dim), causal, window in product(
        ((9, 3, 64), (8, 8, 128), (16, 8, 128), (4, 1, 256)), (False, True), (None, 1, 100)
    ):
        shapes = [(n, sum(lengths), dim) for n in (heads, kv_heads, kv_heads)]
        exact = [torch.randn(shape, generator=random, device="cuda").bfloat16().float() for shape in shapes]
        wanted = torch.randn(sum(lengths), heads, dim, generator=random, device="cuda").bfloat16()
        by_type = []
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [x.to(dtype).requires_grad_() for x in exact]
            out = attend(*qkv, packed, causal, dim**-0.5, window)
            by_type.append([out, *torch.autograd.grad(out, qkv, wanted.to(dtype))])
        (out_b, *grads_b), (out_a, *grads_a) = by_type
        outputs.append(relative([out_a], [out_b]))
        slopes.append(relative(grads_a, grads_b))
    return max(outputs), max(slopes)


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The norm of the difference of all together, over that of `exact`."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(found, exact, strict=True)]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


def packed_to_single(model: Embedder) -> float:
    """Largest difference between vectors of texts that were encoded together and each alone, of their length."""
    texts, _ = text_set("mixed", CHECK_TOKENS, counter(model))
    alone_NE = np.concatenate([model.encode([text]) for text in texts])
    return float(np.linalg.norm(model.encode(texts) - alone_NE, axis=1).max())


def gradients(model: Embedder) -> float:
    """Difference to the stock sdpa path's gradients of all weights, relative."""
    texts, _ = text_set("mixed", CHECK_TOKENS, counter(model))
    ours = _gradients(model, texts)
    with stock(model.network) as twin:
        return relative(ours, _gradients(Embedder(twin, model.tokenizer), texts))


def _gradients(model: Embedder, texts: list[str]) -> list[Tensor]:
    weights = list(model.network.backbone.parameters())
    vectors_NE = model.embed(model.tokenize(texts))
    wanted_NE = torch.randn(vectors_NE.shape, generator=torch.Generator().manual_seed(0)).to(vectors_NE.device)
    return list(torch.autograd.grad((vectors_NE * wanted_NE).sum(), weights))


def latent_pooling() -> tuple[float, float]:
    """Vectors and gradients of the pooling block at NV-Embed's head width, which no fused kernel takes: the difference
    of two equal runs, and that of bfloat16 products to float32."""
    random = torch.Generator("cuda").manual_seed(0)
    lengths = [700, 350, 350, 64, 17, 1]
    packed = pack([TokenizedText(np.zeros(n, np.int64), np.ones(n, bool)) for n in lengths]).to("cuda")
    head = make_head(PoolingConfig(heads=2, head_dim=4096), 1024).cuda()
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=random)
    states_TD = torch.randn(sum(lengths), 1024, generator=random, device="cuda")
    wanted_ND = torch.randn(len(lengths), 1024, generator=random, device="cuda")

    def run(low: bool) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            tokens_TD = head(states_TD, packed)
        vectors_NE = torch.nn.functional.normalize(pool_tokens(tokens_TD, packed, "latent"), dim=-1)
        return [vectors_NE, *torch.autograd.grad((vectors_NE * wanted_ND).sum(), list(head.parameters()))]

    exact = run(False)
    return relative(run(False), exact), relative(run(True)[:1], exact[:1])


# ---- speed


def encode(name: str, folder: Path, exact: Embedder, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """bfloat16, mixed texts: us, sentence-transformers with sdpa, and with flash attention where that is installed."""
    texts, _ = text_set("mixed", options.tokens, counter(exact))
    packed = exact.tokenize(texts)
    total = len(packed.ids_T)
    reference = exact.encode(texts)
    mine = models.ours(folder, "bfloat16", "cuda")
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: mine.encode(texts)}
    batches = {}
    for kind in ["sdpa"] + (["flash_attention_2"] if importlib.util.find_spec("flash_attn") else []):
        peer = models.peer(folder, "bfloat16", "cuda", kind)
        peer[0].unpad_inputs = kind != "sdpa"  # its own unpadding, which needs flash attention
        batches[kind], _ = models.best_batch(partial(models.encode_peer, peer), texts, None, first=256)
        runs[kind] = lambda peer=peer, kind=kind: models.encode_peer(peer, texts, None, batches[kind])
    rounds(runs, 1)  # warms up
    seconds = rounds(runs, options.rounds)
    by_batch = {size: (lambda size=size: mine.encode(texts, batch_tokens=size)) for size in BATCHES}
    per_token = flops(models.layer_shapes(name))
    sides: dict[str, Any] = {}
    for side, run in runs.items():
        median = statistics.median(seconds[side])
        vectors, added_mb = memory(run)
        sides[side] = {
            "batch": batches.get(side),
            "tokens_per_second": total / median,
            "ours_is_faster": ratio(seconds[side], seconds["ours"]),
            "mfu": per_token * total / median / peak,
            "cosine": least_cosine(reference, vectors),
            "encode_mb": added_mb,
        }
    return {
        "texts": len(texts),
        "tokens": total,
        "longest": packed.longest,
        "sides": sides,
        "profile": profile(runs["ours"], statistics.median(seconds["ours"])),
        "compiled": compiled(mine, runs["ours"], reference, options.rounds, total),
        "seconds": seconds,
        "tokens_per_second_by_batch_tokens": tokens_per_second(by_batch, options.rounds, total),
    }


def training(folder: Path, count: int) -> dict[str, Any]:
    """A step of LoRA on all linear layers: as benchmarks/train.py on a CPU, with the peer's fastest setting."""
    mine = train.Ours(None, "bfloat16", "cuda")
    texts = train.triples(mine.model, QUERIES)
    budgets = {"ours": train.WHOLE, f"ours, {PART:,} tokens at a time": PART}
    losses = {name: mine.backward(texts, budget) for name, budget in budgets.items()}
    train.gradients(mine.backbone)
    searched: dict[tuple[str, int], float] = {}
    for kind, size in product(train.KINDS["bfloat16"], SIZES):
        with suppress(torch.OutOfMemoryError):  # the plain loss keeps the whole padded batch
            name = f"peer, {kind}, {size or 'plain'}"
            losses[name], searched[kind, size] = peer_step(folder, texts, kind, size)
        gc.collect()  # room for the next
        torch.cuda.empty_cache()
    kind, size = min(searched, key=lambda setting: searched[setting])
    peer = train.Peer(folder, "bfloat16", kind, size, "cuda")
    runs: dict[str, Callable[[], Any]] = {
        name: lambda budget=budget: mine.step(texts, budget) for name, budget in budgets.items()
    }
    runs["peer"] = lambda: peer.step(texts)
    _synchronized(runs, 1)
    seconds = _synchronized(runs, count)
    return {
        "queries": QUERIES,
        "tokens": mine.tokens,
        "losses": losses,
        "peer_setting": {"kind": kind, "mini_batch": size or "plain"},
        "peer_search_seconds": {
            f"{k}, {s or 'plain'}": searched.get((k, s), "out of memory")
            for k, s in product(train.KINDS["bfloat16"], SIZES)
        },
        "seconds": seconds,
        "tokens_per_second": {side: mine.tokens / statistics.median(found) for side, found in seconds.items()},
        "ours_is_faster": {side: ratio(seconds["peer"], found) for side, found in seconds.items() if side != "peer"},
        "step_mb": {side: memory(run)[1] for side, run in runs.items()},
        "step_waits": {name: waits(lambda budget=budget: mine.step(texts, budget)) for name, budget in budgets.items()},
    }


def peer_step(folder: Path, texts: tuple[list[str], ...], kind: str, size: int) -> tuple[float, float]:
    """Loss and seconds of one setting of the peer's."""
    peer = train.Peer(folder, "bfloat16", kind, size, "cuda")
    loss = peer.backward(texts)
    train.gradients(peer.backbone)
    return loss, statistics.median(_synchronized({"step": lambda: peer.step(texts)}, 2)["step"])


def waits(run: Callable[[], Any]) -> list[str]:
    """Where the host waits for the GPU, as far as torch notices it: two numbers of a step are read back."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]


def memory(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` gives, and the most memory of the GPU that it held, in megabytes beside what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return result, (torch.cuda.max_memory_allocated() - before) / MB


def tokens_per_second(runs: Mapping[Any, Callable[[], Any]], count: int, tokens: int) -> dict[str, float]:
    rounds(runs, 1)
    return {str(name): tokens / statistics.median(seconds) for name, seconds in rounds(runs, count).items()}


def _synchronized(runs: Mapping[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    def waited(run: Callable[[], Any]) -> None:
        run()
        torch.cuda.synchronize()

    return rounds({name: lambda run=run: waited(run) for name, run in runs.items()}, count)


def peak_flops() -> float:
    """FLOP/s of a large bfloat16 product."""
    x, weight = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = _synchronized({"product": lambda: [x @ weight for _ in range(10)]}, 4)["product"]
    return 10 * 2 * 8192**3 / min(seconds[1:])


if __name__ == "__main__":
    main()
