"""One load on one server: the replies, and the numbers of what it took."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from rayapp.models.tokenizer import load_tokenizer
from rayapp.simulation.traces import Arrival
from serving.client import Client, Reply, Server
from serving.load import load_numbers

Load = Callable[[Client], Awaitable[list[Reply]]]


@dataclass(frozen=True)
class Measured:
    """The replies to a load, and its numbers."""

    replies: list[Reply]
    numbers: dict[str, Any]


async def replies(
    arguments: Namespace,
    server: Server,
    arrivals: Sequence[Arrival],
    *,
    alone: bool,
    timeout_s: float,
) -> list[Reply]:
    """The replies to arrivals as they come, or to one after the other."""
    tokenizer = load_tokenizer(arguments.model)
    async with Client(server, tokenizer, arguments.seed, timeout_s) as client:
        if alone:
            return await client.closed_loop(arrivals, 1)
        return await client.open_loop(arrivals)


def under_load(arguments: Namespace, server: Server, load: Load) -> Measured:
    """Put a server under load, and count what our processes spend meanwhile.

    Args:
        arguments: Options: model, seed, timeout, limits.
        server: The server.
        load: What a client asks.
    """
    ttft_limit_s, tpot_limit_s = arguments.limits
    before = _spending(server)
    replies, span_s = asyncio.run(_timed(arguments, server, load))
    found = load_numbers(replies, span_s, ttft_limit_s=ttft_limit_s, tpot_limit_s=tpot_limit_s)
    spent = {name: value - before[name] for name, value in _spending(server).items()}
    return Measured(replies, {**found, **spent})


def held_per_s(arguments: Namespace, server: Server, arrivals: Sequence[Arrival]) -> Measured:
    """Requests per second that a server holds in a closed loop (``holds_per_s``), warmed up."""
    under_load(arguments, server, lambda client: client.closed_loop(arrivals[:4], 2))
    streams = arguments.max_num_seqs
    found = under_load(arguments, server, lambda client: client.closed_loop(arrivals, streams))
    numbers = found.numbers
    holds = (numbers["requests"] - numbers["failed"]) / numbers["span_s"]
    return Measured(found.replies, {**numbers, "holds_per_s": holds})


async def _timed(arguments: Namespace, server: Server, load: Load) -> tuple[list[Reply], float]:
    tokenizer = load_tokenizer(arguments.model)
    async with Client(server, tokenizer, arguments.seed, arguments.timeout) as client:
        began_s = time.monotonic()
        replies = await load(client)
        return replies, time.monotonic() - began_s


def _spending(server: Server) -> dict[str, float]:
    """CPU seconds of our processes, and bytes of KV that they have sent; nothing of peers."""
    if not server.is_ours:
        return {}
    cpu_s = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            cpu_s += times.user + times.system
    totals = httpx.get(f"{server.url}/v1/transfers", timeout=60.0).json()["totals"]
    return {"cpu_s": cpu_s, "kv_bytes": totals["bytes_sent"]}
