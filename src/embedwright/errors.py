"""Errors about what the user gave. The command ends with exit code 2 on these and on nothing else."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# What the system says about a name that the user gave; any other trouble with a disk is no bad input.
_ABOUT_A_NAME = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES}


class InputError(ValueError):
    """Bad input: a file, row, key, option or argument. The message names it, says what was given and what to do."""


class InputTypeError(InputError, TypeError):
    """A value of the wrong type."""


class NotFoundError(InputError, FileNotFoundError):
    """A file, folder or model that is not there."""


class OutputExistsError(InputError, FileExistsError):
    """A place to write to that already holds something."""


class OutOfReachError(InputError, ConnectionError):
    """A name on the hub that cannot be reached from here."""


class MissingPackageError(InputError, ImportError):
    """An optional package that this needs is not installed."""


@contextmanager
def blaming(where: object, what: str = "cannot be opened") -> Iterator[None]:
    """Turns any error of the block into an InputError that names `where`: for calls of other libraries on files from
    anywhere, which fail in every way there is. A lack of memory and a failing disk stay what they are.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise MissingPackageError(f"{where} {what}: {error}") from error
    except Exception as error:
        system = isinstance(error, OSError) and error.errno not in _ABOUT_A_NAME
        if system or type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported here
            raise
        kind = NotFoundError if isinstance(error, FileNotFoundError) else InputError
        raise kind(f"{where} {what}: {error or type(error).__name__}") from error


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where`, a key or file, in front of what an InputError within it says."""
    try:
        yield
    except InputError as error:
        kind = NotFoundError if isinstance(error, NotFoundError) else InputError
        raise kind(f"{where}: {error}") from error
