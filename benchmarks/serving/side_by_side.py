"""Services that run at the same time, so that one request after another can be asked of all.

A machine's speed changes within minutes. Requests that take turns between services see the same
speed; a service that is measured after another does not.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection

from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import ClusterError
from serving.client import Server
from serving.services import served

_START_S = 300.0
_END_S = 120.0


@contextmanager
def side_by_side(services: Mapping[str, ServiceSettings]) -> Iterator[dict[str, Server]]:
    """Our services by name, each on local nodes of its own, which end with the context.

    Ray connects a process to one cluster, so every service has a process of its own. They start
    one after the other, because a start uses all cores.

    Raises:
        ClusterError: A service did not start in time.
    """
    spawn = multiprocessing.get_context("spawn")
    running: list[tuple[Connection, multiprocessing.process.BaseProcess]] = []
    servers = {}
    try:
        for name, settings in services.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(name, settings, theirs))
            process.start()
            theirs.close()
            running.append((ours, process))
            servers[name] = _ready(name, ours)
        yield servers
    finally:
        for connection, process in running:
            connection.close()  # The process reads its end.
            process.join(_END_S)
            if process.is_alive():
                process.terminate()
                process.join()


def _ready(name: str, connection: Connection) -> Server:
    try:
        if connection.poll(_START_S):
            server: Server = connection.recv()
            return server
    except EOFError:
        pass
    raise ClusterError(f"the service {name!r} did not start; its own output says why")


def _serve(name: str, settings: ServiceSettings, connection: Connection) -> None:
    """Serve until the other side of the connection is closed."""
    with served(settings, name) as server:
        connection.send(server)
        try:
            connection.recv()
        except EOFError:
            return
