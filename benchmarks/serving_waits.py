"""Claim: a short prompt does not wait for long ones, finished KV leaves, running streams go on.

A service of the model runs on local nodes, once per chunk size and mode, and a client asks it over
HTTP. Three waits are measured, each beside the same request alone: the first token of a short
prompt that comes after three long ones; the time from a long prompt's first token to its second,
which holds the handoff of its KV; and the gaps of a running stream while long prompts arrive. The
last is measured without HTTP too, by the engine's own clock: in chunks (unified), steps (decode).

    python benchmarks/serving_waits.py --model DIR --long-tokens 3500 --max-model-len 8192
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ray
from recorder.options import add_dtype, add_model, benchmark_parser, model_label
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.asker import Asker
from serving.engine_gaps import decode_gaps, unified_gaps

from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan

NUM_LONG = 3
_HEAD_START_S = 0.3
_ANSWER = 8  # Tokens: bytes that are no character yet give no piece of text of their own.


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    options.add_argument("--modes", nargs="+", default=["disaggregated", "unified"])
    options.add_argument("--chunk-tokens", type=int, nargs="+", default=[512, 1 << 20])
    options.add_argument("--short-tokens", type=int, default=24)
    options.add_argument("--long-tokens", type=int, default=200)
    options.add_argument("--stream-tokens", type=int, default=100, help="of the running stream")
    options.add_argument("--max-model-len", type=int, default=512)
    options.add_argument("--runs", type=int, default=3, help="of every measurement")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    rows = []
    with local_cluster() as cluster:
        for mode in arguments.modes:
            for chunk in arguments.chunk_tokens:
                rows.append(measured(arguments, mode, chunk, cluster.address))
                print({k: v for k, v in rows[-1].items() if not isinstance(v, list)}, flush=True)
                recorder.write(results=rows, engine=[])
        ray.shutdown()
    engine = engine_rows(arguments)
    recorder.write(results=rows, engine=engine)


def engine_rows(arguments: Namespace) -> list[dict[str, Any]]:
    """Gaps by the engine's own clock, per mode and chunk size."""
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    stage = StageModel(loaded, PruningPlan(), arguments.max_model_len)
    gaps = {"disaggregated": decode_gaps, "unified": unified_gaps}
    return [
        {
            "mode": mode,
            "chunk_tokens": min(chunk, arguments.max_model_len),
            **gaps[mode](
                stage,
                chunk_tokens=chunk,
                long_tokens=arguments.long_tokens,
                num_long=NUM_LONG * arguments.runs,
                short_tokens=arguments.short_tokens,
            ),
        }
        for mode in arguments.modes
        for chunk in arguments.chunk_tokens
    ]


def measured(arguments: Namespace, mode: str, chunk: int, address: str) -> dict[str, Any]:
    """All waits of one service."""
    settings = ServiceSettings.parse(
        {
            "model": str(arguments.model),
            "mode": mode,
            "dtype": arguments.dtype,
            "port": free_port(),
            "max_model_len": arguments.max_model_len,
            "max_num_batched_tokens": chunk,
            "ingress": {"labels": {"role": "head"}},
        }
    )
    with (
        running_service(settings, address=address) as service,
        httpx.Client(base_url=service.url, timeout=600.0) as client,
    ):
        asker = Asker(client, settings.model_name, random.Random(0))
        asker.times(arguments.short_tokens, 4)
        return {
            "mode": mode,
            "chunk_tokens": min(chunk, arguments.max_model_len),
            **short_behind_long(asker, arguments),
            **gaps_of_a_stream(asker, arguments),
        }


