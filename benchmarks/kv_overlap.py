"""Claim: KV that leaves in parts hides behind the prefill, and short prompts lose nothing by it.

A service of the model runs on local nodes for every size of parts: whole prompts, the default, and
all that is finished at once; then again in the reverse order, so that a machine that grows slower
favours none. Random prompts of several lengths are asked over HTTP. Measured are the time from an
answer's first token, which prefill makes, to its second, which needs the KV in decode; and what the
ledger says of the same requests, `hidden_s` among it. With chunks that are longer than the prompts,
parts are groups of blocks.

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
WAYS = {"whole": WHOLE_MS, "parts": KV_PART_MS, "at once": 0.0}
_TOLD = ("prefill_s", "put_s", "fetch_s", "copy_s", "hidden_s", "bytes_sent")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    options.add_argument("--plan", help="plan directory; without it, the dense model")
    options.add_argument("--tokens", type=int, nargs="+", default=[64, 200])
    options.add_argument("--chunk-tokens", type=int, default=512)
    options.add_argument("--max-model-len", type=int, default=512)
    options.add_argument("--runs", type=int, default=6)
    options.add_argument("--rounds", type=int, default=2, help="over all services, to and fro")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    with local_cluster() as cluster:
        for way in _to_and_fro(arguments.rounds):
            print(f"KV leaves: {way}", flush=True)
            for num_tokens, found in measured(arguments, WAYS[way], cluster.address).items():
                samples.setdefault((way, num_tokens), []).extend(found)
            recorder.write(results=[row(*key, found) for key, found in samples.items()])
        ray.shutdown()


def _to_and_fro(rounds: int) -> list[str]:
    return [way for n in range(rounds) for way in (reversed(WAYS) if n % 2 else WAYS)]


def measured(
    arguments: Namespace, part_ms: float, address: str
) -> dict[int, list[dict[str, float]]]:
    """A round's share of the runs of every length, of one service."""
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
        runs = -(-arguments.runs // arguments.rounds)
        return {count: of_length(asker, client, runs, count) for count in arguments.tokens}


def of_length(
    asker: Asker, client: httpx.Client, runs: int, num_tokens: int
) -> list[dict[str, float]]:
    """First and second tokens of prompts of one length, and their records in the ledger."""
    times = [asker.times(num_tokens, 3) for _ in range(runs)]
    recent = client.get("/v1/transfers").json()["recent"][-runs:]
    return [
        {
            "first_s": found[0],
            "second_s": found[1] - found[0],
            **{name: record[name] for name in _TOLD},
        }
        for found, record in zip(times, recent, strict=True)
    ]


def row(way: str, num_tokens: int, samples: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of all requests of one length that left in one way."""
    medians = {name: statistics.median(found[name] for found in samples) for name in samples[0]}
    gaps = [found["second_s"] for found in samples]
    return {"way": way, "tokens": num_tokens, **medians, "second_s_all": gaps}


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    heads = (
        *("prompt tokens", "KV leaves", "MB", "first token, s", "first to second, ms"),
        *("second token, against whole", "put + fetch + copy, ms", "of it hidden, ms"),
    )
    until = {(r["way"], r["tokens"]): r["first_s"] + r["second_s"] for r in record["results"]}
    ordered = sorted(record["results"], key=lambda r: (r["tokens"], list(WAYS).index(r["way"])))
    rows = [
        (
            f"{r['tokens']:,}",
            r["way"],
            f"{r['bytes_sent'] / 1e6:.1f}",
            f"{r['first_s']:.3f}",
            f"{1e3 * r['second_s']:.0f}",
            f"{until[r['way'], r['tokens']] / until['whole', r['tokens']]:.2f}",
            f"{1e3 * (r['put_s'] + r['fetch_s'] + r['copy_s']):.0f}",
            f"{1e3 * r['hidden_s']:.0f}",
        )
        for r in ordered
    ]
    return [
        f"Handoff over HTTP: {asked['model']}, {asked['dtype']}, one replica of each pool, one "
        f"thread each, chunks of {asked['chunk_tokens']} tokens, medians of {asked['runs']} "
        f"requests in {asked['rounds']} rounds over the services, to and fro.",
        Table(heads, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report)
