"""Many processes, one step: who encodes which texts, and how their parts become one gradient.

torchrun or accelerate starts the processes. Each draws the whole batch and encodes its share of the texts; the vectors
of all are gathered, each computes the loss of the whole batch, and each sends back what its own texts owe. So loss and
gradient are those of one process, whatever the number, and no text counts twice or not at all.

N texts of a batch, E embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedwright.errors import InputError
from embedwright.packing import PackedTexts

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Replica:
    """A network as one process trains it: `embed(packed)` (N, E) with gradient, and `syncing(last)` around forward and
    backward of a micro-batch, since gradients meet on the last one of a step alone, as their mean over processes."""

    processes: Processes
    embed: Callable[[PackedTexts], Tensor]
    syncing: Callable[[bool], AbstractContextManager[Any]]
    device: torch.device


@dataclass(frozen=True)
class Processes:
    """This process among `count`. One alone asks nobody and needs no process group."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None  # None: wherever the model goes by itself

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wrap(self, network: Any, kind: Kind = "ddp") -> Replica:
        """`ddp` keeps the whole network in each process; `fsdp` (FSDP2) cuts every decoder layer, the rest of the
        backbone and the head into `count` parts, in place."""
        device = next(network.parameters()).device
        if self.count == 1:
            return Replica(self, network.embed, lambda _: nullcontext(), device)
        if kind == "ddp":
            copy = nn.parallel.DistributedDataParallel(
                _Embed(network), broadcast_buffers=False, gradient_as_bucket_view=True
            )
            return Replica(self, copy, lambda last: nullcontext() if last else copy.no_sync(), device)
        roots = shard(network)

        def syncing(last: bool) -> AbstractContextManager[Any]:
            for root in roots:
                root.set_requires_gradient_sync(last)
            return nullcontext()

        return Replica(self, network.embed, syncing, device)

    def share(self, costs: Sequence[int]) -> list[list[int]]:
        """Indices of what each process takes, of about equal cost: the same answer in every process."""
        shares: list[list[int]] = [[] for _ in range(self.count)]
        loads = [0] * self.count
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            least = min(range(self.count), key=loads.__getitem__)
            shares[least].append(i)
            loads[least] += costs[i]
        return [sorted(share) for share in shares]

    def gather(self, own_NE: Tensor, sizes: Sequence[int]) -> Tensor:
        """The vectors of all processes, the first one's first; `sizes` says how many each has. Gradient for own ones.

        That is the whole gradient of them where every process computes the same loss from the result.
        """
        if self.count == 1:
            return own_NE
        padded = own_NE.new_zeros(max(sizes), own_NE.shape[1])
        padded[: len(own_NE)] = own_NE.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        each = [part[:size] for part, size in zip(parts, sizes, strict=True)]
        each[self.rank] = own_NE
        return torch.cat(each)

    def most(self, value: int) -> int:
        """The largest of all processes' values."""
        return int(self._reduced(value, dist.ReduceOp.MAX)) if self.count > 1 else value

    def total(self, value: float) -> float:
        """The sum of all processes' values, in float64."""
        return self._reduced(value, dist.ReduceOp.SUM) if self.count > 1 else value

    def wait(self) -> None:
        """Until all processes are here."""
        self.most(0)

    def _reduced(self, value: float, how: Any) -> float:
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, how)
        return float(found.item())


ALONE = Processes()


def start() -> Processes:
    """This process as torchrun or accelerate started it; alone where none of them did.

    ValueError where the group is of another size than the environment says.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != asked:
        raise InputError(f"{asked} processes were started and {state.num_processes} are in the group")
    return Processes(state.process_index, state.num_processes, state.device)


@contextmanager
def together() -> Iterator[bool]:
    """Whether this process is the first one: the others wait behind it, then the group is closed."""
    processes = start()
    yield processes.first
    processes.wait()
    if processes.count > 1:
        dist.destroy_process_group()


class _Embed(nn.Module):
    """The network behind a forward, which is what DistributedDataParallel listens to."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, packed: PackedTexts) -> Tensor:
        embedded: Tensor = self.network.embed(packed)
        return embedded


def shard(network: Any) -> list[Any]:
    """Cut a network into parts of this process, in place; returns what FSDP made of backbone and head.

    Both are roots of their own: whatever calls them (training, `encode`, the probe) gathers their weights. They are cut
    again behind each forward, which FSDP leaves out for roots: an optimizer that is made behind an evaluation would
    get the gathered copies, and train nothing.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in network.backbone.layers:
        fully_shard(layer)
    roots = [part for part in (network.backbone, network.head) if any(True for _ in part.parameters())]
    for part in roots:
        fully_shard(part, reshard_after_forward=True)
    network.sharded = True
    return roots


def trained(network: Any) -> dict[str, Tensor]:
    """What training moves, by name; of a cut network this process's part."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def whole(network: Any) -> dict[str, Tensor]:
    """The same as it would be in a network that was never cut, in every process: all of them must ask."""
    return {name: full(parameter.detach()) for name, parameter in trained(network).items()}


def full(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has cut, whole, in every process: all of them must ask. Any other as it is."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def like(tensor: Tensor, cut: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut as `cut` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(cut, DTensor) or tensor.shape != cut.shape:
        return tensor
    return distribute_tensor(tensor.to(cut.device), cut.device_mesh, cut.placements)
