"""Errors of the server. Every answer that is not a success has OpenAI's shape, on every path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from embedwright.config import did_you_mean
from embedwright.errors import InputError

_TYPES = {429: "rate_limit_error"}  # by status; others are the client's fault below 500, the server's above


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every path answers when it does not succeed."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is not a success. `param` names the field that is wrong, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return JSONResponse(ErrorAnswer(error=detail).model_dump(), self.status, self.headers)


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {
        "model": ErrorAnswer,
        "description": "The request is wrong, or a text has no finite vector; `param` names the field.",
    },
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong."},
    403: {"model": ErrorAnswer, "description": "The server has no key, and was asked under another name."},
    404: {"model": ErrorAnswer, "description": "There is no such model, document or path."},
    408: {"model": ErrorAnswer, "description": "The body did not arrive in time."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    429: {"model": ErrorAnswer, "description": "The queue is full; Retry-After says when to ask again."},
    503: {"model": ErrorAnswer, "description": "The server stops, or the model has failed on a text."},
    "default": {"model": ErrorAnswer, "description": "Any other error."},
}


def busy(message: str, status: int, code: str, seconds: float) -> ApiError:
    """Makes the answer of a server that takes no more for now. The client may ask again after `seconds`."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(max(1, round(seconds)))})


def add_handlers(app: FastAPI) -> None:
    """Gives the app's errors OpenAI's shape: its own, those of the framework, and those of bad input."""

    def own(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    def bad_input(_: Request, error: Exception) -> JSONResponse:
        return ApiError(400, str(error)).response()

    def of_framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        said = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        status = error.status_code
        message = said.get(status, "the body cannot be read: send UTF-8 JSON" if status == 400 else str(error.detail))
        return ApiError(status, message, headers=error.headers).response()

    def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _of_field(request, error.errors()[0]).response()

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(InputError, bad_input)
    app.add_exception_handler(HTTPException, of_framework)
    app.add_exception_handler(RequestValidationError, invalid)


def _of_field(request: Request, fault: Mapping[str, Any]) -> ApiError:
    """Makes the answer for one fault that pydantic found. Of what was sent its message has the field's name alone."""
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {fault.get('ctx', {}).get('error', fault['msg'])}")
    field = ".".join(str(part) for part in fault["loc"][1:])[:100]  # an unknown one may be of any length
    if not field:
        json = request.headers.get("content-type", "").partition(";")[0].strip()
        hint = "" if json == "application/json" else " with the header Content-Type: application/json"
        return ApiError(400, f"send a JSON object{hint}")
    if fault["type"] == "extra_forbidden":
        known = request.scope["route"].body_field.field_info.annotation.model_fields
        return ApiError(400, f"there is no field {field!r}{did_you_mean(field, known)}", field, "unknown_field")
    return ApiError(400, f"{field}: {str(fault['msg']).removeprefix('Value error, ')}", field)
