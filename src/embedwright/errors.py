"""Errors about what the user gave. The command ends with exit code 2 on these and on nothing else."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: a file, row, key, option or argument. The message names it, says what was given and what to do."""


class InputTypeError(InputError, TypeError):
    """A value of the wrong type."""


class NotFoundError(InputError, FileNotFoundError):
    """A file, folder or model that is not there."""


class OutputExistsError(InputError, FileExistsError):
    """A place to write to that already holds something."""


class MissingPackageError(InputError, ImportError):
    """An optional package that this needs is not installed."""
