"""What a service and its cluster hold on this machine, while nobody asks anything of it."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import httpx
import psutil
import ray

from rayapp.distributed.serve.settings import DECODE, INGRESS, PREFILL
from serving.client import Server
from serving.services import held

_IDLE_WITHIN_S = 60.0
_MB = 1e6
_REPLICA = "ServeReplica"


def idle_sample(server: Server) -> dict[str, float]:
    """All quantities once nothing is under way any more; after a minute, as they are then."""
    until_s = time.monotonic() + _IDLE_WITHIN_S
    while any((counts := held((INGRESS, PREFILL, DECODE))).values()):
        if time.monotonic() > until_s:
            break
        time.sleep(0.2)
    pages = _pages_used(server)
    return {
        **_processes(),
        "object store, MB": _stored_mb(),
        "pages of KV, share": pages,
        **{name.replace("_", " "): float(value) for name, value in counts.items()},
    }


def _processes() -> dict[str, float]:
    """Memory and open files of replicas, and of Ray's own processes.

    Memory is what belongs to a process alone: the object store is shared, and counted apart.
    """
    sums = dict.fromkeys(("replicas", "Ray"), 0.0)
    files = dict.fromkeys(sums, 0.0)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            kind = "replicas" if _REPLICA in process.cmdline()[0] else "Ray"
            sums[kind] += process.memory_full_info().uss / _MB
            files[kind] += process.num_fds()
    return {
        **{f"memory of {kind}, MB": value for kind, value in sums.items()},
        **{f"open files of {kind}": value for kind, value in files.items()},
    }


def _stored_mb() -> float:
    """What all object stores hold."""
    name = "object_store_memory"
    return (ray.cluster_resources()[name] - ray.available_resources().get(name, 0.0)) / _MB


def _pages_used(server: Server) -> float:
    """The largest share of pages in use of any replica."""
    pools: dict[str, Any] = httpx.get(f"{server.url}/health", timeout=60.0).json()["pools"]
    return max(replica["kv_usage"] for replicas in pools.values() for replica in replicas)
