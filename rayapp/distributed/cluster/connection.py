"""A connection to a Ray cluster, refused soon where nobody, or somebody else, listens.

``ray.init`` tries for minutes to reach an address that is dead, or that another program answers at,
and then ends the process.
"""

from __future__ import annotations

import io
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any

import ray

from rayapp.errors import ClusterError

REACH_TIMEOUT_S = 5.0
"""How long a cluster's address may take to accept a connection (project default)."""
ANSWER_TIMEOUT_S = 20.0
"""How long whoever accepted it may take to greet; a busy Ray is slow, too (project default)."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client, as of gRPC, says first: that it is one, and an empty frame of settings."""

_SETTINGS = 4


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
    """Raise ``OSError`` where an address of the form ``host:port`` is not Ray's."""
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS")  # where Ray will look
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    with socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", "false"):
            _greet(connection)


def _greet(connection: socket.socket) -> None:
    """Raise ``OSError`` where the other side is no gRPC server, which answers with its settings."""
    connection.settimeout(ANSWER_TIMEOUT_S)
    connection.sendall(_PREFACE)
    try:
        frame = connection.recv(9)  # length, type, flags, stream
    except TimeoutError:
        raise TimeoutError(f"what listens there said nothing in {ANSWER_TIMEOUT_S:g} s") from None
    if len(frame) < 4 or frame[3] != _SETTINGS:
        raise ConnectionError("what listens there is not Ray")


def hushed() -> AbstractContextManager[Any]:
    """Hide standard output: Ray prints a controller's intended end as if a task had failed."""
    return redirect_stdout(io.StringIO())
