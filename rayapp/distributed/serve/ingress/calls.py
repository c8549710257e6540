"""Calls from the ingress to replicas: all of them are made here.

Serve takes a call's internal id from the context of the HTTP request that is being served, so all
calls of one HTTP request share it. A router without Serve's FIFO mixin finds pending calls by that
id alone: of two that are pending at once it knows the first only. The second is never routed and
never fails, and the first may get the replica that was chosen for the second. A request with
several answers makes such calls all the time, so every call gets an internal id of its own here.

Two other ways were rejected. A router with books of its own would override private methods, which
changed between Ray 2.55 and 2.60; this field of the context did not. A call from an empty context
would get new ids without a private name, but would lose the public request id, which groups the
logs and traces of one HTTP request.

One feature is given up: Serve cancels the pending calls of a cancelled HTTP request by this id.
Instead, the code that awaits a call here cancels it, whatever ends the wait.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from typing import Any

from ray.serve.context import _get_serve_request_context, _serve_request_context

from rayapp.distributed.serve.messages import ANY, Address

logger = logging.getLogger(__name__)
_BROADCAST_S = 3.0


def call(method: Any, *arguments: Any, address: Address = ANY) -> Any:
    """Call a replica's method; the call is on its way when this returns Serve's response.

    Args:
        method: Serve's handle of the method, such as ``handle.admit``.
        arguments: Arguments of the method beside the address.
        address: The address of the replica that the call is for.
    """
    context = replace(_get_serve_request_context(), _internal_request_id=uuid.uuid4().hex)
    outside = _serve_request_context.set(context)
    try:
        return method.remote(*arguments, address=address)
    finally:
        _serve_request_context.reset(outside)


async def ask_all(
    handle: Any, method: str, *arguments: Any, within_s: float = _BROADCAST_S
) -> list[Any]:
    """Answers of all replicas of a deployment; a replica that does not answer in time is left out.

    No router chooses here: Serve sends one call to every replica, under an id of its own.
    """
    try:
        response = handle.broadcast(method, *arguments)
        answers = await response.results_async(timeout_s=within_s, return_exceptions=True)
    except Exception as error:  # noqa: BLE001 - a pool that cannot be asked has no replicas
        logger.debug("%s of %s: %s", method, handle, error)
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]
