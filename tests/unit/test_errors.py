"""Errors of bad input are also the built-in errors that callers expect."""

import pytest

from embedwright.errors import (
    InputError,
    InputTypeError,
    MissingPackageError,
    NotFoundError,
    OutOfReachError,
    OutputExistsError,
)


@pytest.mark.parametrize(
    ("error", "built_in"),
    [
        (InputError, ValueError),
        (InputTypeError, TypeError),
        (NotFoundError, FileNotFoundError),
        (OutputExistsError, FileExistsError),
        (MissingPackageError, ImportError),
        (OutOfReachError, ConnectionError),
    ],
)
def test_an_input_error_is_also_the_built_in_one(error: type[InputError], built_in: type[Exception]) -> None:
    raised = error("recipe.yaml: no such file")
    assert isinstance(raised, InputError)
    assert isinstance(raised, built_in)
    assert str(raised) == "recipe.yaml: no such file"
