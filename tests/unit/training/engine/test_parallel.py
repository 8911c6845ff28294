"""The same batch on one and two processes (four and eight: long), through DDP and FSDP2: one loss, one gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import groups
import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from embedwright.data.schema import Example, Passage, Task
from embedwright.model import network
from embedwright.model.adapters.lora import add_lora
from embedwright.model.embedder import Embedder
from embedwright.processes import Processes, start
from embedwright.text import TokenizedText
from embedwright.training.batches.batch import Batch, Masks
from embedwright.training.batches.blend import Row
from embedwright.training.batches.feed import local_batch
from embedwright.training.batches.make import make_batch
from embedwright.training.engine.optim import make_optimizer, projection_of, update
from embedwright.training.engine.parallel import full_tensor, replicate
from embedwright.training.engine.step import accumulate
from embedwright.training.masked import loss as masked_loss
from embedwright.training.masked.batch import MaskedBatch, MaskedText
from embedwright.training.parts import ModelPart, OptimPart, TunePart
from embedwright.training.run.distill import Teacher
from embedwright.training.stages import ContrastiveStage, DataPart, LossPart

COUNTS = (1, 2)
LIMIT = 7.0  # minutes that a process waits for the others
# in-batch negatives, batch_tokens, gradient checkpointing, queries
CASES = {
    "one forward": ("all", 8192, False, 9),
    "gradcache": ("all", 60, False, 9),
    "by queries": ("none", 130, False, 9),
    "one query beyond the budget": ("none", 40, False, 9),
    "shared names, by queries": ("none", 130, False, 9),
    "spread out": ("none", 130, False, 9),
    "projection and similarities, gradcache": ("none", 60, False, 9),
    "projection, by queries": ("none", 60, False, 3),
    "fewer queries than processes": ("all", 60, False, 1),
    "fewer queries than processes, by queries": ("none", 60, False, 1),
    "full, checkpointing": ("all", 60, True, 9),
    "full, bf16": ("all", 60, False, 9),
    "lora, bf16, by queries": ("none", 130, False, 9),
}
LOSS: dict[str, dict[str, Any]] = {  # beside InfoNCE
    "spread out": {"spread_out": 5.0},
    "projection and similarities, gradcache": {
        "distill": {"vector_weight": 2.0, "similarity_weight": 2.0, "teacher": ["t"]}
    },
    "projection, by queries": {"distill": {"vector_weight": 2.0, "teacher": ["t"]}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: Callable[..., Path]) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    results = compute(folder, tiny_decoder("llama"), COUNTS)
    shared = {n: [np.load(folder / f"shared-{n}-{rank}.npz") for rank in range(n)] for n in COUNTS}
    results["alone"] = shared[1][0]["alone"]
    results["limits"] = [float(part["limit"]) for n in COUNTS[1:] for part in shared[n]]
    results["masked"] = {n: [dict(np.load(folder / f"masked-{n}-{rank}.npz")) for rank in range(n)] for n in COUNTS}
    results["kept"] = {n: [part["kept"] for part in parts] for n, parts in shared.items()}
    results["kept_encoded"] = {n: [int(part["kept_encoded"]) for part in parts] for n, parts in shared.items()}
    return results


def compute(folder: Path, decoder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """{kind: {count: {case: (losses of the processes, the first one's gradients, and weights after an update)}}}."""
    groups.run(__file__, folder, {"work": tuple(counts)}, str(decoder))
    assert all(groups.ends(folder, "work", count) == [0] * count for count in counts)
    results: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        for count in counts if kind == "ddp" else counts[1:]:
            for number, case in enumerate(CASES):
                parts = [np.load(folder / f"{kind}-{count}-{rank}-{number}.npz") for rank in range(count)]
                tensors = {name: parts[0][name] for name in parts[0].files if name != "loss"}
                losses = [float(part["loss"]) for part in parts]
                results.setdefault(kind, {}).setdefault(count, {})[case] = losses, tensors
    return results


def check_equal(found: dict[str, Any], kind: str, count: int, case: str) -> None:
    [loss], ours = found["ddp"][1][case]
    losses, theirs = found[kind][count][case]
    close, alike = (2e-3, 1e-2) if "bf16" in case else (1e-6, 1e-4)  # sums over other texts round otherwise
    assert losses == pytest.approx([losses[0]] * count, rel=1e-6) and losses[0] == pytest.approx(loss, rel=close)
    assert theirs["tokens"] == ours["tokens"]
    gradients = [name for name in ours if name not in ("norm", "held", "tokens") and not name.startswith("after ")]
    assert ours.keys() == theirs.keys() and len(gradients) > 35
    largest = max(float(np.linalg.norm(ours[name])) for name in gradients)
    for name in gradients:
        distance = float(np.linalg.norm(theirs[name] - ours[name]))
        assert distance <= close * max(largest, 1.0), name
        assert distance <= alike * float(np.linalg.norm(ours[name])), name
    # and the update: the norm that clips is that of the whole gradient
    assert float(theirs["norm"]) == pytest.approx(float(ours["norm"]), rel=close) and float(ours["norm"]) > 0.5
    # AdamW begins with the signs of gradients, times 1e-3: those of the smallest may differ, and in bf16 many do
    for name in gradients if "bf16" not in case else ():
        off = np.abs(theirs[f"after {name}"] - ours[f"after {name}"])
        assert off[np.abs(ours[name]) > 1e-6].max(initial=0) <= 2e-4, name
        assert float(np.linalg.norm(off)) <= 2e-5 * off.size**0.5, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "count"), [("ddp", 2), ("fsdp", 2)])
def test_many_processes_give_the_loss_and_gradient_of_one(
    found: dict[str, Any], kind: str, count: int, case: str
) -> None:
    check_equal(found, kind, count, case)


@pytest.mark.long
@pytest.mark.parametrize("count", [4, 8])
def test_so_many_processes_give_the_loss_and_gradient_of_one(
    tmp_path: Path, tiny_decoder: Callable[..., Path], count: int
) -> None:
    found = compute(tmp_path, tiny_decoder("llama"), (1, count))
    for kind in ("ddp", "fsdp"):
        for case in CASES:
            check_equal(found, kind, count, case)


@pytest.mark.parametrize(
    "case", ["gradcache", "by queries", "full, checkpointing", "full, bf16", "lora, bf16, by queries"]
)
def test_a_sharded_network_holds_no_whole_gradient_between_micro_batches(found: dict[str, Any], case: str) -> None:
    held, whole = found["fsdp"][2][case][1]["held"]
    assert 0.9 * whole / 2 < held < 1.1 * whole / 2  # rows of a matrix divide unevenly
    assert tuple(found["ddp"][2][case][1]["held"]) == (whole, whole)


def test_many_processes_give_the_masked_loss_and_its_gradient_of_one(found: dict[str, Any]) -> None:
    """Of five texts, and of one, which leaves processes without a text. The pooling block gets no gradient."""
    [one] = found["masked"][1]
    assert len(one) > 80 and not any("head" in name for name in one)
    for other in found["masked"][2]:
        assert other.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("count", COUNTS)
def test_what_a_teacher_encodes_is_shared_and_all_read_it(found: dict[str, Any], count: int) -> None:
    encoded = found["kept_encoded"][count]
    assert sum(encoded) == 5 and (max(encoded) < 5 or count == 1)
    for vectors in found["kept"][count]:
        np.testing.assert_allclose(vectors, found["alone"], atol=1e-5)


def test_a_group_has_the_time_limit_that_it_was_started_with(found: dict[str, Any]) -> None:
    assert found["limits"] == [LIMIT * 60] * 2


def test_the_cases_differ_from_each_other(found: dict[str, Any]) -> None:
    """Else the test above would compare one thing with itself."""
    losses = {case: found["ddp"][1][case][0][0] for case in CASES}
    assert losses["one forward"] == pytest.approx(losses["gradcache"], rel=1e-5)
    assert losses["by queries"] == pytest.approx(losses["one query beyond the budget"], rel=1e-5)
    assert losses["one forward"] > losses["by queries"] + 0.1
    assert losses["spread out"] > losses["by queries"] + 0.1
    for case in ("projection and similarities, gradcache", "projection, by queries"):
        assert np.linalg.norm(found["ddp"][1][case][1]["projection"]) > 1e-3


# ---- in the processes


def gradients_of(kind: str, case: str, decoder: str, processes: Processes) -> dict[str, Any]:
    in_batch, budget, checkpointing, queries = CASES[case]
    method, mixed = "full" if case.startswith("full") else "lora", "bf16" in case
    dtype = "bfloat16" if mixed and method == "lora" else "float32"
    model = Embedder.from_decoder(decoder, pooling="latent", latents=8, heads=4, multiple=1, dtype=dtype)
    model.network.mixed = mixed
    torch.manual_seed(0)
    if method == "lora":
        add_lora(model.network.backbone, rank=4, alpha=8, dropout=0.0)
    for parameter in model.network.parameters():  # nothing stays at the zero that it starts from
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if mixed and method == "full":  # FSDP multiplies with norms in bfloat16, one process with norms in float32
        for parameter in model.network.backbone.parameters():
            parameter.data = parameter.data.bfloat16().float()
    if checkpointing:
        model.network.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    model.network.train()
    random = np.random.default_rng(5)

    def text(tag: str) -> Passage:
        return Passage(" ".join([tag, *random.choice(["tide", "moon", "sea", "rise", "fall"], random.integers(1, 14))]))

    task = Task(name="t", instruction="Find what answers it")
    names = (Passage("a name"), Passage("another")) if case.startswith("shared names") else ()
    rows = [
        Row(
            Example(
                f"{i}",
                "t",
                text(f"q{i}").text,
                (text(f"p{i}"),),
                tuple(text(f"n{i}") for _ in range(i % (3 - len(names)) + 1)) + names,
            ),
            task,
        )
        for i in range(queries)
    ]
    loss_part = LossPart(**LOSS.get(case, {}))
    batch = make_batch(
        rows,
        model.contract,
        hard_negatives=3,
        in_batch=in_batch,  # type: ignore[arg-type]
        rng=random,
        loss=loss_part,
    )
    optim = OptimPart(lr=1e-3, steps=2, batch_queries=queries)
    stage = ContrastiveStage(
        name="s",
        data=(DataPart(path="none"),),
        in_batch_negatives=in_batch,  # type: ignore[arg-type]
        hard_negatives=3,
        temperature=0.1,
        loss=loss_part,
        optim=optim,
    )
    replica = replicate(processes, model.network, kind)  # type: ignore[arg-type]
    model.encode(["a tide"])  # as a run evaluates: what trains is looked up behind it
    projection = torch.nn.Parameter(torch.tensor(random.standard_normal((24, 32)) / 6, dtype=torch.float32))
    optimizer = make_optimizer(model.network, TunePart(), optim, projection if "projection" in case else None)

    def teach(texts: Sequence[tuple[str, str]]) -> torch.Tensor:
        seeds = [int.from_bytes("".join(text).encode()) % 2**32 for text in texts]
        return torch.stack([torch.randn(24, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    local = local_batch(batch, model.text_tokenizer, model.contract, processes, teach if "projection" in case else None)
    held: list[tuple[int, int]] = []

    def embed(packed: Any) -> torch.Tensor:
        """Embeds, and notes how much gradient this process holds before this micro-batch, of how much in all."""
        moving = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in moving if parameter.grad is not None]
        own = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        held.append((sum(gradient.numel() for gradient in own), sum(parameter.numel() for parameter in moving)))
        return embedded(packed)

    embedded = replica.embed
    replica = replace(replica, projection=projection_of(optimizer), embed=embed)
    assert (local.rows is not None) == ("queries" in case or "query" in case), "so that the case is what it is called"
    loss, tokens = accumulate(replica, local, stage, batch_tokens=budget, seed=1)
    trained = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    trained |= {"projection": projection} if "projection" in case else {}
    assert all(p.grad is not None for p in trained.values())
    found = {name: full_tensor(p.grad).numpy().copy() for name, p in trained.items() if p.grad is not None}
    norm = update(model.network, optimizer, 1e-2, clip=0.5)
    return (
        {"loss": loss, "norm": norm, "tokens": tokens, "held": held[-1]}
        | found
        | {f"after {name}": full_tensor(p.detach()).numpy() for name, p in trained.items()}
    )


def masked(decoder: str, processes: Processes) -> dict[str, Any]:
    """Loss, gradient and held-out measure of masked texts, on a network that a run of several stages has wrapped."""
    model = Embedder.from_decoder(decoder, pooling="latent", latents=4, heads=2, multiple=1)
    torch.manual_seed(0)
    model.add_lora(4, 8)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    replicate(processes, model.network)
    head = masked_loss.language_head(model.network, ModelPart(base=decoder))
    random, found = np.random.default_rng(0), dict[str, Any]()
    for lengths in ((9, 30, 5, 30, 17), (12,)):
        ids = [random.integers(2, 400, length) for length in lengths]
        texts = [MaskedText(TokenizedText(i, i > 0), np.array([1, 4]), np.array([7, 9])) for i in ids]
        own = processes.split(lengths)[processes.rank]
        batch = MaskedBatch([], [texts[i] for i in own])
        loss, tokens = masked_loss.accumulate(model.network, head, batch, processes, batch_tokens=40, seed=0)
        numbers = {
            "loss": loss,
            "tokens": tokens,
            **masked_loss.measure(model.network, head, batch.texts, processes, 40),
        }
        found |= {f"{len(lengths)} {name}": number for name, number in numbers.items()}
        for name, parameter in model.network.named_parameters():
            if parameter.grad is not None:
                found[f"{len(lengths)} {name}"] = parameter.grad.numpy().copy()
            parameter.grad = None
    return found


def shared(decoder: str, processes: Processes) -> dict[str, Any]:
    """Five texts of very different lengths, asked of a teacher in every process alike."""
    model, encoded = Embedder.from_decoder(decoder, pooling="mean"), 0

    class Counted:
        def encode(self, texts: list[str], task: str | None = None) -> Any:
            nonlocal encoded
            encoded += len(texts)
            return model.encode(texts, task=task)

        def fingerprint(self) -> dict[str, str]:
            return {"processes": str(processes.count)}  # so that none finds what fewer have kept

    texts = [f"{'a tide ' * n}moon" for n in (1, 30, 2, 9, 0)]
    teacher, asked = Teacher([Counted()], {"Q: ": "Find it"}), [("Q: ", text) for text in texts]
    nothing = np.zeros((5, 0), dtype=bool)
    batch = Batch(asked, [], [], Masks(np.zeros(5, dtype=np.int64), nothing, nothing))
    teacher.prepare([batch, batch], processes, lambda: None)
    kept = {"kept": teacher(asked).numpy(), "kept_encoded": encoded - 1}  # and one for its width
    return {"alone": model.encode(texts, task="Find it")} | kept


def work(folder: Path, decoder: str) -> None:
    os.environ["EMBEDWRIGHT_CACHE"] = str(folder / "cache")
    network.HEAD_SLICE = 16  # shorter than the texts of a process: a head in slices would be gathered once for each
    processes = start(LIMIT)
    rank, count = processes.rank, processes.count
    for kind in ("ddp", "fsdp") if count > 1 else ("ddp",):
        for number, case in enumerate(CASES):
            np.savez(folder / f"{kind}-{count}-{rank}-{number}.npz", **gradients_of(kind, case, decoder, processes))
    limit = {} if count == 1 else {"limit": groups.limit()}
    np.savez(folder / f"shared-{count}-{rank}.npz", **shared(decoder, processes), **limit)
    np.savez(folder / f"masked-{count}-{rank}.npz", **masked(decoder, processes))
    processes.barrier()
