"""Shapes every error as OpenAI's clients expect it. Knows the table of errors.py, not who raised what."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Mount

from engine.errors import EngineError
from router.errors import RouterError
from server.errors import ApiError, RateLimitExceeded, ServerError, answer_for, is_internal
from server.text_fields import without_lone_surrogates
from stack_store.errors import StoreError

logger = logging.getLogger(__name__)

MAX_SHOWN_FAULTS = 5
INTERNAL_MESSAGE = "internal error; the server's log has the traceback"

METHODS = ("DELETE", "GET", "POST", "PUT")
FIELD_NAME = re.compile(r"[\w-]+")
CODES_BY_STATUS = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timed_out",
    413: "request_too_large",
    431: "headers_too_large",
    499: "client_closed_request",
}


def error_body(message: str, *, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, the shape that the openai client unwraps."""
    message, param = without_lone_surrogates(message), None if param is None else without_lone_surrogates(param)
    return {"error": {"message": message, "type": type_of(status), "param": param, "code": code}}


def body_of(error: BaseException) -> dict[str, Any]:
    """The error's own message, but nothing of what went wrong inside."""
    answer = answer_for(error)
    message = INTERNAL_MESSAGE if is_internal(error) else str(error)
    param = error.param if isinstance(error, ApiError) else None
    return error_body(message, status=answer.status, code=answer.code, param=param)


def response_to(error: BaseException) -> JSONResponse:
    """Status, body and retry headers of an error."""
    answer = answer_for(error)
    headers = {}
    retry_after_seconds = answer.retry_after_seconds
    if isinstance(error, RateLimitExceeded):
        retry_after_seconds = error.retry_after_seconds
    if retry_after_seconds is not None:
        headers["retry-after"] = str(retry_after_seconds)
    if answer.should_retry is not None:
        headers["x-should-retry"] = str(answer.should_retry).lower()
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(body_of(error), answer.status, headers)


def event_of(error: BaseException) -> bytes:
    """The error as a server-sent event, for a stream whose headers are out."""
    return b"data: " + orjson.dumps(body_of(error)) + b"\n\n"


def install_handlers(app: FastAPI) -> None:
    """Answers everything raised on purpose; what was not is caught at the boundary."""
    for root in (ServerError, StoreError, RouterError, EngineError):
        app.add_exception_handler(root, _listed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


async def _listed(request: Request, error: Exception) -> Response:
    if is_internal(error):
        logger.error("request failed", exc_info=error)
    return response_to(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    message = "; ".join(_sentence(fault) for fault in faults[:MAX_SHOWN_FAULTS])
    unsupported = all(fault["type"] == "unsupported" for fault in faults)
    code = "unsupported_parameter" if unsupported else "invalid_value"
    return JSONResponse(error_body(message, status=400, code=code, param=_field(faults[0]["loc"])), 400)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES_BY_STATUS.get(error.status_code, "http_error")
    message = f"{error.detail}: {request.method} {request.url.path}"
    body = error_body(message, status=error.status_code, code=code)
    headers = error.headers
    if error.status_code == 405 and (methods := _allowed_methods(request)):
        headers = {"allow": ", ".join(methods)}
    return JSONResponse(body, error.status_code, headers)


def _allowed_methods(request: Request) -> list[str]:
    """Of all routes that have the path: Starlette names those of the first only. A mount names its own."""
    root = request.scope.get("app_root_path", request.scope.get("root_path", ""))  # before a mount took its part
    scopes = {method: dict(request.scope) | {"method": method, "root_path": root} for method in METHODS}
    routes = [route for route in request.app.router.routes if not isinstance(route, Mount)]
    return [name for name, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes)]


def _sentence(fault: Mapping[str, Any]) -> str:
    field = _field(fault["loc"])
    message = f"the body is not JSON: {fault['ctx']['error']}" if fault["type"] == "json_invalid" else fault["msg"]
    message = message.removeprefix("Value error, ")
    return f"{field}: {message}" if field else message


def _field(location: Sequence[str | int]) -> str | None:
    """`messages.0.role` of a location; the names of union members and of the body itself are left out."""
    parts = [str(part) for part in location[1:] if FIELD_NAME.fullmatch(str(part))]
    named = bool(parts) and not parts[0].isdigit()
    return ".".join(parts) if named else None


def type_of(status: int) -> str:
    """OpenAI's word for a status."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
