"""Claim: pools and nodes of a real cluster follow the load, and no request is lost.

A service on a real Ray cluster meets a load that changes, while somebody counts its replicas. With
`--engine sleeping`, its blocks sleep for as long as measured ones take and compute nothing, because
more replicas that compute gain nothing on few cores; all else is the service's own. The simulator
meets the same load beside it. With `--nodes`, Ray's autoscaler starts a node for every replica that
finds none, and ends nodes that are idle. With `--engine real`, the model computes.

    python benchmarks/live_pools.py --load burst --nodes
"""

from __future__ import annotations

import asyncio
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import ray
from recorder.options import RESULTS, add_model, add_seed, benchmark_parser
from recorder.page import Block
from recorder.record import Record, read_record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.client import Reply, Server
from serving.growing_cluster import NodeType, growing_cluster
from serving.measuring import replies
from serving.sleeping import sleeping_configuration
from serving.watch import POOLS, Watch, cold_start_s, seen_outcome

from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve import decisions
from rayapp.distributed.serve.deploy import configuration, running_service
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.scaling.admission import Room
from rayapp.scaling.settings import ScalingSettings, Targets
from rayapp.simulation.outcome import Moment, Outcome
from rayapp.simulation.policies import OwnPolicy
from rayapp.simulation.requests import Request
from rayapp.simulation.simulate import Pools, simulate
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.timeline import timeline_svg
from rayapp.simulation.traces import SHAPES, Arrival, drawn, scaled

SLEEPING, REAL = "sleeping", "real"
COSTS = "autoscaling-smollm2-135m"
"""The record whose stage costs the blocks sleep for."""
_LONE = Arrival(0.0, 16, 8)
_NUM_LONE = 3
_MAX_MODEL_LEN = 4096
_TIMEOUT_S = 600.0
_NODES_IDLE_S = 20.0


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_seed(options, "the load")
    options.add_argument("--engine", choices=[SLEEPING, REAL], default=SLEEPING)
    options.add_argument("--nodes", action="store_true", help="nodes come and go, one per replica")
    options.add_argument("--load", choices=list(SHAPES), default="burst")
    options.add_argument("--rate", type=float, default=0.5, help="usual requests per second")
    options.add_argument("--span", type=float, default=240.0, help="seconds that the load lasts")
    options.add_argument("--divisor", type=float, default=2.0, help="of the load's lengths")
    options.add_argument("--most", type=int, default=4, help="replicas of each stage")
    options.add_argument("--max-num-seqs", type=int, default=32, help="slots of a decode replica")
    options.add_argument("--targets", type=float, nargs=2, default=[2000, 120], help="TTFT, TPOT")
    options.add_argument("--delay", type=float, default=30.0, help="seconds before pools shrink")
    options.add_argument("--rest", type=float, default=120.0, help="longest wait for them to rest")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    ttft_ms, tpot_ms = arguments.targets
    scaling = ScalingSettings(
        targets=Targets(ttft_ms=ttft_ms, tpot_ms=tpot_ms),
        fast_s=arguments.delay / 4,
        slow_s=arguments.delay,
        downscale_delay_s=arguments.delay,
    )
    load = drawn(arguments.load, per_s=arguments.rate, span_s=arguments.span, seed=arguments.seed)
    service = settings_of(arguments, scaling)
    arrivals = scaled(load, arguments.divisor, service.max_model_len or _MAX_MODEL_LEN)
    costs = costs_of(arguments)
    seen = observed(arguments, service, costs, arrivals)
    results = {"real": row_of(seen.outcome), "failed": seen.failed, "decisions": seen.decisions}
    if arguments.engine == SLEEPING:
        known = {"overhead_s": seen.overhead_s, "cold_start_s": seen.cold_start_s}
        costs = costs.model_copy(update=known)
        results["simulated"] = row_of(simulated(arguments, costs, scaling, arrivals))
    recorder.write(costs=costs.model_dump(), results={**results, "requests": len(arrivals)})


