"""Errors about the user's input. The command ends with exit code 2 for these only."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Errors of the system about a name that the user gave. Any other error of a disk is not bad input.
_ABOUT_A_NAME = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES}


class InputError(ValueError):
    """A bad file, row, key, option or argument. The message names it, quotes it and says what to do."""


class InputTypeError(InputError, TypeError):
    """A value of the wrong type."""


class NotFoundError(InputError, FileNotFoundError):
    """A file, folder or model that does not exist."""


class OutputExistsError(InputError, FileExistsError):
    """An output path that already holds something."""


class OutOfReachError(InputError, ConnectionError):
    """A name on the hub that cannot be reached."""


class MissingPackageError(InputError, ImportError):
    """An optional package that is needed is not installed."""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `choices`. `name` is the argument's name in the message."""
    if value not in (known := list(choices)):
        raise InputError(f"{name}={value!r} is none of {', '.join(known)}")


@contextmanager
def as_input_error(where: object, what: str = "cannot be opened") -> Iterator[None]:
    """Turns any error of the block into an InputError that names `where`.

    For calls of other libraries on unknown files, which may raise any error. A lack of memory and a failing disk keep
    their own errors.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except ImportError as error:
        raise MissingPackageError(f"{where} {what}: {error}") from error
    except Exception as error:
        system = isinstance(error, OSError) and error.errno not in _ABOUT_A_NAME
        if system or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        kind = NotFoundError if isinstance(error, FileNotFoundError) else InputError
        raise kind(f"{where} {what}: {error or type(error).__name__}") from error


@contextmanager
def error_prefix(where: str) -> Iterator[None]:
    """Puts `where`, a key or a file, in front of the message of an InputError in the block."""
    try:
        yield
    except InputError as error:
        kind = NotFoundError if isinstance(error, NotFoundError) else InputError
        raise kind(f"{where}: {error}") from error
