"""Claim: KV that leaves in parts hides behind the prefill, and short prompts lose nothing by it.

A service of the model runs on local nodes for every size of parts: whole prompts, the default, and
all that is finished at once. All run at the same time, and every random prompt is asked of one
after the other, in an order that changes, so that a machine whose speed changes favours none.
Measured are the time to an answer's second token, which needs the KV in decode, beside that of the
service that sends KV whole; and what the ledger says of the same requests, `hidden_s` among it:
hidden at most can be the shorter of prefill and transfer. With chunks that are longer than the
prompts, parts are groups of blocks.

    python benchmarks/kv_overlap.py --model DIR --tokens 256 1000 3500 --max-model-len 8192
"""

from __future__ import annotations

import random
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
from recorder.options import add_dtype, add_model, benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.asker import Asker
from serving.side_by_side import side_by_side

from rayapp.distributed.cluster.ports import free_port
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
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    services = {way: _settings(arguments, part_ms) for way, part_ms in WAYS.items()}
    with side_by_side(services) as servers, ExitStack() as stack:
        sides = {
            way: Side(stack.enter_context(httpx.Client(base_url=at.url, timeout=600.0)), at.model)
            for way, at in servers.items()
        }
        for side in sides.values():
            side.ask(min(arguments.tokens), 0)
        results: list[dict[str, Any]] = []
        for count in arguments.tokens:
            results += of_length(sides, arguments.runs, count)
            recorder.write(results=results)
            print(f"{count:,} tokens: done", flush=True)


def _settings(arguments: Namespace, part_ms: float) -> ServiceSettings:
    return ServiceSettings.parse(
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


class Side:
    """One of the services, and what its ledger says of the latest request."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client, self._model = client, model

    def ask(self, num_tokens: int, seed: int) -> dict[str, float]:
        """Times of a prompt's first and second token, and the record of its transfer."""
        asker = Asker(self._client, self._model, random.Random(seed))
        first_s, second_s, *_ = asker.times(num_tokens, 3)
        (record,) = self._client.get("/v1/transfers").json()["recent"][-1:]
        told = {name: record[name] for name in _TOLD}
        return {"first_s": first_s, "second_s": second_s - first_s, **told}


def of_length(sides: Mapping[str, Side], runs: int, num_tokens: int) -> list[dict[str, Any]]:
    """A row for every service: the same prompts, asked of all of them in turns."""
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in sides}
    names = list(sides)
    for number in range(runs):
        turn = number % len(names)
        for way in names[turn:] + names[:turn]:
            samples[way].append(sides[way].ask(num_tokens, number))
    return [_row(way, num_tokens, found, samples["whole"]) for way, found in samples.items()]


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
    ratios = [_until_second(a) / _until_second(b) for a, b in zip(samples, whole, strict=True)]
    hidden = [_hidden_share(found) for found in samples]
    return {
        "way": way,
        "tokens": num_tokens,
        **medians,
        "against_whole": statistics.median(ratios),
        "against_whole_all": ratios,
        "hidden_share": statistics.median(hidden),
    }


def _until_second(sample: Mapping[str, float]) -> float:
    return sample["first_s"] + sample["second_s"]


def _hidden_share(sample: Mapping[str, float]) -> float:
    """The share of what could be hidden at most that was."""
    transfer_s = sample["put_s"] + sample["fetch_s"] + sample["copy_s"]
    return sample["hidden_s"] / min(transfer_s, sample["prefill_s"])


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    heads = (
        *("prompt tokens", "KV leaves", "MB", "first token, s", "first to second, ms"),
        *("second token, against whole", "from", "to", "put + fetch + copy, ms"),
        *("of it hidden, ms", "share of what can be hidden"),
    )
    rows = [
        (
            f"{r['tokens']:,}",
            r["way"],
            f"{r['bytes_sent'] / 1e6:.1f}",
            f"{r['first_s']:.3f}",
            f"{1e3 * r['second_s']:.0f}",
            f"{r['against_whole']:.3f}",
            f"{min(r['against_whole_all']):.2f}",
            f"{max(r['against_whole_all']):.2f}",
            f"{1e3 * (r['put_s'] + r['fetch_s'] + r['copy_s']):.0f}",
            f"{1e3 * r['hidden_s']:.0f}",
            f"{r['hidden_share']:.2f}",
        )
        for r in record["results"]
    ]
    return [
        f"Handoff over HTTP: {asked['model']}, {asked['dtype']}, three services side by side, one "
        f"replica of each pool, one thread each, chunks of {asked['chunk_tokens']:,} tokens; "
        f"medians of {asked['runs']} prompts, each asked of all services in turns.",
        Table(heads, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report)
