"""Claim: under real arrivals the service keeps up with servers made for serving, on the same cores.

Our service, unified and disaggregated, and every peer get the same requests over HTTP, one server
after the other: arrivals and lengths of published traces, and drawn ones (Poisson, bursts, long
prompts among short ones), their lengths divided, their rate a share of what our first service holds
(measured first, in a closed loop). Answers have the given lengths everywhere. Beside it, equal
streams: 1, 8 and 32 clients that always wait for an answer.

    python benchmarks/serving_trace.py --model DIR --loads poisson burst long-prompts \\
        --trace AzureLLMInferenceTrace_conv.csv AzureLLMInferenceTrace_code.csv \\
        --peer vllm=http://127.0.0.1:8101 --text-peer transformers=http://127.0.0.1:8102
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
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
from serving.loads import SHAPE_NAMES, add_lengths, loads_of
from serving.measuring import held_per_s, under_load
from serving.services import served, settings_of

from rayapp.errors import InputError
from rayapp.simulation.traces import Arrival, at_rate

_MODES = ("unified", "disaggregated")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    add_seed(options, "prompts and of drawn arrivals")
    add_lengths(options)
    options.add_argument("--modes", nargs="*", choices=_MODES, default=list(_MODES))
    options.add_argument("--plan", type=Path, help="serve this plan too, in the same modes")
    options.add_argument("--trace", type=Path, nargs="*", default=[], help="files of arrivals")
    options.add_argument("--loads", nargs="*", choices=SHAPE_NAMES, default=[], help="drawn loads")
    options.add_argument("--burst", type=int, default=1, help="the first load again, N at once")
    options.add_argument("--share", type=float, default=0.6, help="of what the first service holds")
    options.add_argument("--rate", type=float, help="requests per second, in place of --share")
    options.add_argument("--capacity-requests", type=int, default=96)
    options.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    options.add_argument("--stream-lengths", type=int, nargs=2, default=[130, 32])
    options.add_argument("--stream-rounds", type=int, default=3, help="answers of every stream")
    for option in ("--peer", "--text-peer"):
        options.add_argument(option, action="append", default=[], metavar="NAME=URL")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loads = loads_of(arguments)
    results: dict[str, Any] = {"rate_per_s": arguments.rate, "servers": []}
    for opening in openings(arguments):
        with opening as server:
            rate = results["rate_per_s"]
            row = {"server": server.name, **measured(arguments, server, loads, rate)}
        results["rate_per_s"] = row["rate_per_s"]
        results["servers"].append(row)
        print({k: v for k, v in row.items() if k != "streams"}, flush=True)
        recorder.write(results=results)


def openings(arguments: Namespace) -> list[Any]:
    """Our services and the peers, in the order in which they are measured."""
    plans = [None, arguments.plan] if arguments.plan else [None]
    ours = [
        served(
            settings_of(arguments, mode, plan=plan),
            f"rayapp, {mode}" + (", planned" if plan else ""),
        )
        for plan in plans
        for mode in arguments.modes
    ]
    peers = [peer(text, takes_text=False) for text in arguments.peer]
    return [*ours, *peers, *(peer(text, takes_text=True) for text in arguments.text_peer)]


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
    arguments: Namespace,
    server: Server,
    loads: Mapping[str, Sequence[Arrival]],
    rate: float | None,
) -> dict[str, Any]:
    """All numbers of one server; without a rate, its capacity under the first load decides."""
    first = next(iter(loads.values()))[: arguments.capacity_requests]
    capacity = held_per_s(arguments, server, first).numbers
    rate = rate or arguments.share * capacity["holds_per_s"]
    opened = {
        name: under_load(arguments, server, partial(in_time, at_rate(arrivals, rate))).numbers
        for name, arrivals in loads.items()
    }
    streams = {
        str(count): under_load(arguments, server, partial(equal_streams, arguments, count)).numbers
        for count in arguments.streams
    }
    return {
        "holds_per_s": capacity["holds_per_s"],
        "holds_tokens_per_s": capacity["tokens_per_s"],
        "rate_per_s": rate,
        "open": opened,
        "streams": streams,
    }


async def in_time(arrivals: Sequence[Arrival], client: Client) -> list[Reply]:
    """Replies to requests that are sent at their times."""
    return await client.open_loop(arrivals)


async def equal_streams(arguments: Namespace, num_streams: int, client: Client) -> list[Reply]:
    """Replies to requests of equal lengths, some for every stream."""
    count = num_streams * arguments.stream_rounds
    return await client.closed_loop([Arrival(0.0, *arguments.stream_lengths)] * count, num_streams)


def report(record: Record) -> list[Block]:
    asked, results = record["configuration"], record["results"]
    ttft_limit_s, tpot_limit_s = asked["limits"]
    num_in, num_out = asked["stream_lengths"]
    rows = results["servers"]
    blocks: list[Block] = [
        f"Under load over HTTP: {asked['model']}, {asked['dtype']}, about {asked['requests']} "
        f"requests of every load, lengths divided by {asked['divisor']}, "
        f"{results['rate_per_s']:.2f} of them a second on average. A good answer has its first "
        f"token within {ttft_limit_s:g} s and the others within {1000 * tpot_limit_s:g} ms each.",
    ]
    for load in rows[0]["open"]:
        blocks += [f"**{load}**{_beside_unified(rows, load)}", _arrivals_table(rows, load)]
    return [
        *blocks,
        f"Equal streams of {num_in} prompt and {num_out} answer tokens, tokens per second (median "
        "seconds to the first token):",
        _streams_table(rows, asked["streams"]),
    ]


def _beside_unified(rows: Sequence[dict[str, Any]], load: str) -> str:
    """The 99th percentile of gaps, disaggregated over unified, where both were measured."""
    gaps_s = {row["server"]: row["open"][load].get("itl_p99_s") for row in rows}
    apart_s, together_s = (gaps_s.get(f"rayapp, {mode}") for mode in ("disaggregated", "unified"))
    if not apart_s or not together_s:
        return ""
    return f": p99 ITL disaggregated is {apart_s / together_s:.2f} of unified's."


def _arrivals_table(rows: Sequence[dict[str, Any]], load: str) -> Table:
    columns = (
        *("server", "holds, requests/s", "tokens/s", "TTFT p50, s", "p99, s"),
        *("TPOT p50, ms", "p99, ms", "ITL p50, ms", "p99, ms", "good answers/s", "failed"),
        *("of other length", "CPU per token, ms", "KV sent, MB"),
    )
    cells = []
    for row in rows:
        found = row["open"][load]
        cells.append(
            (
                row["server"],
                f"{row['holds_per_s']:.2f}",
                f"{found['tokens_per_s']:.1f}",
                *(_number(found[f"ttft_p{share}_s"], 1, 3) for share in (50, 99)),
                *(_number(found[f"tpot_p{share}_s"], 1000, 1) for share in (50, 99)),
                *(_number(found[f"itl_p{share}_s"], 1000, 1) for share in (50, 99)),
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