def short_behind_long(asker: Asker, arguments: Namespace) -> dict[str, Any]:
    """First tokens of a short prompt alone and behind long ones, and the handoff of long ones."""
    short, long = arguments.short_tokens, arguments.long_tokens
    alone = [asker.times(short, 2)[0] for _ in range(3 * arguments.runs)]
    long_alone = [asker.times(long, _ANSWER) for _ in range(arguments.runs)]
    behind, seconds = [], []
    for _ in range(arguments.runs):
        with ThreadPoolExecutor(NUM_LONG) as pool:
            others = [pool.submit(asker.times, long, _ANSWER) for _ in range(NUM_LONG)]
            time.sleep(_HEAD_START_S)
            behind.append(asker.times(short, 2)[0])
            seconds += [times[1] - times[0] for times in (o.result() for o in others)]
    return {
        "short_alone_s": statistics.median(alone),
        "short_alone_s_all": alone,
        "short_behind_s": statistics.median(behind),
        "short_behind_s_all": behind,
        "long_alone_s": statistics.median(times[0] for times in long_alone),
        "second_token_alone_s": statistics.median(times[1] - times[0] for times in long_alone),
        "second_token_s": max(seconds),
        "second_token_s_all": seconds,
    }


def gaps_of_a_stream(asker: Asker, arguments: Namespace) -> dict[str, Any]:
    """The longest gap of a running stream, alone and while long prompts arrive."""
    count, long = arguments.stream_tokens, arguments.long_tokens
    alone = [longest_gap(asker.times(arguments.short_tokens, count)) for _ in range(arguments.runs)]
    beside = []
    for _ in range(arguments.runs):
        with ThreadPoolExecutor(NUM_LONG) as pool:
            times, others = [], []
            for at_s in asker.pieces(arguments.short_tokens, count):
                times.append(at_s)
                if len(times) == 2:
                    others = [pool.submit(asker.times, long, 2) for _ in range(NUM_LONG)]
            for other in others:
                other.result()
            beside.append(longest_gap(times))
    return {
        "gap_alone_s": statistics.median(alone),
        "gap_beside_long_s": statistics.median(beside),
        "gap_beside_long_s_all": beside,
    }


def longest_gap(times: list[float]) -> float:
    return max(later - earlier for earlier, later in itertools.pairwise(times[1:]))


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    columns = (
        *("mode", "tokens a step", "short prompt alone, s", "behind three long, s", "ratio"),
        *("one long alone, s", "its second token, s", "the latest of three, s"),
        *("longest gap alone, s", "beside long prompts, s"),
    )
    rows = [
        (
            r["mode"],
            str(r["chunk_tokens"]),
            f"{r['short_alone_s']:.3f}",
            f"{r['short_behind_s']:.3f}",
            f"{r['short_behind_s'] / r['short_alone_s']:.1f}",
            *(f"{r[k]:.3f}" for k in ("long_alone_s", "second_token_alone_s", "second_token_s")),
            *(f"{r[k]:.3f}" for k in ("gap_alone_s", "gap_beside_long_s")),
        )
        for r in record["results"]
    ]
    return [
        f"Waits over HTTP: {asked['model']}, {asked['dtype']}, one replica of each pool, short "
        f"prompts of {asked['short_tokens']} tokens, long ones of {asked['long_tokens']}, medians "
        f"of {asked['runs']} runs; the latest second token is the maximum over all long prompts.",
        Table(columns, rows),
        *engine_blocks(record.get("engine", ())),
    ]


def engine_blocks(found: Sequence[dict[str, Any]]) -> list[Block]:
    """The table by the engine's own clock; earlier records have none."""
    columns = (
        *("mode", "tokens a step", "steps", "step alone, s", "gap p50, s", "gap p99.9, s"),
        *("longest chunk, or step alone, s", "p99.9 in these"),
    )
    rows = [
        (
            *(r["mode"], str(r["chunk_tokens"]), str(r["steps"])),
            *(f"{r[k]:.4f}" for k in ("step_alone_s", "gap_p50_s", "gap_p999_s", "unit_s")),
            f"{r['gap_in_units']:.2f}",
        )
        for r in found
    ]
    text = (
        "Gaps of a running stream by the engine's own clock, without HTTP and Ray: while long "
        "prompts are prefilled in the same replica (unified), and while their KV arrives "
        "(disaggregated)."
    )
    return [text, Table(columns, rows)] if rows else []


if __name__ == "__main__":
    run(parser(), measure, report, label=model_label)
