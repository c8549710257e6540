"""A connection to a Ray cluster, refused at once where nobody listens.

``ray.init`` tries for minutes to reach an address that is dead, and some versions end the process.
"""

from __future__ import annotations

import io
import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any

import ray

from rayapp.errors import ClusterError

REACH_TIMEOUT_S = 5.0
"""How long a cluster's address may take to accept a connection (project default)."""


@contextmanager
def connected(
    address: str | None, *, otherwise: str, log_to_driver: bool = False
) -> Iterator[None]:
    """Connect this process to a cluster while the context lasts; keep an existing connection.

    Args:
        address: ``host:port``, or another address that ``ray.init`` takes; None looks for a
            running cluster or starts one.
        otherwise: The alternative that the error suggests to the user.
        log_to_driver: Whether the output of workers is printed here.

    Raises:
        ClusterError: There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"no Ray cluster at {address or 'the default address'} ({reason}); start one with "
            f"`ray start --head`, or {otherwise}"
        ) from None
    try:
        yield
    finally:
        with hushed():
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise ``OSError`` where an address of the form ``host:port`` accepts no connection."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()


def hushed() -> AbstractContextManager[Any]:
    """Hide standard output: Ray prints a controller's intended end as if a task had failed."""
    return redirect_stdout(io.StringIO())
