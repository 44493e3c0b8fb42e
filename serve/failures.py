"""OpenAI's error object for everything that can go wrong, with the HTTP status that says it."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from pixellm.errors import (
    AuthenticationError,
    BadRequestError,
    OverloadedError,
    PixelLMError,
    RateLimitedError,
    ServingError,
)

_LOG = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_ROUTE_MESSAGES = {
    404: "there is no such route; /openapi.json lists those that exist",
    405: "this route has another method; the Allow header and /openapi.json say which",
}


def error_body(
    message: str, status_code: int, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The object `{"error": {message, type, param, code}}`; `type` follows from the status."""
    kind = _TYPES.get(status_code, "invalid_request_error" if status_code < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failure_of(error: Exception) -> tuple[int, dict[str, dict[str, str | None]], dict[str, str]]:
    """What an exception means over HTTP.

    Args:
        error: anything raised while answering.

    Returns:
        (status code, error object, extra headers). An exception that is nobody's to mend by changing the request is a
        500 whose message gives nothing away; the caller logs it.
    """
    if isinstance(error, BadRequestError):
        return error.status_code, error_body(str(error), error.status_code, param=error.param, code=error.code), {}
    if isinstance(error, OverloadedError):
        retry_after = str(max(1, math.ceil(error.retry_after_s)))
        code = "rate_limit_exceeded" if isinstance(error, RateLimitedError) else "overloaded"
        body = error_body(str(error), error.status_code, code=code)
        return error.status_code, body, {"Retry-After": retry_after}
    if isinstance(error, AuthenticationError):
        return 401, error_body(str(error), 401, code="invalid_api_key"), {"WWW-Authenticate": "Bearer"}
    if isinstance(error, ServingError):
        return error.status_code, error_body(str(error), error.status_code), {}
    if isinstance(error, ValidationError):
        message, param = explain_validation(error)
        return 422, error_body(message, 422, param=param, code="invalid_value"), {}
    if isinstance(error, HTTPException):
        message = _ROUTE_MESSAGES.get(error.status_code, str(error.detail))
        return error.status_code, error_body(message, error.status_code), dict(error.headers or {})
    if isinstance(error, PixelLMError):
        return 500, error_body(str(error), 500), {}
    return 500, error_body("the server failed on this request; its log says why", 500, code="internal_error"), {}


def explain_validation(error: ValidationError) -> tuple[str, str | None]:
    """One line for a pydantic error, and the field it is about; the value is quoted in short."""
    problems = error.errors(include_url=False, include_context=False)
    lines = [_explain_problem(dict(problem)) for problem in problems[:5]]
    if len(problems) > 5:
        lines.append(f"and {len(problems) - 5} more")
    return "; ".join(lines), ".".join(str(part) for part in problems[0]["loc"]) or None


def _explain_problem(problem: Mapping[str, Any]) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "body"
    got = "" if problem["type"] in ("missing", "extra_forbidden") else f" (got {_short(problem['input'])})"
    message = "unknown field" if problem["type"] == "extra_forbidden" else problem["msg"]
    return f"{location}: {message}{got}"


def _short(value: object, limit: int = 60) -> str:
    if isinstance(value, (dict, list)):
        return type(value).__name__
    text = repr(value[: limit * 2] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit else text[:limit] + "…"


def install_handlers(app: FastAPI) -> None:
    """Makes every error of `app`, unknown routes and crashes included, an OpenAI error object."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        status, body, headers = failure_of(error)
        if status >= 500 and not isinstance(error, PixelLMError):
            _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(body, status_code=status, headers=headers)

    for kind in (PixelLMError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
