"""Claim: under real arrivals the service keeps up with servers made for serving, on the same cores.

Our service, unified and disaggregated, and every peer get the same requests over HTTP, one server
after the other: arrivals and lengths of a published trace, its lengths divided, its rate a share of
what our first service holds (measured first, in a closed loop). Answers have the trace's lengths
everywhere. Beside it, equal streams: 1, 8 and 32 clients that always wait for an answer.

    python benchmarks/serving_trace.py --model DIR --trace AzureLLMInferenceTrace_conv.csv \\
        --peer vllm=http://127.0.0.1:8101 --text-peer transformers=http://127.0.0.1:8102
"""

from __future__ import annotations

import asyncio
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from recorder.options import (
    add_dtype,
    add_model,
    add_seed,
    benchmark_parser,
    model_label,
)
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.client import Client, Reply, Server
from serving.load import load_numbers

from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import InputError
from rayapp.models.tokenizer import load_tokenizer
from rayapp.simulation.traces import Arrival, at_rate, drawn, in_bursts, read_trace, scaled

_MODES = ("unified", "disaggregated")
Load = Callable[[Client], Coroutine[Any, Any, list[Reply]]]


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    add_seed(options, "prompts, and of arrivals where no trace is given")
    options.add_argument("--modes", nargs="*", choices=_MODES, default=list(_MODES))
    options.add_argument("--plan", type=Path, help="serve this plan too, in the same modes")
    options.add_argument("--burst", type=int, default=1, help="requests that arrive at once")
    options.add_argument("--trace", type=Path, help="CSV of arrivals; drawn ones without it")
    options.add_argument("--requests", type=int, default=1000, help="of the trace")
    options.add_argument("--divisor", type=int, default=8, help="of the trace's lengths")
    options.add_argument("--share", type=float, default=0.6, help="of what the first service holds")
    options.add_argument("--rate", type=float, help="requests per second, in place of --share")
    options.add_argument("--capacity-requests", type=int, default=96)
    options.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    options.add_argument("--stream-lengths", type=int, nargs=2, default=[130, 32])
    options.add_argument("--stream-rounds", type=int, default=3, help="answers of every stream")
    options.add_argument("--max-num-seqs", type=int, default=32)
    options.add_argument("--max-model-len", type=int, default=2048)
    options.add_argument("--limits", type=float, nargs=2, default=[2.0, 0.1], help="TTFT, TPOT, s")
    options.add_argument("--timeout", type=float, default=300.0, help="seconds of silence")
    for option in ("--peer", "--text-peer"):
        options.add_argument(option, action="append", default=[], metavar="NAME=URL")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    arrivals = arrivals_of(arguments)
    results: dict[str, Any] = {"rate_per_s": arguments.rate, "servers": []}
    for opening in openings(arguments):
        with opening as server:
            rate = results["rate_per_s"]
            row = {"server": server.name, **measured(arguments, server, arrivals, rate)}
        results["rate_per_s"] = row["rate_per_s"]
        results["servers"].append(row)
        print({k: v for k, v in row.items() if k != "streams"}, flush=True)
        recorder.write(results=results)


def arrivals_of(arguments: Namespace) -> list[Arrival]:
    count = arguments.requests
    if arguments.trace:
        arrivals = read_trace(arguments.trace, count)
    else:
        twice_s = 2.0 * count  # A draw that is long enough for all of them, one a second.
        arrivals = drawn("poisson", per_s=1.0, span_s=twice_s, seed=arguments.seed)[:count]
    arrivals = in_bursts(arrivals, arguments.burst)
    return scaled(arrivals, arguments.divisor, arguments.max_model_len)


def openings(arguments: Namespace) -> list[Any]:
    """Our services and the peers, in the order in which they are measured."""
    plans = [None, arguments.plan] if arguments.plan else [None]
    ours = [our_service(arguments, mode, plan) for plan in plans for mode in arguments.modes]
    peers = [peer(text, takes_text=False) for text in arguments.peer]
    return [*ours, *peers, *(peer(text, takes_text=True) for text in arguments.text_peer)]


@contextmanager
def our_service(arguments: Namespace, mode: str, plan: Path | None) -> Iterator[Server]:
    pool = {"num_cpus": arguments.threads}
    settings = ServiceSettings.parse(
        {
            "model": str(arguments.model),
            "plan": str(plan.resolve()) if plan else None,
            "mode": mode,
            "dtype": arguments.dtype,
            "port": free_port(),
            "max_model_len": arguments.max_model_len,
            "max_num_seqs": arguments.max_num_seqs,
            "max_waiting": max(arguments.requests, 256),
            "ingress": {"labels": {"role": "head"}},
            "unified": pool,
            "prefill": {**pool, "labels": {"role": "prefill"}},
            "decode": {**pool, "labels": {"role": "decode"}},
        }
    )
    try:
        with local_cluster() as cluster, running_service(settings, address=cluster.address) as at:
            name = f"rayapp, {mode}" + (", planned" if plan else "")
            yield Server(name, at.url, settings.model_name, is_ours=True)
    finally:
        ray.shutdown()


