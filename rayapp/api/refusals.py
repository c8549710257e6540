"""Error bodies for OpenAI's clients: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.errors import RayappError

_LOG = logging.getLogger(__name__)
MAX_MESSAGE_CHARS = 1000
RETRY_AFTER_S = 1
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_INTERNAL = "the server failed; its log says why"


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON body of an error: one line, never longer than ``MAX_MESSAGE_CHARS``."""
    line = " ".join(message.encode("utf-8", "replace").decode("utf-8").split())
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    if len(line) > MAX_MESSAGE_CHARS:
        line = line[: MAX_MESSAGE_CHARS - 1] + "…"
    return {"error": {"message": line, "type": kind, "param": param, "code": code or status}}


def error_response(
    message: str,
    status: int,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
    retry_after_s: int = RETRY_AFTER_S,
) -> JSONResponse:
    """An error response; a status that may pass by itself carries the header ``Retry-After``."""
    retry = {"Retry-After": str(retry_after_s)} if status in (429, 503) else {}
    body = error_body(message, status, param=param, code=code)
    return JSONResponse(body, status_code=status, headers=retry | (headers or {}))


def error_body_of(error: Exception) -> dict[str, Any]:
    """The body for an exception in the middle of a stream, whose status has long been sent."""
    if isinstance(error, RayappError):
        return error_body(str(error), error.status)
    _LOG.error("a stream ended with an error that nobody expected", exc_info=error)
    return error_body(_INTERNAL, 500)


def install_error_handlers(app: FastAPI) -> None:
    """Turn every exception of a route into an error body in OpenAI's form."""
    app.add_exception_handler(RayappError, _on_rayapp_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(AnswerBugs)


def _on_rayapp_error(_: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status", 500)
    if status >= 500:
        _LOG.warning("%s: %s", type(error).__name__, error)
    again_s = getattr(error, "retry_after_s", RETRY_AFTER_S)
    param = getattr(error, "param", None)
    return error_response(str(error), status, param=param, retry_after_s=again_s)


def _on_http_exception(_: Request, error: Exception) -> JSONResponse:
    status, headers = getattr(error, "status_code", 500), getattr(error, "headers", None)
    return error_response(str(getattr(error, "detail", error)), status, headers=headers)


class AnswerBugs:
    """ASGI layer that logs an unexpected exception, answers 500 and keeps the connection.

    Starlette's own handler of ``Exception`` raises it again, which costs the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app; an exception becomes an answer unless the answer has already begun."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if begun or scope["type"] != "http":
                raise
            _LOG.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(_INTERNAL, 500)(scope, receive, send)


def _on_invalid_request(_: Request, error: Exception) -> JSONResponse:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    path = [str(part) for part in first.get("loc", ()) if part != "body"]
    rule = str(first.get("msg", error)).removeprefix("Value error, ")
    if first.get("type") == "json_invalid":
        reason = first.get("ctx", {}).get("error", rule)
        return error_response(f"the body is not JSON: {reason} at character {path[-1]}", 400)
    if not path and first.get("type") != "value_error":
        return error_response(
            "the body is not a JSON object; send one, with Content-Type: application/json", 400
        )
    param = ".".join(path) or None
    return error_response(f"{param}: {rule}" if param else rule, 400, param=param)
