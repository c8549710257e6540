"""Who may call, and how much a caller may send: plain ASGI, in front of every route."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.api.keys import digest_of
from rayapp.api.refusals import error_response

OPEN_PATHS = frozenset({"/health"})


def is_authorized(headers: Headers, key_digest: str | None) -> bool:
    """Whether the headers carry the key; without a key, everyone may call."""
    if key_digest is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    matches = hmac.compare_digest(digest_of(given.strip()), key_digest)
    return matches and scheme.lower() == "bearer"


class RequireKey:
    """Refuses every path without the key, those of ``OPEN_PATHS`` excepted."""

    def __init__(self, app: ASGIApp, key_digest: str) -> None:
        self._app = app
        self._key_digest = key_digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        allowed = scope["type"] == "lifespan" or (
            scope["type"] == "http"
            and (
                scope["path"] in OPEN_PATHS or is_authorized(Headers(scope=scope), self._key_digest)
            )
        )
        if allowed:
            await self._app(scope, receive, send)
            return
        refusal = error_response(
            "this server needs its API key; send it as `Authorization: Bearer KEY`",
            401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal(scope, receive, send)


class LimitBody:
    """Refuses bodies of more than ``max_bytes``, declared or not, without keeping them."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on small bodies, count large ones."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            await error_response(self._message, 413)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"a body has at most {self._max_bytes} bytes; send less at once"
