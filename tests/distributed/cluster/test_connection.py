"""A cluster's address is refused soon where nobody listens, or where it is not Ray that does."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from rayapp.distributed.cluster import connection
from rayapp.distributed.cluster.connection import connected
from rayapp.errors import ClusterError

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def listener(answer: bytes | None):
    """The address of a program that accepts one connection, hears it out, and answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def serve():
            with server.accept()[0] as accepted, suppress(ConnectionError):
                accepted.recv(1024)
                if answer is not None:
                    accepted.sendall(answer)
                accepted.recv(1024)  # until the other side leaves

        thread = threading.Thread(target=serve)
        thread.start()
        yield "{}:{}".format(*server.getsockname())
        thread.join()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is not Ray"),
        (b"", "what listens there said nothing in 0.3 s"),
    ],
)
def test_another_program_is_not_taken_for_a_cluster(monkeypatch, answer, reason):
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT_S", 0.3)
    began = time.monotonic()
    with (
        listener(answer) as address,
        pytest.raises(ClusterError, match=f"no Ray cluster at {address} .*{reason}.*or stay here"),
        connected(address, otherwise="stay here"),
    ):
        pass
    assert time.monotonic() - began < 30


def test_the_address_that_ray_takes_from_the_environment_is_checked(monkeypatch):
    with listener(b"SSH-2.0-OpenSSH") as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(ClusterError, match="what listens there is not Ray"),
            connected("auto", otherwise="stay here"),
        ):
            pass


def test_who_greets_like_grpc_passes():
    with listener(SETTINGS) as address:
        connection._reach(address)
