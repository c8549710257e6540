"""API keys as a server keeps them."""

from __future__ import annotations

import hashlib


def digest_of(api_key: str) -> str:
    """What a server keeps of a key: enough to recognise it, useless to whoever reads a log."""
    return hashlib.sha256(api_key.encode()).hexdigest()
