"""Claim: pools sized by work in seconds meet targets with few replicas, whatever the load is.

Simulated services, under the service's own policy, routing and scheduler, meet published traces and
drawn loads. Beside ours run Ray Serve's default policy and the formulas of llm-d, Dynamo,
HeteroScale and TokenScale as we read them. Each of these has a knob; the value that was best for
the very load is taken, in hindsight, while ours has the same settings everywhere. All start with
the replicas that the mean load needs. Costs of the stages were measured before
(`rayapp plan-capacity --model DIR --save-costs DIR`).

    python benchmarks/autoscaling.py --costs costs-1.json --conversation CONV.csv --code CODE.csv
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recorder.options import add_seed, benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from scaling.trials import CEILING, OURS, Trial, chosen, row_of, setup_of, single_settings

from rayapp.errors import InputError
from rayapp.scaling.settings import ScalingSettings, Targets
from rayapp.scaling.view import DECODE, PREFILL
from rayapp.simulation.simulate import Deaf
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.traces import SHAPES, Arrival, drawn, read_trace

DEAD = "dead metrics"


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_seed(options, "drawn loads")
    options.add_argument("--costs", type=Path, help="measured stage costs, JSON; needed")
    options.add_argument("--conversation", type=Path, help="trace of conversations, CSV")
    options.add_argument("--code", type=Path, help="trace of code completions, CSV")
    options.add_argument("--requests", type=int, default=2000, help="of each trace")
    options.add_argument("--loads", nargs="*", choices=[*SHAPES, DEAD], default=[*SHAPES, DEAD])
    options.add_argument("--rate", type=float, default=4.0, help="requests/s of drawn loads")
    options.add_argument("--span", type=float, default=600.0, help="seconds of drawn loads")
    options.add_argument("--targets", type=float, nargs=2, default=[20000, 150], help="TTFT, TPOT")
    options.add_argument("--interval", type=float, default=2.0, help="seconds between reports")
    options.add_argument("--goal", type=float, default=0.99, help="share within targets")
    options.add_argument("--most", type=int, default=48, help="replicas of each stage")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    ttft_ms, tpot_ms = arguments.targets
    if arguments.costs is None:
        raise InputError("--costs: there are none; measure them with rayapp plan-capacity")
    costs = StageCosts.load(arguments.costs)
    targets = Targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    settings = ScalingSettings(
        targets=targets,
        attainment=arguments.goal,
        cold_start_s=costs.cold_start_s,
        interval_s=arguments.interval,
    )
    loads: dict[str, Any] = {}
    for name, arrivals, deaf, num_changes in loads_of(arguments):
        setup = setup_of(arrivals, costs=costs, targets=targets)
        trial = Trial(arrivals, setup, arguments.most, deaf, num_changes)
        rows = []
        for policy, knob, outcome in trial.everyone(settings):
            rows.append(row_of(policy, knob, outcome))
            numbers = {key: rows[-1][key] for key in ("policy", "knob", "within", "replica_s")}
            print(name, numbers, flush=True)
        loads[name] = {"requests": len(arrivals), "turns_of_load": num_changes, "rows": rows}
        recorder.write(costs=costs.model_dump(), results=loads)


Load = tuple[str, list[Arrival], tuple[Deaf, ...], int | None]


def loads_of(arguments: Namespace) -> Iterator[Load]:
    """The traces that were given, then the drawn loads."""
    for name in ("conversation", "code"):
        path = getattr(arguments, name)
        if path is not None:
            yield name, read_trace(path, arguments.requests), (), None
    for name in arguments.loads:
        shape = "burst" if name == DEAD else name
        arrivals = drawn(shape, per_s=arguments.rate, span_s=arguments.span, seed=arguments.seed)
        span_s = arguments.span
        # Nobody of prefill reports for a sixth of the time, half of decode for a third of it.
        deaf = (
            Deaf(PREFILL, span_s / 6, span_s / 3),
            Deaf(DECODE, span_s / 3, 2 * span_s / 3, share=0.5),
        )
        yield name, arrivals, deaf if name == DEAD else (), SHAPES[shape].num_changes


def report(record: Record) -> list[Block]:
    asked, results = record["configuration"], record["results"]
    ttft_ms, tpot_ms = asked["targets"]
    goal = asked["goal"]
    best = [_is_best(load["rows"], goal) for load in results.values()]
    blocks: list[Block] = [
        f"Simulated pools of {record['costs']['name']}, whose stage costs were measured, with "
        f"{record['costs']['cold_start_s']:g} s until a new replica works. Targets: first token "
        f"within {ttft_ms / 1000:g} s, further ones within {tpot_ms:g} ms each, both met by "
        f"{100 * goal:g} % of requests. Every other policy has the setting that was best for the "
        "very load, in hindsight; ours has one for all. Where even all replicas all the time miss "
        "the goal, some requests are too long for the targets. Replica-seconds stand beside ours.",
        f"Beside these best settings, ours meets the goal with the fewest replica-seconds in "
        f"{sum(best)} of {len(best)} loads. With one setting for all loads, as an operator would "
        "have to choose it:",
        _single_table([load["rows"] for load in results.values()], goal),
    ]
    for name, load in results.items():
        blocks += [f"**{name}**, {load['requests']:,} requests{_turns(load)}", _table(load, goal)]
    return blocks


def _single_table(loads: Sequence[Sequence[dict[str, Any]]], goal: float) -> Table:
    columns = (
        *("policy", "setting", "loads that met the goal", "lowest share within targets"),
        *("replica-seconds of all loads", "beside ours"),
    )
    rows = single_settings(loads, goal)
    ours_s = next(row["replica_s"] for row in rows if row["policy"] == OURS)
    cells = [
        (
            row["policy"],
            "" if row["knob"] is None else f"{row['knob']:g}",
            f"{row['met']} of {len(loads)}",
            f"{100 * row['lowest']:.1f} %",
            f"{row['replica_s']:,.0f}",
            f"{row['replica_s'] / ours_s:.2f}",
        )
        for row in rows
    ]
    return Table(columns, cells)


def _turns(load: dict[str, Any]) -> str:
    number = load["turns_of_load"]
    return "" if number is None else f", whose load turns {number} times"


def _is_best(rows: Sequence[dict[str, Any]], goal: float) -> bool:
    """Whether ours meets the goal, or comes as near as all replicas do, for the least."""
    ceiling = next(row["within"] for row in rows if row["policy"] == CEILING)
    reached = min(goal, ceiling - 0.01)
    good = [row for row in chosen(rows, reached) if row["within"] >= reached]
    return bool(good) and min(good, key=lambda row: row["replica_s"])["policy"] == OURS


def _table(load: dict[str, Any], goal: float) -> Table:
    columns = (
        *("policy", "setting", "within targets", "TTFT", "TPOT", "replica-seconds", "beside ours"),
        *("changes per hour", "turns, prefill / decode"),
    )
    rows = chosen(load["rows"], goal)
    ours_s = next(row["replica_s"] for row in rows if row["policy"] == OURS)
    cells = [
        (
            row["policy"],
            "" if row["knob"] is None else f"{row['knob']:g}",
            f"{100 * row['within']:.1f} %" + ("" if row["within"] >= goal else " (missed)"),
            f"{100 * row['within_ttft']:.1f} %",
            f"{100 * row['within_tpot']:.1f} %",
            f"{row['replica_s']:,.0f}",
            f"{row['replica_s'] / ours_s:.2f}",
            f"{row['changes_per_h']:.0f}",
            " / ".join(str(row["turns_by_pool"][pool]) for pool in (PREFILL, DECODE)),
        )
        for row in rows
    ]
    return Table(columns, cells)


def label(arguments: Namespace) -> str:
    del arguments
    return ""


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
