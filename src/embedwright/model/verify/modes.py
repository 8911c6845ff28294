"""Switches a network to evaluation mode for a while, and restores the mode of every module."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class _Entered:
    """The number of blocks that are open for a network, and its modules that were in training before the first."""

    count: int
    training: list[nn.Module]


_entered: weakref.WeakKeyDictionary[nn.Module, _Entered] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within the block the network is in evaluation mode; after it each module has its own mode again.

    `network.train()` after the block would also switch parts that a trainer keeps in evaluation. Several threads may be
    in the block at once: the first one switches, and the last one restores the modes.
    """
    with _lock:
        entered = _entered.get(network)
        if entered is None:
            training = [module for module in network.modules() if module.training]
            entered = _entered[network] = _Entered(0, training)
            for module in training:
                module.training = False
        entered.count += 1
    try:
        yield
    finally:
        with _lock:
            entered.count -= 1
            if not entered.count:
                del _entered[network]
                for module in entered.training:
                    module.training = True
