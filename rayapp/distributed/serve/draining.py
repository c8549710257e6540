"""A service that is to end answers what it has begun, and refuses what comes later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayapp.distributed.serve.settings import APP_NAME, INGRESS

logger = logging.getLogger(__name__)
_POLL_S = 0.2
_CALL_S = 5.0


def drain(limit_s: float, say: Callable[[str], None]) -> bool:
    """Have every ingress replica refuse new requests, and wait for the answers under way.

    Args:
        limit_s: Longest wait, seconds.
        say: Function that shows a line to the person at the terminal.

    Returns:
        True if all answers have ended; False if time was up, or the ingress cannot be asked.
    """
    until_s, said = time.monotonic() + limit_s, False
    with suppress(RayError, RayServeException, TimeoutError):
        handle = serve.get_deployment_handle(INGRESS, APP_NAME)
        # No event loop runs here, and in its throughput mode Serve gives a handle none of its own.
        handle._init(_run_router_in_separate_loop=True)
        while True:
            num_answers = sum(_ask(handle, "drain"))
            if not num_answers or time.monotonic() > until_s:
                return not num_answers
            if not said:
                say(
                    f"{num_answers} answers go on, for at most {limit_s:g} s; interrupt again to "
                    "end them now"
                )
                said = True
            time.sleep(_POLL_S)
    return False


def _ask(handle: Any, method: str) -> list[int]:
    """The answers of all replicas; those that have gone have none."""
    answers = handle.broadcast(method).results(timeout_s=_CALL_S, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, int)]
