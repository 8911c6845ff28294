"""Restores the settings of the process that other libraries change while they load or write a model."""

from __future__ import annotations

import ctypes
import logging
import random
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Restores the CPU's default generator and transformers' verbosity after the block, and gives freed memory back.

    Only one thread at a time is in the block: of two, the later one would restore what the earlier one had set.
    """
    with _LOADING, torch.random.fork_rng(devices=[]):
        verbosity = transformers_logging.get_verbosity()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            _trim()


def _trim() -> None:
    """Returns to the system what was freed: glibc keeps it, 250 MB after a vocabulary of 262,000 tokens was read."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


@contextmanager
def unwarned(library: str) -> Iterator[None]:
    """Keeps warnings from the user during the block: Python's, and those of a library's logger, such as `torch.onnx`.

    Only one thread at a time is in the block, as in `loading`.
    """
    logger = logging.getLogger(library)
    with _LOADING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def restored_rng() -> Iterator[None]:
    """Restores the default generators of torch (that of the GPU in use too), numpy and Python after the block."""
    plain, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(of_numpy)
