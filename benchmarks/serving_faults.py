"""Claim: a service whose replicas are killed one by one loses no answer and little goodput.

Drawn requests come in an open loop at a share of what the service holds (measured first), to
several replicas of both stages. The same requests come again while one replica a minute is killed
with SIGKILL, prefill and decode in turns. An answer is good if it keeps both limits. Answers of
both runs are compared: in float32 on one thread equal tokens are promised; in bf16 near ties may
fall otherwise where batches differ.

    python benchmarks/serving_faults.py --model DIR --dtype float32 --minutes 5
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from recorder.options import add_dtype, add_model, add_seed, benchmark_parser, model_label
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.client import Client, Reply, Server
from serving.loads import add_lengths, drawn_load
from serving.measuring import Measured, held_per_s, under_load
from serving.services import replica_pids, served, settings_of

from rayapp.distributed.serve.settings import DECODE, PREFILL
from rayapp.simulation.traces import Arrival, at_rate

_LOOK_S = 0.2


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "float32")
    add_seed(options, "prompts, arrivals and victims")
    add_lengths(options)
    options.add_argument("--replicas", type=int, default=2, help="of each stage")
    options.add_argument("--minutes", type=float, default=5.0, help="of each run")
    options.add_argument("--period", type=float, default=60.0, help="seconds between two kills")
    options.add_argument("--share", type=float, default=0.5, help="of what the service holds")
    options.add_argument("--capacity-requests", type=int, default=96)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    arrivals = drawn_load(arguments)
    settings = settings_of(arguments, "disaggregated", replicas=arguments.replicas)
    with served(settings, "rayapp, disaggregated") as server:
        capacity = held_per_s(arguments, server, arrivals[: arguments.capacity_requests])
        rate = arguments.share * capacity.numbers["holds_per_s"]
        coming = at_rate(repeated(arrivals, int(60.0 * arguments.minutes * rate)), rate)
        results: dict[str, Any] = {
            "holds_per_s": capacity.numbers["holds_per_s"], "rate_per_s": rate,
        }  # fmt: skip
        calm = under_load(arguments, server, lambda client: client.open_loop(coming))
        results["undisturbed"] = calm.numbers
        recorder.write(results=results)
        results["disturbed"] = disturbed(arguments, server, coming, calm)
        recorder.write(results=results)


def repeated(arrivals: Sequence[Arrival], count: int) -> list[Arrival]:
    """As many arrivals as are wanted, the same ones again and again."""
    span_s = arrivals[-1].at_s + 1.0
    return [
        Arrival(one.at_s + turn * span_s, one.num_prompt, one.num_answer)
        for turn in range(max(1, count) // len(arrivals) + 1)
        for one in arrivals
    ][: max(2, count)]


def disturbed(
    arguments: Namespace, server: Server, coming: Sequence[Arrival], calm: Measured
) -> dict[str, Any]:
    """The numbers of the same load while replicas are killed."""
    killing = Killing(arguments)

    async def load(client: Client) -> list[Reply]:
        task = asyncio.ensure_future(killing.go_on())
        try:
            return await client.open_loop(coming)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    found = under_load(arguments, server, load)
    pairs = zip(calm.replies, found.replies, strict=True)
    both = [(one, other) for one, other in pairs if not (one.error or other.error)]
    return {
        **found.numbers,
        "kills": killing.num_killed,
        "back_s": killing.back_s,
        "compared": len(both),
        "other_text": sum(one.text != other.text for one, other in both),
        "goodput_share": found.numbers["goodput_per_s"] / calm.numbers["goodput_per_s"]
        if calm.numbers["goodput_per_s"]
        else None,
    }


class Killing:
    """Kills a replica now and then, and notes how long its pool is short of one."""

    def __init__(self, arguments: Namespace) -> None:
        self._period_s = arguments.period
        self._replicas = arguments.replicas
        self._rng = random.Random(arguments.seed)
        self.num_killed = 0
        self.back_s: list[float] = []

    async def go_on(self) -> None:
        """Kill one replica a period, of both pools in turns, until cancelled."""
        while True:
            await asyncio.sleep(self._period_s)
            pool = (PREFILL, DECODE)[self.num_killed % 2]
            pids = await asyncio.to_thread(replica_pids, pool)
            if len(pids) < self._replicas:
                continue  # One of an earlier kill is not back: the next period has its turn.
            os.kill(self._rng.choice(sorted(pids.values())), signal.SIGKILL)
            self.num_killed += 1
            await self._wait_whole(pool)

    async def _wait_whole(self, pool: str) -> None:
        killed_s = time.monotonic()
        while len(await asyncio.to_thread(replica_pids, pool)) < self._replicas:
            await asyncio.sleep(_LOOK_S)
        self.back_s.append(time.monotonic() - killed_s)


def report(record: Record) -> list[Block]:
    asked, results = record["configuration"], record["results"]
    ttft_limit_s, tpot_limit_s = asked["limits"]
    blocks: list[Block] = [
        f"{asked['replicas']} prefill and {asked['replicas']} decode replicas of {asked['model']} "
        f"in {asked['dtype']}, {results['rate_per_s']:.2f} requests a second of the "
        f"{results['holds_per_s']:.2f} that they hold, {asked['minutes']:g} minutes each. A good "
        f"answer has its first token within {ttft_limit_s:g} s and the others within "
        f"{1000 * tpot_limit_s:g} ms each.",
        _table(results),
    ]
    found = results.get("disturbed")
    if found is None:
        return blocks
    share = found["goodput_share"]
    back = ", ".join(f"{seconds:.1f}" for seconds in found["back_s"]) or "none in time"
    return [
        *blocks,
        f"{found['kills']} replicas were killed; seconds until their pool was whole again: {back}. "
        f"Goodput is {'unknown' if share is None else f'{share:.2f}'} of the undisturbed one. Of "
        f"{found['compared']} answers, {found['other_text']} had another text than undisturbed.",
    ]


def _table(results: dict[str, Any]) -> Table:
    columns = (
        *("run", "requests", "failed", "good answers/s", "tokens/s"),
        *("TTFT p50, s", "p99, s", "TPOT p50, ms", "p99, ms"),
    )
    cells = []
    for name in ("undisturbed", "disturbed"):
        found = results.get(name)
        if found is None:
            continue
        cells.append(
            (
                *(name, str(found["requests"]), str(found["failed"])),
                f"{found['goodput_per_s']:.2f}",
                f"{found['tokens_per_s']:.1f}",
                *(_number(found[f"ttft_p{share}_s"], 1, 3) for share in (50, 99)),
                *(_number(found[f"tpot_p{share}_s"], 1000, 1) for share in (50, 99)),
            )
        )
    return Table(columns, cells)


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None else f"{factor * value:.{digits}f}"


if __name__ == "__main__":
    run(parser(), measure, report, label=model_label)
