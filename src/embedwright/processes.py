"""Groups of processes: which one this is, how work is split, and what all of them agree on.

torchrun or accelerate starts the processes. One process alone waits for nobody and needs no process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedwright.errors import InputError


@dataclass(frozen=True)
class Processes:
    """This process among `count`."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None  # None: wherever the model goes by itself

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes."""
        return self.rank == 0

    def split(self, costs: Sequence[int]) -> list[list[int]]:
        """Splits items into one part a process, of about equal cost. Returns the indices of each part, in order.

        The answer is the same in every process.
        """
        parts: list[list[int]] = [[] for _ in range(self.count)]
        loads = [0] * self.count
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            least = min(range(self.count), key=loads.__getitem__)
            parts[least].append(i)
            loads[least] += costs[i]
        return [sorted(part) for part in parts]

    def gather(self, own_NE: Tensor, sizes: Sequence[int]) -> Tensor:
        """Joins the vectors of all processes, in the order of their ranks. `sizes` says how many each process has.

        The gradient flows to this process's own vectors. It is their whole gradient where every process computes the
        same loss from the result.
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
        """Returns the largest of all processes' values."""
        return int(self._reduced(value, dist.ReduceOp.MAX)) if self.count > 1 else value

    def total(self, value: float) -> float:
        """Returns the sum of all processes' values, in float64."""
        return self._reduced(value, dist.ReduceOp.SUM) if self.count > 1 else value

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each parameter's gradient by the sum of all processes' gradients. One that has none counts as 0."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.most(0)

    def _reduced(self, value: float, how: Any) -> float:
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, how)
        return float(found.item())


ALONE = Processes()


def start() -> Processes:
    """Joins the group that torchrun or accelerate started, if one of them did.

    Raises:
        InputError: The group has another size than the environment says.
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
def joined() -> Iterator[bool]:
    """Joins the group for a `with` block, waits for all at its end, and leaves. Yields whether this is rank 0."""
    processes = start()
    yield processes.first
    processes.wait()
    if processes.count > 1:
        dist.destroy_process_group()
