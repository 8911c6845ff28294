"""A network that several processes train: how its copies or parts give the gradient of one process.

Each process draws the whole batch and encodes its part of the texts. The vectors of all are gathered, each process
computes the loss of the whole batch, and each sends back the gradient of its own texts. So loss and gradient are those
of one process, whatever their number, and no text counts twice or not at all.

N texts of a batch, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedwright.packing import PackedTexts
from embedwright.processes import Processes

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Replica:
    """A network as one process trains it.

    `embed(packed)` gives (N, E) with gradient. `syncing(last)` surrounds forward and backward of a micro-batch. DDP
    averages gradients over the processes once a step, in its last micro-batch. FSDP does so in each micro-batch:
    otherwise whole gradients would stay in memory until the last. `projection` trains along in a stage whose teacher
    has vectors of another width: it is not part of the network, and each process has all of it.
    """

    processes: Processes
    embed: Callable[[PackedTexts], Tensor]
    syncing: Callable[[bool], AbstractContextManager[Any]]
    device: torch.device
    projection: nn.Parameter | None = None


def replicate(processes: Processes, network: Any, kind: Kind = "ddp") -> Replica:
    """Makes a network trainable by all processes, in place.

    `ddp` keeps the whole network in each process. `fsdp` (FSDP2) shards every decoder layer, the rest of the backbone
    and the head over the processes. Each process starts with the whole network: it is probed before it is sharded, and
    no process waits for another's weights.
    """
    device = next(network.parameters()).device
    if processes.count == 1:
        return Replica(processes, network.embed, lambda _: nullcontext(), device)
    if kind == "ddp":
        copy = nn.parallel.DistributedDataParallel(
            _Embed(network), broadcast_buffers=False, gradient_as_bucket_view=True
        )
        return Replica(processes, copy, lambda last: nullcontext() if last else copy.no_sync(), device)
    shard(network)
    return Replica(processes, network.embed, lambda _: nullcontext(), device)


class _Embed(nn.Module):
    """The network with a `forward`, which DistributedDataParallel needs."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, packed: PackedTexts) -> Tensor:
        embedded: Tensor = self.network.embed(packed)
        return embedded


def shard(network: Any) -> None:
    """Shards a network with FSDP2, in place.

    Backbone and head are roots of their own, so whatever calls them (training, `encode`, the probe) gathers their
    weights. They are sharded again after each forward, which FSDP does not do for roots: an optimizer that is made
    after an evaluation would get the gathered copies, and train nothing.

    A bf16 run gathers the weights of its layers in bfloat16, and sums their gradients in float32. Autocast alone would
    keep a copy of every layer for the backward pass. The states between layers and all outside them stay in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in network.backbone.layers:
        fully_shard(layer, mp_policy=low if network.mixed else MixedPrecisionPolicy())
    for part in (network.backbone, network.head):
        if any(True for _ in part.parameters()):
            fully_shard(part, reshard_after_forward=True)
    network.sharded = True


def trainable_parameters(network: Any) -> dict[str, Tensor]:
    """Returns the parameters that train, by name; of a sharded network this process's shards."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def gather_trainable(network: Any, processes: Processes) -> dict[str, Tensor]:
    """Gathers the trainable parameters on the CPU of rank 0, one at a time; the other processes get none of them.

    All processes must call it.
    """
    found = {}
    for name, parameter in trainable_parameters(network).items():
        gathered = full_tensor(parameter.detach())
        if processes.is_rank_0:
            found[name] = gathered.cpu().contiguous()
    return found


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a tensor that FSDP has sharded in every process, and returns any other as it is.

    All processes must call it.
    """
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def shard_like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Returns this process's shard of a tensor that every process has in full, divided as `sharded` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(sharded, DTensor):
        return tensor
    return distribute_tensor(tensor.to(sharded.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
