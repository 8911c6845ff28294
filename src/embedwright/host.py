"""What belongs to the whole process and is set for a moment by other libraries: put back, whichever thread loads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """The default generator of the CPU and transformers' verbosity are after the block what they were before it.

    One thread at a time: of two that put these back, the later one would put back what the earlier one had set.
    """
    with _LOADING, torch.random.fork_rng(devices=[]):
        verbosity = transformers_logging.get_verbosity()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """The default generators, of the GPU in use too, are after the block what they were before it."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield
