"""``rayapp doctor`` checks whether this machine, or a cluster, can run the other commands.

Every check runs a small piece of the real work: the shipped model answers a question, bytes travel
between Ray nodes. Limits are project defaults.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from packaging.requirements import Requirement
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayapp.distributed.cluster.connection import connected
from rayapp.distributed.cluster.local import STAGE_NODES, local_cluster
from rayapp.distributed.cluster.nodes import free_nodes
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.checkpoint import CONFIG_FILE, Checkpoint, read_config
from rayapp.models.hub import locate
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan
from rayapp.testbed import tasks, text_model_path

Status = Literal["ok", "warning", "failed"]

_MIB = 1 << 20
MIN_FREE_BYTES = 2 << 30
"""Least free memory, and least free disk for Ray's sessions: the demo's need, with some room."""

MOVED_BYTES = 8 * _MIB
"""Number of bytes sent from node to node: too many for a message that Ray inlines."""


@dataclass(frozen=True)
class Finding:
    """The result of one check, with a remedy if all is not well."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(
    model: str | Path | None = None,
    plan: Path | None = None,
    address: str | None = None,
    *,
    revision: str | None = None,
) -> Iterator[Finding]:
    """Run all checks and yield their findings one by one.

    Args:
        model: A model directory or Hub id to check; its weights are not loaded.
        plan: A plan that should fit the model.
        address: A Ray cluster to check; None starts a local one of three nodes for a moment.
        revision: The revision of a Hub id.
    """
    yield from guarded("packages", _packages)
    yield from guarded("torch", _device)
    yield from guarded("memory", _memory)
    yield from guarded("disk", _disk)
    yield from guarded("shipped model", _shipped_model)
    if model is not None:
        yield from guarded("model", lambda: _model(locate(str(model), revision).directory, plan))
    yield from guarded("ray", lambda: _cluster(address))


def guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Turn the exception of a check into a finding, so that the other checks still run."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001 - any failure is a finding of the doctor
        first_line = (str(error).strip().splitlines() or [""])[0]
        yield Finding(name, "failed", f"{type(error).__name__}: {first_line}")


def _packages() -> Iterator[Finding]:
    """Check Python and every dependency against the declared requirements of this version."""
    wanted = [Requirement(text) for text in metadata.requires("rayapp") or ()]
    always = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = []
    for need in always:
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing (needs {need.specifier})")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} (needs {need.specifier})")
    found = f"Python {platform.python_version()}, {len(always)} packages"
    if wrong:
        remedy = "install again under cluster/constraints.txt"
        yield Finding("packages", "failed", "; ".join(wrong), remedy)
    else:
        yield Finding("packages", "ok", found)


def _device() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        yield Finding("torch", "ok", f"{torch.__version__}, {cores} cores, {', '.join(names)}")
    elif torch.version.cuda:
        yield Finding(
            "torch",
            "warning",
            f"{torch.__version__} was built for CUDA {torch.version.cuda} and finds no GPU",
            "look at nvidia-smi and the driver; without a GPU the CPU build is gigabytes smaller",
        )
    else:
        yield Finding("torch", "ok", f"{torch.__version__}, {cores} cores, no GPU")


def _memory() -> Iterator[Finding]:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    shared = Path("/dev/shm")
    free_shared = shutil.disk_usage(shared).free if shared.is_dir() else available
    needed = sum(node.object_store_bytes for node in STAGE_NODES)
    found = f"{available / 2**30:.1f} GiB free, {free_shared / 2**30:.1f} GiB of them shared"
    if free_shared < needed:
        yield Finding(
            "memory",
            "warning",
            found,
            f"local nodes keep up to {needed // _MIB} MiB of KV in /dev/shm, else on disk: "
            "make it larger (docker run --shm-size)",
        )
    elif available < MIN_FREE_BYTES:
        yield Finding("memory", "warning", found, "the demo wants 2 GiB free; end other programs")
    else:
        yield Finding("memory", "ok", found)


