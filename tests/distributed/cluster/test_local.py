"""Local clusters: real nodes with labels, and nothing left of them."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from rayapp.distributed.cluster.local import STAGE_NODES

pytestmark = pytest.mark.ray

PROGRAM = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore it
from rayapp.distributed.cluster.local import local_cluster
with local_cluster() as cluster:
    print("up", flush=True)
    time.sleep(600)
"""


def test_every_node_has_its_address_and_label(cluster):
    import ray

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    found = [
        (nodes[n.node_id]["NodeManagerAddress"], nodes[n.node_id]["Labels"]["role"])
        for n in cluster.nodes[: len(STAGE_NODES)]
    ]
    assert found == [("127.0.0.2", "head"), ("127.0.0.3", "prefill"), ("127.0.0.4", "decode")]


def test_a_node_greets_as_a_connection_expects(cluster):
    from rayapp.distributed.cluster import connection

    connection._reach(cluster.address)


@pytest.mark.slow  # `rayapp serve` is such a program, and one of the quick tests interrupts it
def test_no_process_is_left_behind_by_an_interrupt():
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline().strip() == b"up"
        processes = psutil.Process(program.pid).children(recursive=True)
        assert len(processes) > 3
        program.send_signal(signal.SIGINT)
        program.wait(60)
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive
