"""Claim: KV that leaves in parts hides behind the prefill, and short prompts lose nothing by it.

A service of the model runs on local nodes. Every random prompt is asked of it several times, in an
order that changes: its KV leaves whole, in parts as by default, and as soon as any of it is
finished. The prefill pool is told which before every request, so that a machine whose speed
changes favours none. Measured are the time to an answer's second token, which needs the KV in
decode, beside that of the same prompt whose KV leaves whole; and what the ledger says of the same
requests, `hidden_s` among it: hidden at most can be the shorter of prefill and transfer. With
chunks that are longer than the prompts, parts are groups of blocks. `--links` repeats all of it
with a slower link to the decode replica's node, which takes root.

    python benchmarks/kv_overlap.py --model DIR --tokens 256 1000 3500 --max-model-len 8192
"""

from __future__ import annotations

import random
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import ray
from handoff.link import shaped
from recorder.options import add_dtype, add_model, benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.asker import Asker
from serving.changing_parts import changing_configuration, set_cost_of_parts

from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.settings import KV_PART_MS, ServiceSettings

WHOLE_MS = 1e9
WAYS = {"whole": WHOLE_MS, "parts": KV_PART_MS, "at once": 0.0}
_DECODE = 2  # The third node of a local cluster.
_TOLD = ("prefill_s", "put_s", "fetch_s", "copy_s", "hidden_s", "bytes_sent")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    options.add_argument("--plan", help="plan directory; without it, the dense model")
    options.add_argument("--tokens", type=int, nargs="+", default=[64, 200])
    options.add_argument("--chunk-tokens", type=int, default=512)
    options.add_argument("--max-model-len", type=int, default=512)
    options.add_argument("--links", type=float, nargs="*", default=[], help="also at, Gbit/s")
    options.add_argument("--runs", type=int, default=6)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    settings = _settings(arguments)
    with (
        local_cluster() as cluster,
        running_service(
            settings, address=cluster.address, configured=changing_configuration
        ) as service,
        httpx.Client(base_url=service.url, timeout=600.0) as client,
    ):
        results: list[dict[str, Any]] = []
        for gbit in (None, *arguments.links):
            with shaped(cluster.nodes[_DECODE].node_ip_address, gbit):
                for count in arguments.tokens:
                    rows = of_length(client, settings.model_name, arguments.runs, count)
                    results += [{"gbit_per_s": gbit, **row} for row in rows]
                    recorder.write(results=results)
                    print(f"{count:,} tokens, link {gbit or 'not shaped'}: done", flush=True)
    ray.shutdown()


def _settings(arguments: Namespace) -> ServiceSettings:
    return ServiceSettings.parse(
        {
            "model": str(arguments.model),
            "plan": arguments.plan,
            "dtype": arguments.dtype,
            "port": free_port(),
            "max_model_len": arguments.max_model_len,
            "max_num_batched_tokens": arguments.chunk_tokens,
            "ingress": {"labels": {"role": "head"}},
        }
    )


def of_length(client: httpx.Client, model: str, runs: int, num_tokens: int) -> list[dict[str, Any]]:
    """A row for every way: the same prompts, in turns; the first of them warms up."""
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    names = list(WAYS)
    for number in range(runs + 1):
        turn = number % len(names)
        for way in names[turn:] + names[:turn]:
            set_cost_of_parts(WAYS[way])
            samples[way].append(ask(client, model, num_tokens, number))
    return [
        _row(way, num_tokens, found[1:], samples["whole"][1:]) for way, found in samples.items()
    ]


def ask(client: httpx.Client, model: str, num_tokens: int, seed: int) -> dict[str, float]:
    """The time of a prompt's second token, and the record of its transfer.

    An answer of two tokens ends with the second; the first alone may be no whole character, and
    such a piece of text is sent with what completes it.
    """
    times = Asker(client, model, random.Random(seed)).times(num_tokens, 2)
    (record,) = client.get("/v1/transfers").json()["recent"][-1:]
    return {"second_s": times[-1], **{name: record[name] for name in _TOLD}}


def _row(
    way: str,
    num_tokens: int,
    samples: Sequence[Mapping[str, float]],
    whole: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    """Medians of all requests of one length that left in one way, and of ratios to sending whole.

    A ratio is taken between two requests of the same prompt, which were asked one after the other.
    """
    medians = {name: statistics.median(found[name] for found in samples) for name in samples[0]}
    ratios = [a["second_s"] / b["second_s"] for a, b in zip(samples, whole, strict=True)]
    hidden = [_hidden_share(found) for found in samples]
    return {
        "way": way,
        "tokens": num_tokens,
        **medians,
        "against_whole": statistics.median(ratios),
        "against_whole_all": ratios,
        "hidden_share": statistics.median(hidden),
    }


def _hidden_share(sample: Mapping[str, float]) -> float:
    """The share of what could be hidden at most that was."""
    return sample["hidden_s"] / min(_transfer_s(sample), sample["prefill_s"])


def _transfer_s(sample: Mapping[str, float]) -> float:
    return sample["put_s"] + sample["fetch_s"] + sample["copy_s"]


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    heads = (
        *("link, Gbit/s", "prompt tokens", "KV leaves", "MB", "prefill, ms", "second token, ms"),
        *("against whole", "from", "to", "put + fetch + copy, ms"),
        *("of it hidden, ms", "share of what can be hidden", "not hidden, of the second token"),
    )
    rows = [
        (
            "none" if r["gbit_per_s"] is None else f"{r['gbit_per_s']:g}",
            f"{r['tokens']:,}",
            r["way"],
            f"{r['bytes_sent'] / 1e6:.1f}",
            f"{1e3 * r['prefill_s']:.0f}",
            f"{1e3 * r['second_s']:.0f}",
            f"{r['against_whole']:.3f}",
            f"{min(r['against_whole_all']):.2f}",
            f"{max(r['against_whole_all']):.2f}",
            f"{1e3 * _transfer_s(r):.0f}",
            f"{1e3 * r['hidden_s']:.0f}",
            f"{r['hidden_share']:.2f}",
            f"{100 * (_transfer_s(r) - r['hidden_s']) / r['second_s']:.0f} %",
        )
        for r in record["results"]
    ]
    return [
        f"Handoff over HTTP: {asked['model']}, {asked['dtype']}, one "
        f"replica of each pool, one thread each, chunks of {asked['chunk_tokens']:,} tokens; "
        f"medians of {asked['runs']} prompts, each asked in all ways, in turns.",
        Table(heads, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report)