def _disk() -> Iterator[Finding]:
    directory = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    usage = shutil.disk_usage(directory)
    found = f"{usage.free / 2**30:.1f} GiB free in {directory}"
    if usage.free < MIN_FREE_BYTES or usage.free < 0.05 * usage.total:
        remedy = "Ray stops spilling and logging at 95 % full; free some, or set RAY_TMPDIR"
        yield Finding("disk", "warning", found, remedy)
    else:
        yield Finding("disk", "ok", found)


def _shipped_model() -> Iterator[Finding]:
    """Answer the question of a test example through both stages."""
    (example,) = tasks.generate("copy", "test", 1, 0)
    loaded = load_model(text_model_path())
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer)
    (answer,) = pipeline.generate([example.prompt], SamplingParams(max_tokens=16))
    found = f"asked to copy {example.completion!r}, it answered {answer.text!r}"
    if answer.text == example.completion:
        yield Finding("shipped model", "ok", found)
    else:
        remedy = "the files of rayapp/testbed/text may be damaged: install again"
        yield Finding("shipped model", "failed", found, remedy)


def _model(path: Path, plan: Path | None) -> Iterator[Finding]:
    if not list(path.glob("*.safetensors")) and (path / CONFIG_FILE).is_file():
        read_config(path)
        remedy = "fetch the *.safetensors files too; sizes are told by the configuration alone"
        yield Finding("model", "warning", "a configuration without weights", remedy)
        return
    signature = Checkpoint(path).signature()
    found = f"{signature.model_type} of {signature.num_blocks} blocks"
    if plan is not None:
        chosen = PruningPlan.load(plan)
        chosen.check_model(signature)
        found += f"; plan {chosen.fingerprint} fits it"
    yield Finding("model", "ok", found)


def _cluster(address: str | None) -> Iterator[Finding]:
    context = local_cluster() if address is None else nullcontext()
    started = time.perf_counter()
    with context as cluster:
        where = address if cluster is None else cluster.address
        with connected(where, otherwise="leave --address out to try a local one"):
            nodes = free_nodes()
            seconds = time.perf_counter() - started
            which = f"cluster at {address}" if address else "local cluster"
            yield Finding("ray", "ok", f"{which} of {len(nodes)} nodes, up in {seconds:.1f} s")
            yield _roles(nodes)
            yield _transfer(nodes)


def _roles(nodes: list[Any]) -> Finding:
    """Check that the cluster has the nodes on which `serve` places its pools."""
    counts = {
        role: sum(node.labels.get("role") == role for node in nodes)
        for role in ("prefill", "decode")
    }
    found = ", ".join(f"{count} for {role}" for role, count in counts.items())
    if all(counts.values()):
        return Finding("roles", "ok", found)
    remedy = (
        "serve needs both: ray start --labels role=prefill, and role=decode (or --mode unified)"
    )
    return Finding("roles", "warning", found, remedy)


def _transfer(nodes: list[Any]) -> Finding:
    """Send bytes from one node's object store to another's, as KV travels."""
    if len(nodes) < 2:
        return Finding("transfer", "warning", "one node only: nothing to measure", "add a node")
    first, last = (
        ray.remote(num_cpus=0)(function).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        )
        for function, node in ((_make, nodes[-2]), (_take, nodes[-1]))
    )
    ray.get(last.remote([ray.put(np.ones(1))]))  # This starts the worker before the clock runs.
    made = first.remote(MOVED_BYTES)
    ray.wait([made], fetch_local=False)
    size, seconds = ray.get(last.remote([made]))
    if size != MOVED_BYTES:
        return Finding("transfer", "failed", f"{size} of {MOVED_BYTES} bytes arrived")
    rate = size / seconds / 1e9
    found = f"{size / 1e6:.1f} MB between two nodes in {seconds * 1000:.0f} ms ({rate:.2f} GB/s)"
    return Finding("transfer", "ok", found)


def _make(num_bytes: int) -> Any:
    return np.ones(num_bytes, dtype=np.uint8)


def _take(references: list[Any]) -> tuple[int, float]:
    """Fetch an array from another node's store; return its sum, and the seconds of the fetch."""
    started = time.perf_counter()
    fetched = ray.get(references[0])
    return int(fetched.sum()), time.perf_counter() - started
