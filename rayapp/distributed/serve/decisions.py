"""The last decisions about pools, in words, where every process of the cluster can read them.

The policy runs in Serve's controller, people look at the ingress and at ``rayapp serve``. Ray's own
key-value store is between them; a named actor was rejected, because it would take a place of its
own on the cluster for a few words.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_KEY = b"decisions"
_NAMESPACE = b"rayapp"
_MOST = 20


@dataclass(frozen=True)
class Told:
    """One decision in words: when it was made (Unix time), about which pool, and why."""

    at_s: float
    pool: str
    text: str


def publish(pool: str, text: str) -> None:
    """Add a decision; a store that cannot be reached costs no more than the words."""
    try:
        entry = {"at_s": time.time(), "pool": pool, "text": text}
        entries = [*_read(), entry][-_MOST:]
        _store()._internal_kv_put(_KEY, json.dumps(entries).encode(), namespace=_NAMESPACE)
    except Exception:
        logger.exception("a decision could not be published")


def read() -> list[Told]:
    """The last decisions, oldest first; none if the store cannot be reached."""
    try:
        return [Told(**entry) for entry in _read()]
    except Exception:  # noqa: BLE001 - words for people must not end a service
        return []


def clear() -> None:
    """Forget all decisions, those of an earlier service."""
    try:
        _store()._internal_kv_del(_KEY, namespace=_NAMESPACE)
    except Exception:
        logger.exception("earlier decisions could not be forgotten")


def _read() -> list[dict[str, Any]]:
    found = _store()._internal_kv_get(_KEY, namespace=_NAMESPACE)
    return list(json.loads(found)) if found else []


def _store() -> Any:
    """The store, which Ray opens with the connection of this process."""
    from ray.experimental import internal_kv

    return internal_kv
