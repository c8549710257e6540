"""A plan of capacity: from stage costs and a load to replicas, their price, and a time line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayapp.evaluation.cells import Table
from rayapp.scaling.settings import Targets
from rayapp.simulation.capacity import Capacity, plan_capacity
from rayapp.simulation.outcome import Outcome
from rayapp.simulation.settings import CapacitySettings, LoadSettings
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.timeline import timeline_svg
from rayapp.simulation.traces import Arrival, drawn, read_trace, scaled


def arrivals_of(load: LoadSettings, max_model_len: int) -> list[Arrival]:
    """The requests that come.

    Raises:
        InputError: The trace cannot be read, or nothing would come.
    """
    if load.trace is None:
        arrivals = drawn(load.load, per_s=load.rate, span_s=load.span_s, seed=load.seed)
    else:
        arrivals = read_trace(Path(load.trace), load.requests)
    return scaled(arrivals, load.divisor if load.trace else 1.0, max_model_len)


def capacities(
    load: LoadSettings,
    every: Sequence[StageCosts],
    targets: Targets,
    settings: CapacitySettings,
) -> list[Capacity]:
    """The capacity that every kind of replica needs for a load, the cheapest first.

    Raises:
        InputError: The load cannot be used.
    """
    arrivals = arrivals_of(load, settings.max_model_len)
    found = [plan_capacity(arrivals, costs, targets, settings) for costs in every]

    def rank(one: Capacity) -> tuple[bool, float]:
        return one.best.share_within() < one.attainment, one.price_per_million(one.best)

    return sorted(found, key=rank)


def capacity_tables(found: Sequence[Capacity]) -> tuple[Table, ...]:
    """A line for every kind of replica, in both ways: fixed pools, and pools that follow."""
    columns = (
        *("costs", "pools", "prefill", "decode", "within targets", "TTFT p50, p99 (s)"),
        *("TPOT p50, p99 (ms)", "replica-hours", "price per 1M tokens"),
    )
    rows = []
    for one in found:
        most = [_most(one.elastic, pool) for pool in ("prefill", "decode")]
        sizes = {"fixed": [str(size) for size in one.sizes], "follow the load": most}
        for way, outcome in (("fixed", one.fixed), ("follow the load", one.elastic)):
            ttft, tpot = outcome.quantiles("ttft_s"), outcome.quantiles("tpot_s")
            rows.append(
                (
                    one.costs.name or "costs",
                    way,
                    *sizes[way],
                    f"{100 * outcome.share_within():.1f} %",
                    f"{ttft[0]:.2f}, {ttft[1]:.2f}",
                    f"{1000 * tpot[0]:.0f}, {1000 * tpot[1]:.0f}",
                    f"{outcome.total_replica_s / 3600:.2f}",
                    f"{one.price_per_million(outcome):,.2f}",
                )
            )
    return (Table("Replicas that the load needs", columns, tuple(rows)),)


def _most(outcome: Outcome, pool: str) -> str:
    moments = outcome.moments
    numbers = [one.num_prefill if pool == "prefill" else one.num_decode for one in moments]
    return f"{min(numbers)} to {max(numbers)}" if numbers else "-"


def conclusion(found: Sequence[Capacity]) -> str:
    """The replicas to run, in one sentence."""
    best = found[0]
    name = f" with {best.costs.name}" if best.costs.name else ""
    share = f"{100 * best.best.share_within():.1f} % of requests meet the targets"
    price = f"{best.price_per_million(best.best):,.2f} per million answer tokens"
    if best.best.share_within() < best.attainment:
        return (
            f"No way meets the targets{name}: {share} at best, {price}; allow more replicas with "
            "--most-replicas, or looser targets."
        )
    if best.best is best.fixed:
        return (
            f"Run {best.sizes[0]} prefill and {best.sizes[1]} decode replicas{name}: {share}, "
            f"{price}."
        )
    most = [_most(best.elastic, pool) for pool in ("prefill", "decode")]
    return (
        f"Let {most[0]} prefill and {most[1]} decode replicas follow the load{name}: {share}, "
        f"{price}."
    )


def write_timelines(found: Sequence[Capacity], out: Path) -> list[Path]:
    """Draw the pools that follow the load, a file for every kind of replica."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for number, one in enumerate(found, start=1):
        path = out / f"timeline-{number}.svg"
        title = f"Pools that follow the load: {one.costs.name or 'costs'}"
        path.write_text(timeline_svg(one.elastic, title), encoding="utf-8")
        written.append(path)
    return written
