"""Two ASGI layers in front of every route: one checks the API key, one limits body sizes."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.api.keys import digest_of
from rayapp.api.refusals import error_response

OPEN_PATHS = frozenset({"/health"})


def is_authorized(headers: Headers, key_digest: str | None) -> bool:
    """True if the headers carry the key, or if the server has none."""
    if key_digest is None:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    matches = hmac.compare_digest(digest_of(given.strip()), key_digest)
    return matches and scheme.lower() == "bearer"


class RequireKey:
    """ASGI layer that refuses requests without the key, except for the paths in ``OPEN_PATHS``."""

    def __init__(self, app: ASGIApp, key_digest: str) -> None:
        self._app = app
        self._key_digest = key_digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request to the app; answer any other one with 401."""
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
    """ASGI layer that refuses bodies of more than ``max_bytes`` without keeping them."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 if the declared length is too large; else count the bytes being read."""
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
