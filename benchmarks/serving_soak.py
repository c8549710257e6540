"""Claim: a service that is used for long holds no more than at its beginning.

Rounds of requests are asked of a disaggregated service, some of whose clients leave. After every
round the service is idle, and everything that it holds is counted: memory, open files, the object
stores, leases, bookings, slots, pages and bytes under way. What should be nothing must be nothing
after every round; memory, open files and stores may not grow from the middle third to the last.

    python benchmarks/serving_soak.py --model DIR --soak 30
"""

from __future__ import annotations

import asyncio
import random
import time
from argparse import ArgumentParser, Namespace
from typing import Any

from recorder.options import add_dtype, add_model, add_seed, benchmark_parser, model_label
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.client import Client, Reply
from serving.flatness import Limits, judged
from serving.loads import add_lengths, drawn_load
from serving.measuring import under_load
from serving.resources import idle_sample
from serving.services import served, settings_of

GROWING = {
    "memory of replicas, MB": Limits(0.03, 8.0),
    "memory of Ray, MB": Limits(0.03, 8.0),
    "open files of replicas": Limits(0.02, 4.0),
    "open files of Ray": Limits(0.02, 8.0),
    "object store, MB": Limits(0.0, 1.0),
}
"""What a process always has some of, and the growth that is none (project default)."""


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    add_seed(options, "prompts, arrivals, and of who leaves")
    add_lengths(options)
    options.add_argument("--soak", type=float, default=2.0, metavar="MINUTES")
    options.add_argument("--round", type=float, default=10.0, help="seconds of a round of requests")
    options.add_argument("--streams", type=int, default=16, help="clients at once")
    options.add_argument("--leave", type=float, default=0.1, help="share of clients that leave")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    arrivals = drawn_load(arguments)
    samples: list[dict[str, float]] = []
    totals = {"requests": 0, "failed": 0, "left": 0}
    with served(settings_of(arguments, "disaggregated"), "rayapp, disaggregated") as server:
        until_s = time.monotonic() + 60.0 * arguments.soak
        while time.monotonic() < until_s:
            crowd = Crowd(arguments, number=len(samples))
            found = under_load(arguments, server, lambda client, c=crowd: c.ask(client, arrivals))
            totals["requests"] += len(found.replies)
            totals["failed"] += found.numbers["failed"]
            totals["left"] += crowd.num_left
            samples.append(idle_sample(server))
            recorder.write(results={**totals, "quantities": quantities(samples)})


def quantities(samples: list[dict[str, float]]) -> dict[str, Any]:
    """The judgement of every quantity."""
    return {
        name: judged([sample.get(name, 0.0) for sample in samples], GROWING.get(name))
        for name in samples[-1]
    }


class Crowd:
    """Clients that ask one request after the other for the length of a round; some leave early."""

    def __init__(self, arguments: Namespace, number: int) -> None:
        self._streams = arguments.streams
        self._span_s = arguments.round
        self._leave = arguments.leave
        self._rng = random.Random(f"{arguments.seed}-{number}")
        self.num_left = 0

    async def ask(self, client: Client, arrivals: Any) -> list[Reply]:
        """The replies to those that stayed."""
        until_s = time.monotonic() + self._span_s
        replies: list[Reply] = []

        async def stream() -> None:
            while time.monotonic() < until_s:
                number = self._rng.randrange(len(arrivals))
                one = arrivals[number]
                asking = asyncio.ensure_future(client.ask(number, one.num_prompt, one.num_answer))
                if self._rng.random() < self._leave:
                    await asyncio.wait({asking}, timeout=self._rng.expovariate(4.0))
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                    self.num_left += 1
                else:
                    replies.append(await asking)

        await asyncio.gather(*(stream() for _ in range(self._streams)))
        return replies


def report(record: Record) -> list[Block]:
    asked, results = record["configuration"], record["results"]
    found = results["quantities"]
    rounds = len(next(iter(found.values()))["values"])
    growing = [name for name, quantity in found.items() if not quantity["is_flat"]]
    verdict = f"These are not flat: {', '.join(growing)}." if growing else "All of it is flat."
    return [
        f"{asked['soak']:g} minutes of {asked['streams']} clients on a disaggregated service of "
        f"{asked['model']} in {asked['dtype']}: {results['requests']} requests were asked to their "
        f"end, {results['failed']} of them failed, and {results['left']} clients left. Counted "
        f"after each of {rounds} rounds, while the service was idle. {verdict}",
        _table(found),
    ]


def _table(found: dict[str, Any]) -> Table:
    columns = ("held while idle", "middle third", "last third", "most", "flat")
    rows = [
        (
            name,
            *(f"{value:,.1f}" for value in (one["before"], one["after"], max(one["values"]))),
            "yes" if one["is_flat"] else "no",
        )
        for name, one in found.items()
    ]
    return Table(columns, rows)


if __name__ == "__main__":
    run(parser(), measure, report, label=model_label)
