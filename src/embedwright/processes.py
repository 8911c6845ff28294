"""Groups of processes: which one this is, how work is split, and what all of them agree on.

torchrun or accelerate starts the processes. One process alone waits for nobody and needs no process group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedwright.errors import InputError

# The others wait for rank 0 while it converts data, mines, scores or saves, and that may take hours. A process that
# dies is noticed at once, since its connections close.
_PATIENCE = timedelta(days=1)


class OtherProcessError(RuntimeError):
    """An error of another process of the group that was not about the user's input."""


@dataclass(frozen=True)
class Processes:
    """This process among `count`.

    `channel` is the group of the same processes through which they talk: over the CPU, and with a time limit of its
    own. None is the default group.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None  # None: wherever the model goes by itself
    channel: Any = None

    @property
    def is_rank_0(self) -> bool:
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

    def gather_vectors(self, own_NE: Tensor, sizes: Sequence[int]) -> Tensor:
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

    def all_max(self, value: float) -> float:
        """Returns the largest of all processes' values, in float64."""
        return self._reduced([value], dist.ReduceOp.MAX)[0] if self.count > 1 else value

    def all_sum(self, value: float) -> float:
        """Returns the sum of all processes' values, in float64."""
        return self.all_sums(value)[0]

    def all_sums(self, *values: float) -> list[float]:
        """Returns the sum of each value over all processes, in float64. It takes one message for all of them."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.count > 1 else list(values)

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each parameter's gradient by the sum of all processes' gradients. One that has none counts as 0."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.all_gather(None)

    def broadcast(self, value: Any = None) -> Any:
        """Returns rank 0's `value`, which must be JSON, in every process. The other processes' values are ignored."""
        if self.count == 1:
            return value
        content = json.dumps(value).encode() if self.is_rank_0 else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, 0, group=self.channel)
        sent = _bytes(content, int(size))
        dist.broadcast(sent, 0, group=self.channel)
        return json.loads(sent.numpy().tobytes())

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by rank, in every process. They must be JSON."""
        if self.count == 1:
            return [value]
        content = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self.channel)
        longest = max(map(int, sizes))
        parts = [_bytes(b"", longest) for _ in range(self.count)]
        dist.all_gather(parts, _bytes(content, longest), group=self.channel)
        return [json.loads(part.numpy().tobytes()[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def on_rank_0(self, decide: Callable[[], Any]) -> Any:
        """Calls `decide` in rank 0 alone. Returns its answer, which must be JSON, or raises its error in every process.

        So nothing that depends on a clock, a disk or rounding is decided by each process for itself.
        """
        answer = None
        with self.together():
            if self.is_rank_0:
                answer = decide()
        return self.broadcast(answer)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Runs a block in every process and waits for all at its end. An error in one of them raises in all.

        Each process must come to the end of the block by itself: the block must not communicate with other processes.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def agree(self, error: Exception | None) -> None:
        """Raises in every process if one of them has an error: its own, or else that of the first that has one.

        The error of another process is an InputError if it was one there, else an OtherProcessError, and names
        the process. It keeps the `texts` that the error is about.
        """
        texts = getattr(error, "texts", ())
        of_each = self.all_gather(error and [str(error) or type(error).__name__, isinstance(error, InputError), texts])
        if error is not None:
            raise error
        for rank, of_other in enumerate(of_each):
            if of_other:
                said, is_input, texts = of_other
                other: Any = (InputError if is_input else OtherProcessError)(f"process {rank}: {said}")
                other.texts = texts
                raise other

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, how)
        reduced: list[float] = found.tolist()
        return reduced


ALONE = Processes()
_channel: Any = None  # the channel of the group that this process is in


def _bytes(content: bytes, size: int) -> Tensor:
    """Returns a tensor of `size` bytes that begins with `content`."""
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)


def start(minutes: float | None = None) -> Processes:
    """Joins the group that torchrun or accelerate started, if one of them did.

    A process that waits longer than `minutes` for the others in a step ends with an error (None: torch's own limit).
    Only the first call of a process sets it.

    Raises:
        InputError: The group has another size than the environment says.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked == 1:
        return Processes()
    from accelerate import PartialState

    limit = {} if minutes is None else {"timeout": timedelta(minutes=minutes)}
    state = PartialState(cpu=not torch.cuda.is_available(), **limit)
    if state.num_processes != asked:
        raise InputError(f"{asked} processes were started and {state.num_processes} are in the group")
    global _channel
    _channel = _channel or dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device, _channel)


@contextmanager
def joined(minutes: float | None = None) -> Iterator[Processes]:
    """Joins the group for a `with` block (`start`), and leaves it once all are at its end."""
    global _channel
    processes = start(minutes)
    yield processes
    processes.barrier()
    if processes.count > 1:
        dist.destroy_process_group()
        _channel = None
