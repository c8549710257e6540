"""Claim: KV that leaves in parts hides behind the prefill, and short prompts lose nothing by it.

A service of the model runs on local nodes, once per size of parts: whole prompts, the default, and
every chunk alone. Random prompts of several lengths are asked over HTTP in turns. Measured are the
time from an answer's first token, which prefill makes, to its second, which needs the KV in decode;
and what the ledger says of the same requests, `hidden_s` among it.

    python benchmarks/kv_overlap.py --model DIR --tokens 256 1000 3500 --max-model-len 8192
"""

from __future__ import annotations

import random
import statistics
from argparse import ArgumentParser, Namespace
from typing import Any

import httpx
import ray
from recorder.options import add_dtype, add_model, benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.asker import Asker

from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.settings import KV_PART_MS, ServiceSettings

WHOLE_MS = 1e9
WAYS = {"whole": WHOLE_MS, "parts": KV_PART_MS, "every chunk": 0.0}
_TOLD = ("prefill_s", "put_s", "fetch_s", "copy_s", "hidden_s", "bytes_sent")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    options.add_argument("--plan", help="plan directory; without it, the dense model")
    options.add_argument("--tokens", type=int, nargs="+", default=[64, 200])
    options.add_argument("--chunk-tokens", type=int, default=512)
    options.add_argument("--max-model-len", type=int, default=512)
    options.add_argument("--runs", type=int, default=5)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    rows: list[dict[str, Any]] = []
    with local_cluster() as cluster:
        for way, part_ms in WAYS.items():
            rows += measured(arguments, way, part_ms, cluster.address)
            print(rows[-1], flush=True)
            recorder.write(results=rows)
        ray.shutdown()


def measured(arguments: Namespace, way: str, part_ms: float, address: str) -> list[dict[str, Any]]:
    """A row per length, of one service."""
    settings = ServiceSettings.parse(
        {
            "model": str(arguments.model),
            "plan": arguments.plan,
            "dtype": arguments.dtype,
            "port": free_port(),
            "max_model_len": arguments.max_model_len,
            "max_num_batched_tokens": arguments.chunk_tokens,
            "kv_part_ms": part_ms,
            "ingress": {"labels": {"role": "head"}},
        }
    )
    with (
        running_service(settings, address=address) as service,
        httpx.Client(base_url=service.url, timeout=600.0) as client,
    ):
        asker = Asker(client, settings.model_name, random.Random(0))
        asker.times(min(arguments.tokens), 4)
        return [of_length(asker, client, arguments, way, count) for count in arguments.tokens]


def of_length(
    asker: Asker, client: httpx.Client, arguments: Namespace, way: str, num_tokens: int
) -> dict[str, Any]:
    """First and second tokens of prompts of one length, and their records in the ledger."""
    times = [asker.times(num_tokens, 3) for _ in range(arguments.runs)]
    recent = client.get("/v1/transfers").json()["recent"][-arguments.runs :]
    gaps = [found[1] - found[0] for found in times]
    return {
        "way": way,
        "tokens": num_tokens,
        "first_s": statistics.median(found[0] for found in times),
        "second_s": statistics.median(gaps),
        "second_s_all": gaps,
        **{name: statistics.median(record[name] for record in recent) for name in _TOLD},
    }


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    heads = (
        *("prompt tokens", "KV leaves", "MB", "first token, s", "first to second, ms"),
        *("against whole", "put + fetch + copy, ms", "of it hidden, ms"),
    )
    whole = {r["tokens"]: r["second_s"] for r in record["results"] if r["way"] == "whole"}
    ordered = sorted(record["results"], key=lambda r: (r["tokens"], list(WAYS).index(r["way"])))
    rows = [
        (
            f"{r['tokens']:,}",
            r["way"],
            f"{r['bytes_sent'] / 1e6:.1f}",
            f"{r['first_s']:.3f}",
            f"{1e3 * r['second_s']:.0f}",
            f"{r['second_s'] / whole[r['tokens']]:.2f}",
            f"{1e3 * (r['put_s'] + r['fetch_s'] + r['copy_s']):.0f}",
            f"{1e3 * r['hidden_s']:.0f}",
        )
        for r in ordered
    ]
    return [
        f"Handoff over HTTP: {asked['model']}, {asked['dtype']}, one replica of each pool, one "
        f"thread each, chunks of {asked['chunk_tokens']} tokens, medians of {asked['runs']} "
        "requests.",
        Table(heads, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report)
