"""Errors have OpenAI's shape; `test_app.py` asks every path for them."""

from __future__ import annotations

import json

from embedwright.serve.errors import ApiError, busy


def test_the_shape_and_the_kinds() -> None:
    for status, kind in (
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ):
        answer = ApiError(status, "words", "input", "a_code").response()
        assert answer.status_code == status
        error = {"message": "words", "type": kind, "param": "input", "code": "a_code"}
        assert json.loads(answer.body) == {"error": error}


def test_a_busy_server_names_whole_seconds() -> None:
    assert [busy("", 429, "full", s).response().headers["Retry-After"] for s in (0.0, 2.4, 60)] == ["1", "2", "60"]