@contextmanager
def peer(text: str, *, takes_text: bool) -> Iterator[Server]:
    name, _, url = text.partition("=")
    try:
        models = httpx.get(f"{url}/v1/models", timeout=30.0).json()["data"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise InputError(
            f"--peer {text}: does not answer ({error!r}); start it first, see benchmarks/README.md"
        ) from None
    yield Server(name, url.rstrip("/"), models[0]["id"], takes_text)


def measured(
    arguments: Namespace, server: Server, arrivals: Sequence[Arrival], rate: float | None
) -> dict[str, Any]:
    """All numbers of one server; without a rate, its capacity decides."""
    first = arrivals[: arguments.capacity_requests]
    num_streams = arguments.max_num_seqs

    def loaded(load: Load) -> dict[str, Any]:
        ttft_limit_s, tpot_limit_s = arguments.limits
        before = spending(server)
        replies, span_s = asyncio.run(_timed(arguments, server, load))
        found = load_numbers(replies, span_s, ttft_limit_s=ttft_limit_s, tpot_limit_s=tpot_limit_s)
        spent = {name: value - before[name] for name, value in spending(server).items()}
        return {**found, **spent}

    loaded(lambda client: client.closed_loop(first[:4], 2))  # warms it up
    capacity = loaded(lambda client: client.closed_loop(first, num_streams))
    holds = (capacity["requests"] - capacity["failed"]) / capacity["span_s"]
    rate = rate or arguments.share * holds
    coming = at_rate(arrivals, rate)
    return {
        "holds_per_s": holds,
        "holds_tokens_per_s": capacity["tokens_per_s"],
        "rate_per_s": rate,
        "open": loaded(lambda client: client.open_loop(coming)),
        "streams": {
            str(count): loaded(partial(equal_streams, arguments, count))
            for count in arguments.streams
        },
    }


async def equal_streams(arguments: Namespace, num_streams: int, client: Client) -> list[Reply]:
    """Replies to requests of equal lengths, some for every stream."""
    count = num_streams * arguments.stream_rounds
    return await client.closed_loop([Arrival(0.0, *arguments.stream_lengths)] * count, num_streams)


def spending(server: Server) -> dict[str, float]:
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


async def _timed(arguments: Namespace, server: Server, load: Load) -> tuple[list[Reply], float]:
    tokenizer = load_tokenizer(arguments.model)
    async with Client(server, tokenizer, arguments.seed, arguments.timeout) as client:
        began_s = time.monotonic()
        replies = await load(client)
        return replies, time.monotonic() - began_s


def report(record: Record) -> list[Block]:
    asked, results = record["configuration"], record["results"]
    ttft_limit_s, tpot_limit_s = asked["limits"]
    num_in, num_out = asked["stream_lengths"]
    trace = asked["trace"] or "drawn arrivals"
    return [
        f"Under load over HTTP: {asked['model']}, {asked['dtype']}, {trace}, {asked['requests']} "
        f"requests with lengths divided by {asked['divisor']}, {results['rate_per_s']:.2f} of them "
        f"a second. A good answer has its first token within {ttft_limit_s:g} s and the others "
        f"within {1000 * tpot_limit_s:g} ms each.",
        _arrivals_table(results["servers"]),
        f"Equal streams of {num_in} prompt and {num_out} answer tokens, tokens per second (median "
        "seconds to the first token):",
        _streams_table(results["servers"], asked["streams"]),
    ]


def _arrivals_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = (
        *("server", "holds, requests/s", "tokens/s", "TTFT p50, s", "p99, s"),
        *("TPOT p50, ms", "p99, ms", "ITL p50, ms", "p99, ms", "good answers/s", "failed"),
        *("of other length", "CPU per token, ms", "KV sent, MB"),
    )
    cells = []
    for row in rows:
        found = row["open"]
        cells.append(
            (
                row["server"],
                f"{row['holds_per_s']:.2f}",
                f"{found['tokens_per_s']:.1f}",
                *(_number(found[f"ttft_p{share}_s"], 1, 3) for share in (50, 99)),
                *(_number(found[f"tpot_p{share}_s"], 1000, 1) for share in (50, 99)),
                *(_number(found.get(f"itl_p{share}_s"), 1000, 1) for share in (50, 99)),
                f"{found['goodput_per_s']:.2f}",
                str(found["failed"]),
                str(found["other_length"]),
                _number(_cpu_per_token_s(found), 1000, 2),
                _number(found.get("kv_bytes"), 1e-6, 2),
            )
        )
    return Table(columns, cells)


def _cpu_per_token_s(found: dict[str, Any]) -> float | None:
    """CPU seconds per answer token, prefill and the idle cluster included; None for peers."""
    tokens = found["tokens_per_s"] * found["span_s"]
    return found["cpu_s"] / tokens if "cpu_s" in found and tokens else None


def _streams_table(rows: Sequence[dict[str, Any]], counts: Sequence[int]) -> Table:
    cells = [
        (
            row["server"],
            *(
                f"{found['tokens_per_s']:.1f} ({_number(found['ttft_p50_s'], 1, 3)})"
                for found in (row["streams"][str(count)] for count in counts)
            ),
        )
        for row in rows
    ]
    return Table(("server", *(f"{count} streams" for count in counts)), cells)


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"


if __name__ == "__main__":
    run(parser(), measure, report, label=model_label)
