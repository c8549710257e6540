"""The memory that a replica gives to the KV of its running sequences."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.sequences.memory import KVMemory

_SHARE_OF_CPU = 0.25
"""Share of the free memory of a machine that one replica takes, beside others (project default)."""

_SHARE_OF_GPU = 0.8
"""Share of the free memory of a GPU; the rest is for activations (project default)."""


def kv_memory(settings: ServiceSettings, device: torch.device) -> KVMemory:
    """The memory for KV: as many bytes as the settings say, or a share of what is free.

    Args:
        settings: The settings of the service.
        device: The device of the stage, whose weights are loaded.
    """
    num_bytes: int | None = settings.kv_memory
    if num_bytes is None:
        share = _SHARE_OF_GPU if device.type == "cuda" else _SHARE_OF_CPU
        num_bytes = int(share * free_bytes(device))
    return KVMemory(num_bytes=num_bytes, block_size=settings.block_size)


def free_bytes(device: torch.device) -> int:
    """Number of bytes that a device, or this machine or container, has free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
