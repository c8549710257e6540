"""Ports: what is called free is free, and a port that something has is refused."""

from __future__ import annotations

import socket

import pytest

from rayapp.distributed.cluster.ports import check_port, free_port
from rayapp.errors import ClusterError, InputError


def test_a_free_port_is_none_that_the_system_hands_out():
    port = free_port()
    check_port("127.0.0.1", port)
    assert 20_000 <= port < 32_768


@pytest.mark.parametrize("shares", [False, True])
def test_a_port_on_which_something_listens_is_refused(shares):
    port = free_port()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares)
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port} .Address already"):
            check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(InputError, match="Cannot assign requested address"):
        check_port("192.0.2.1", 8000)
    with pytest.raises(ClusterError, match="all taken"):
        free_port("192.0.2.1")
