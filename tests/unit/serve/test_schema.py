"""The request model: JSON's whole numbers, and its side."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from embedwright.serve.schema import embedding_request, whole_number


class Counted(BaseModel):
    n: whole_number(2, 5)  # type: ignore[valid-type]


def test_a_whole_number_is_what_json_schema_calls_an_integer() -> None:
    assert Counted.model_validate({"n": 3}).n == Counted.model_validate({"n": 3.0}).n == 3
    for bad in (True, "3", 3.5, None, 1, 6, float("inf"), float("nan")):
        with pytest.raises(ValidationError):
            Counted.model_validate({"n": bad})
    bounds = Counted.model_json_schema()["properties"]["n"]
    assert (bounds["type"], bounds["minimum"], bounds["maximum"]) == ("integer", 2, 5)


def test_ids_are_of_the_schema_only_where_they_are_taken() -> None:
    without, taken = (embedding_request(8, 4, ids) for ids in (False, True))
    forms = [model.model_json_schema()["properties"]["input"]["anyOf"] for model in (without, taken)]
    assert [len(form) for form in forms] == [2, 4]
    assert taken.model_validate({"input": [1, 2.0]}).input == [[1, 2]]
    assert taken.model_validate({"input": [[1], [2, 3]]}).input == [[1], [2, 3]]
    for bad in ([-1], [1, "a"], [[1], []], [[True]], [1.5]):
        with pytest.raises(ValidationError):
            taken.model_validate({"input": bad})
