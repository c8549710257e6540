"""API keys as a server keeps them."""

from __future__ import annotations

import hashlib


def digest_of(api_key: str) -> str:
    """Digest of a key: it recognises the key, and is useless to a reader of logs."""
    return hashlib.sha256(api_key.encode()).hexdigest()
