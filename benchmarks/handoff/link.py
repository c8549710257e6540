"""A slower link to one node of a local cluster, by the traffic control of Linux; it needs root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_DEVICE = "lo"


@contextmanager
def shaped(address: str, gbit_per_s: float | None) -> Iterator[None]:
    """Limit what this machine sends to an address of its own while the context lasts.

    Args:
        address: The address, of a node that nothing else uses.
        gbit_per_s: The rate of the link; None changes nothing.
    """
    if gbit_per_s is None:
        yield
        return
    rate = f"{gbit_per_s * 1000:g}mbit"
    try:
        _tc(f"qdisc add dev {_DEVICE} root handle 1: htb default 10")
        _tc(
            f"class add dev {_DEVICE} parent 1: classid 1:20 htb quantum 200000 rate {rate} "
            "burst 256k cburst 256k"
        )
        _tc(
            f"filter add dev {_DEVICE} parent 1: protocol ip prio 1 u32 match ip dst {address}/32 "
            "flowid 1:20"
        )
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", _DEVICE, "root"], check=False)


def _tc(command: str) -> None:
    done = subprocess.run(["tc", *command.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"a link cannot be slowed down here ({done.stderr.strip()}); it takes Linux, tc and "
            "root: run without --links"
        )
