"""Two ASGI layers in front of every route: one checks the API key, one limits body sizes."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayapp.api.keys import digest_of
from rayapp.api.refusals import error_response

OPEN_PATHS = frozenset({"/health"})
MAX_BODIES = 16
"""Number of bodies of the largest size that may be kept at once (project default)."""


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
    """ASGI layer that bounds the bytes of one body, and of all bodies that are held at once.

    A body that is too large is refused without being kept. One that comes while those of requests
    under way leave too little room is refused for the moment, before anybody reads it.

    Args:
        app: The app behind.
        max_bytes: Most bytes of one body.
        max_bodies: Number of bodies of that size that may be kept at once.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_bodies: int = MAX_BODIES) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_held = max_bodies * max_bytes
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 or 429 if the declared length is too large; else count what is read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        refused = self._refusal(int(declared[:20]) if declared.isdecimal() else 0)
        if refused is not None:
            await error_response(refused[1], refused[0])(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            refused = self._refusal(num_bytes + size, num_bytes)
            if refused is not None:
                raise HTTPException(*refused)
            num_bytes += size
            self._held += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._held -= num_bytes

    def _refusal(self, num_bytes: int, num_held: int = 0) -> tuple[int, str] | None:
        """Status and message that refuse a body, of which ``num_held`` bytes are held already."""
        if num_bytes > self._max_bytes:
            return 413, f"a body has at most {self._max_bytes} bytes; send less at once"
        if self._held + num_bytes - num_held > self._max_held:
            return 429, (
                f"requests under way hold {self._held} bytes of at most {self._max_held}; "
                "try again later"
            )
        return None
