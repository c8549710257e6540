"""Whether the replicas of a service fit their devices, for ``rayapp doctor``; nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from rayapp.distributed.serve.settings import SizeSettings
from rayapp.models.architecture import text_config
from rayapp.models.checkpoint import read_config
from rayapp.models.footprint import Footprint, Limits, footprint, parts_of
from rayapp.models.hub import locate
from rayapp.plan import PruningPlan
from rayapp.workflows.doctor import Finding, guarded

_GIB = 1 << 30

_AtLength = Callable[[int], Footprint]
"""The footprint of a replica under another ``--max-model-len``."""


def examine_sizes(
    model: str, plan: Path | None, sizes: SizeSettings, *, revision: str | None = None
) -> Iterator[Finding]:
    """Compare what each kind of replica holds with its device; ``config.json`` suffices."""
    yield from guarded("sizes", lambda: _replicas(locate(model, revision).directory, plan, sizes))


def _replicas(directory: Path, plan: Path | None, sizes: SizeSettings) -> Iterator[Finding]:
    config = read_config(directory)
    chosen = PruningPlan.load(plan) if plan else PruningPlan()
    length = sizes.max_model_len or text_config(config).max_position_embeddings
    memory = int(sizes.memory or _free_bytes(sizes.device))
    for part in parts_of(sizes.mode):

        def at(max_model_len: int, part=part) -> Footprint:  # type: ignore[no-untyped-def]
            limits = Limits(max_model_len, sizes.max_num_seqs, sizes.max_num_batched_tokens)
            on_cpu = sizes.device == "cpu"
            return footprint(config, chosen, part, limits, dtype=sizes.dtype, on_cpu=on_cpu)

        held = at(length)
        fits = held.least_bytes <= memory
        yield _enough(held, memory) if fits else _too_little(held, memory, sizes, at)


def _enough(held: Footprint, memory: int) -> Finding:
    limits, tokens = held.limits, held.kv_tokens(memory)
    sequences = tokens // limits.max_model_len
    found = (
        f"weights take {_gib(held.weight_bytes)}, a step {_gib(held.step_bytes)}; KV of {tokens:,} "
        f"tokens fits into the {_gib(held.kv_bytes(memory))} left of {_gib(memory)}: {sequences:,} "
        f"sequences of {limits.max_model_len:,} tokens"
    )
    if sequences >= limits.max_num_seqs or held.part == "prefill":
        return Finding(f"{held.part} size", "ok", found)
    return Finding(
        f"{held.part} size",
        "warning",
        f"{found}, of {limits.max_num_seqs} that may run",
        "shorter ones run together as far as they fit; if all are long, lower --max-num-seqs or "
        "--max-model-len",
    )


def _too_little(held: Footprint, memory: int, sizes: SizeSettings, at: _AtLength) -> Finding:
    found = (
        f"weights take {_gib(held.weight_bytes)}, a step {_gib(held.step_bytes)}, KV of one "
        f"sequence of {held.limits.max_model_len:,} tokens {_gib(held.sequence_bytes)}: "
        f"{_gib(held.least_bytes - memory)} more than the {_gib(memory)} of the device"
    )
    ways = _ways(held, memory, sizes, at)
    return Finding(f"{held.part} size", "failed", found, "; or ".join(ways))


def _ways(held: Footprint, memory: int, sizes: SizeSettings, at: _AtLength) -> list[str]:
    """What helps, the cheapest first."""
    ways = []
    length = _length_that_fits(held, memory, at) if held.weight_bytes < memory else 0
    if length:
        ways.append(f"--max-model-len {length} fits")
    elif held.weight_bytes < memory:
        ways.append("lower --max-num-batched-tokens and --max-num-seqs, and --max-model-len")
    if sizes.dtype == "float32":
        ways.append("--dtype bfloat16 takes half of it")
    if held.part == "unified":
        ways.append("--mode disaggregated holds the blocks of one stage in a replica")
    return [*ways, "give the device more memory, or take a plan that removes more blocks"]


def _length_that_fits(held: Footprint, memory: int, at: _AtLength) -> int:
    """The largest length that was found to fit, by halves; 0 if none does."""
    low, high = 0, held.limits.max_model_len
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        if at(middle).least_bytes <= memory:
            low = middle
        else:
            high = middle
    return low


def _free_bytes(device: str) -> int:
    """Free memory of this machine's device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
