"""TCP ports of this machine: a free one, and whether a certain one is free."""

from __future__ import annotations

import random
import socket

from rayapp.errors import ClusterError, InputError

_LOWEST, _HIGHEST = 20_000, 32_767
"""Ports below those that systems hand out by themselves, above those of Ray's workers: one that is
free now is still free when its user listens, whatever connects in between."""
_TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """Choose a port at random on which nothing listens now.

    Args:
        host: The address of this machine at which the port has to be free.

    Raises:
        ClusterError: All ports that were tried are taken.
    """
    for port in random.SystemRandom().sample(range(_LOWEST, _HIGHEST + 1), _TRIES):
        if _refusal(host, port) is None:
            return port
    raise ClusterError(
        f"{_TRIES} ports of {host} between {_LOWEST} and {_HIGHEST} are all taken; end some of the "
        "processes that listen there"
    )


def check_port(host: str, port: int) -> None:
    """Raise :class:`InputError` if no service can listen on this port of this machine."""
    refusal = _refusal(host, port)
    if refusal is not None:
        raise InputError(
            f"cannot listen on {host}:{port} ({refusal}); choose another --port or --host"
        )


def _refusal(host: str, port: int) -> str | None:
    """Why no socket can be bound to a port; None where one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None