def settings_of(arguments: Namespace, scaling: ScalingSettings) -> ServiceSettings:
    computes = arguments.engine == REAL
    return ServiceSettings.parse(
        {
            "model": str(arguments.model.resolve()),
            "dtype": "float32",
            "port": free_port(),
            "max_model_len": None if computes else _MAX_MODEL_LEN,
            "max_num_seqs": arguments.max_num_seqs,
            "max_waiting": 1000,
            "deadlines": {"queue_s": _TIMEOUT_S, "transfer_s": _TIMEOUT_S},
            "ingress": {"labels": {"role": "head"}},
            **{
                name: {"replicas": f"1:{arguments.most}", "labels": {"role": name}}
                for name in POOLS
            },
            "scaling": scaling,
        }
    )


def costs_of(arguments: Namespace) -> StageCosts:
    """The costs that were measured, with the sizes of this service."""
    record = read_record(RESULTS / f"{COSTS}.json", "autoscaling")
    costs = StageCosts.parsed(record["costs"], COSTS)
    slots = arguments.max_num_seqs
    sizes = {"max_num_seqs": slots, "max_entries": slots * _MAX_MODEL_LEN}
    return costs.model_copy(update=sizes)


@contextmanager
def cluster_of(arguments: Namespace) -> Iterator[tuple[str, Callable[[str], int]]]:
    """A cluster's address, and a function that counts the nodes of a pool."""
    most = arguments.most
    if arguments.nodes:
        types = {name: NodeType({"role": name}, most=most) for name in POOLS}
        with growing_cluster(types, idle_s=_NODES_IDLE_S) as growing:
            yield growing.address, growing.count
        return
    stages = [NodeSpec({"role": name}, num_cpus=most) for name in POOLS]
    with local_cluster([NodeSpec({"role": "head"}), *stages]) as cluster:
        yield cluster.address, lambda _: 0


@dataclass(frozen=True)
class Seen:
    """What was seen of a service under load.

    Args:
        outcome: What became of its requests and its pools.
        failed: Why requests failed, or that they were cut short.
        decisions: Its decisions in words.
        overhead_s: Seconds of a lone request beside its prefill.
        cold_start_s: Seconds until a new replica worked.
    """

    outcome: Outcome
    failed: list[str]
    decisions: list[str]
    overhead_s: float
    cold_start_s: float


def observed(
    arguments: Namespace,
    service: ServiceSettings,
    costs: StageCosts,
    arrivals: Sequence[Arrival],
) -> Seen:
    """Run the service under the load, and until its pools rest again."""
    sleeps = arguments.engine == SLEEPING
    configured = partial(sleeping_configuration, costs=costs) if sleeps else configuration
    try:
        with (
            cluster_of(arguments) as (address, count_nodes),
            running_service(service, address=address, configured=configured) as running,
        ):
            server = Server("rayapp", running.url, service.model_name)
            lone = asyncio.run(
                replies(arguments, server, [_LONE] * _NUM_LONE, alone=True, timeout_s=_TIMEOUT_S)
            )
            with Watch(count_nodes) as watch:
                began_s = time.monotonic()
                answers = asyncio.run(
                    replies(arguments, server, arrivals, alone=False, timeout_s=_TIMEOUT_S)
                )
                watch.wait_for(rests, arguments.rest)
            told = [one.text for one in decisions.read()]
    finally:
        ray.shutdown()
    requests = [request_of(n, *pair) for n, pair in enumerate(zip(arrivals, answers, strict=True))]
    wrong = [why for pair in zip(arrivals, answers, strict=True) if (why := fault_of(*pair))]
    return Seen(
        seen_outcome(watch.sights, began_s, requests, service.scaling.targets),
        wrong,
        told,
        overhead_of(lone, costs) if sleeps else 0.0,
        cold_start_s(watch.sights) or costs.cold_start_s,
    )


def rests(sight: Any) -> bool:
    """Whether every pool has one replica again, and one node if nodes come and go."""
    return all(len(sight.held[name]) == 1 and sight.nodes[name] <= 1 for name in POOLS)


