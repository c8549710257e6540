"""The document at ``/openapi.json``: every answer that a route may give, refusals included."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_JSON, _EVENTS = "application/json", "text/event-stream"
# Any route may be asked without the key, by a method that it has not, or with too large a body.
_ALWAYS = (400, 401, 405, 413, 500)
_WORKS = (*_ALWAYS, 404, 429, 503, 504)
_ANSWERS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "/v1/completions": ((_JSON, _EVENTS), _WORKS),
    "/v1/chat/completions": ((_JSON, _EVENTS), _WORKS),
    "/tokenize": ((_JSON,), _WORKS),
    "/detokenize": ((_JSON,), _WORKS),
    "/v1/models": ((_JSON,), _ALWAYS),
    "/v1/models/{name}": ((_JSON,), (*_ALWAYS, 404)),
    "/v1/transfers": ((_JSON,), (*_ALWAYS, 503)),
    "/health": ((_JSON,), (*_ALWAYS, 503)),
    "/metrics": (("text/plain",), (*_ALWAYS, 503)),
    "/": (("text/html",), (*_ALWAYS, 503)),
}
"""The content types of every route's answers, and the statuses of its refusals."""


def document(app: FastAPI) -> None:
    """Have ``app`` describe every route with all its answers; what FastAPI assumes is left out."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = _ERROR
    for path, operations in found["paths"].items():
        types, statuses = _ANSWERS[path]
        for operation in operations.values():
            operation["responses"] = _responses(path, types, statuses)
    return found


def _responses(path: str, types: tuple[str, ...], statuses: tuple[int, ...]) -> dict[str, Any]:
    good = {"type": "string"} if types[0].startswith("text/") else {"type": "object"}
    responses: dict[str, Any] = {
        "200": {
            "description": "The answer.",
            "content": {kind: {"schema": good if kind == types[0] else {}} for kind in types},
        }
    }
    for status in sorted(statuses):
        # Where nothing answers yet, /health says so in its own form.
        own_form = path == "/health" and status == 503
        schema = {"type": "object"} if own_form else {"$ref": "#/components/schemas/Error"}
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase + ".",
            "content": {_JSON: {"schema": schema}},
        }
    return responses
