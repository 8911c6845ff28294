"""Dropout off for a while: every module's own mode is put back as it was."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class _Entered:
    """How many are inside for one network, and which of its modules were in training before the first came."""

    count: int
    training: list[nn.Module]


_entered: weakref.WeakKeyDictionary[nn.Module, _Entered] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network is in evaluation mode meanwhile. Afterwards each module is in the mode that it was in.

    `train(mode)` on the whole tree would also switch the parts that a trainer keeps in evaluation. Several threads may
    be inside at once: the first one switches, and the last one puts the modes back.
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