def overhead_of(lone: Sequence[Reply], costs: StageCosts) -> float:
    first_s = statistics.median(reply.first_s for reply in lone if reply.first_s is not None)
    return max(0.0, first_s - costs.prefill.prompt_s(_LONE.num_prompt))


def request_of(number: int, arrival: Arrival, reply: Reply) -> Request:
    """A request as the simulator describes it; one that failed has no moments."""
    request = Request(str(number), arrival)
    if reply.error is None and reply.first_s is not None:
        request.first_s = arrival.at_s + reply.first_s
        request.finished_s = arrival.at_s + reply.last_s
    return request


def fault_of(arrival: Arrival, reply: Reply) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if reply.error is not None:
        return reply.error
    if reply.num_counted != arrival.num_answer:
        return f"{reply.num_counted} of {arrival.num_answer} tokens came"
    return None


def simulated(
    arguments: Namespace,
    costs: StageCosts,
    scaling: ScalingSettings,
    arrivals: Sequence[Arrival],
) -> Outcome:
    bounds = (1, arguments.most)
    return simulate(
        arrivals, costs, Pools(bounds, bounds), OwnPolicy(scaling), settings=scaling,
        room=Room(1 << 30),
    )  # fmt: skip


def row_of(outcome: Outcome) -> dict[str, Any]:
    return {
        **outcome.numbers(),
        "most": {
            name: max(getattr(one, f"num_{name}") for one in outcome.moments) for name in POOLS
        },
        "turns_by_pool": {name: outcome.num_turns(name) for name in POOLS},
        "moments": [list(asdict(one).values()) for one in outcome.moments],
    }


@dataclass(frozen=True)
class TimeLine:
    """The drawing of what was seen."""

    title: str
    row: dict[str, Any]

    def svg(self, salt: str) -> str:
        del salt
        moments = [Moment(*values) for values in self.row["moments"]]
        nothing = Outcome([], Targets(), self.row["span_s"], {}, {}, moments)
        return timeline_svg(nothing, self.title)


def report(record: Record) -> list[Block]:
    asked, found = record["configuration"], record["results"]
    real = found["real"]
    failed = f"{len(found['failed'])} failed" if found["failed"] else "none was lost"
    sleeps = asked["engine"] == SLEEPING
    blocks = "whose blocks sleep for measured times" if sleeps else "whose blocks compute"
    nodes = ", on nodes that Ray's autoscaler starts and ends" if asked["nodes"] else ""
    title = f"Replicas of a service {blocks}, under the load {asked['load']}"
    rows = [("real cluster", real)]
    rows += [("simulated", found["simulated"])] if "simulated" in found else []
    columns = (
        *("", "within targets", "TTFT p50, p99 (s)", "TPOT p50, p99 (ms)", "replica-seconds"),
        *("most prefill, decode", "turns, prefill / decode"),
    )
    text = (
        f"A service {blocks}{nodes}, on a real Ray cluster, under the load {asked['load']}: "
        f"{found['requests']} requests, of which {failed}. Targets: first token within "
        f"{asked['targets'][0] / 1000:g} s, further ones within {asked['targets'][1]:g} ms each."
    )
    told = "Its decisions: " + "; ".join(found["decisions"]) + "."
    return [text, Table(columns, [_cells(*row) for row in rows]), TimeLine(title, real), told]


def _cells(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        f"{100 * row['within']:.1f} %",
        f"{row['ttft_p50_s']:.2f}, {row['ttft_p99_s']:.2f}",
        f"{1000 * row['tpot_p50_s']:.0f}, {1000 * row['tpot_p99_s']:.0f}",
        f"{row['replica_s']:,.0f}",
        ", ".join(str(row["most"][name]) for name in POOLS),
        " / ".join(str(row["turns_by_pool"][name]) for name in POOLS),
    )


def label(arguments: Namespace) -> str:
    """The engine, and whether nodes come and go."""
    parts = (arguments.engine, "nodes" if arguments.nodes else "")
    return "-".join(filter(None, parts))


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
