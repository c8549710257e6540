"""Claim: simulated times to first and per further token lie within 15 % of those of a real service.

The stage costs of the model are measured first, in this process. Then a real service with one
replica of each stage answers a trace over HTTP, its lengths divided, and the simulator runs the
same requests. What a request takes beside its stages (HTTP, calls, the store) is measured on lone
requests before the load, and given to the simulator. For a quiet machine with two free cores.

    python benchmarks/capacity_check.py --model DIR --dtype bfloat16 --trace AzureLLM...conv.csv
"""

from __future__ import annotations

import asyncio
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from recorder.options import add_dtype, add_model, add_seed, benchmark_parser, model_label
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving.client import Reply, Server
from serving.measuring import replies

from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.plan import PruningPlan
from rayapp.scaling.admission import Room
from rayapp.scaling.settings import ScalingSettings
from rayapp.simulation.outcome import Outcome
from rayapp.simulation.policies import FixedPolicy
from rayapp.simulation.settings import MeasuringSettings
from rayapp.simulation.simulate import Pools, simulate
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.traces import Arrival, at_rate, drawn, read_trace, scaled
from rayapp.workflows.capacity_plan.measured import measured_costs

_LONE = Arrival(0.0, 16, 8)
_TIMEOUT_S = 300.0
_SHARES = (50, 99)


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "bfloat16")
    add_seed(options, "prompts, and of arrivals where no trace is given")
    options.add_argument("--trace", type=Path, help="CSV of arrivals; drawn ones without it")
    options.add_argument("--requests", type=int, default=300, help="of the trace")
    options.add_argument("--divisor", type=float, default=8, help="of the trace's lengths")
    options.add_argument("--rate", type=float, default=1.0, help="requests per second")
    options.add_argument("--max-num-seqs", type=int, default=16)
    options.add_argument("--max-model-len", type=int, default=2048)
    options.add_argument("--lone", type=int, default=5, help="lone requests before the load")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    arrivals = arrivals_of(arguments)
    measuring = MeasuringSettings(
        dtype=arguments.dtype, threads=arguments.threads, max_num_seqs=arguments.max_num_seqs
    )
    costs = measured_costs(str(arguments.model), PruningPlan(), measuring, "measured")
    with service(arguments) as server:
        lone = asyncio.run(
            replies(arguments, server, [_LONE] * arguments.lone, alone=True, timeout_s=_TIMEOUT_S)
        )
        real = asyncio.run(replies(arguments, server, arrivals, alone=False, timeout_s=_TIMEOUT_S))
    costs = costs.model_copy(update={"overhead_s": overhead_s(costs, lone)})
    settings = ScalingSettings()
    outcome = simulate(
        arrivals, costs, Pools(), FixedPolicy(), settings=settings, room=Room(1 << 30)
    )
    recorder.write(
        costs=costs.model_dump(),
        results={
            "failed": sum(reply.error is not None for reply in real),
            "real": numbers_of_replies(real),
            "simulated": numbers_of_outcome(outcome),
        },
    )


def arrivals_of(arguments: Namespace) -> list[Arrival]:
    count = arguments.requests
    if arguments.trace:
        arrivals = read_trace(arguments.trace, count)
    else:
        arrivals = drawn("poisson", per_s=1.0, span_s=float(count), seed=arguments.seed)
    cut = scaled(arrivals, arguments.divisor, arguments.max_model_len)
    return at_rate(cut, arguments.rate)


def overhead_s(costs: StageCosts, lone: Sequence[Reply]) -> float:
    """Seconds of a lone request before its first token that its prefill does not explain."""
    first_s = statistics.median(reply.first_s for reply in lone if reply.first_s is not None)
    return max(0.0, first_s - costs.prefill.prompt_s(_LONE.num_prompt))


@contextmanager
def service(arguments: Namespace) -> Iterator[Server]:
    pool = {"num_cpus": arguments.threads}
    settings = ServiceSettings.parse(
        {
            "model": str(arguments.model),
            "dtype": arguments.dtype,
            "port": free_port(),
            "max_model_len": arguments.max_model_len,
            "max_num_seqs": arguments.max_num_seqs,
            "max_waiting": max(arguments.requests, 256),
            "ingress": {"labels": {"role": "head"}},
            "prefill": {**pool, "labels": {"role": "prefill"}},
            "decode": {**pool, "labels": {"role": "decode"}},
        }
    )
    try:
        with local_cluster() as cluster, running_service(settings, address=cluster.address) as at:
            yield Server("rayapp", at.url, settings.model_name)
    finally:
        ray.shutdown()


def numbers_of_replies(answers: Sequence[Reply]) -> dict[str, float]:
    good = [reply for reply in answers if reply.error is None and reply.first_s is not None]
    firsts = [reply.first_s for reply in good]
    further = [reply.per_token_s for reply in good if reply.per_token_s is not None]
    return _quantiles(firsts, further)


def numbers_of_outcome(outcome: Outcome) -> dict[str, float]:
    firsts = [one.ttft_s for one in outcome.requests if one.ttft_s is not None]
    further = [
        one.tpot_s
        for one in outcome.requests
        if one.tpot_s is not None and one.arrival.num_answer > 1
    ]
    return _quantiles(firsts, further)


def _quantiles(firsts: Sequence[float], further: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_p{share}_s": float(np.percentile(values, share))
        for name, values in (("ttft", firsts), ("tpot", further))
        for share in _SHARES
    }


def report(record: Record) -> list[Block]:
    asked, found = record["configuration"], record["results"]
    real, simulated = found["real"], found["simulated"]
    rows = [
        (
            f"{name[:4].upper()} {name[5:].removesuffix('_s')}",
            f"{1000 * real[name]:.0f}",
            f"{1000 * simulated[name]:.0f}",
            f"{simulated[name] / real[name]:.2f}",
        )
        for name in real
    ]
    medians = ("ttft_p50_s", "tpot_p50_s")
    off = max(abs(simulated[name] / real[name] - 1) for name in medians)
    verdict = "Both medians lie" if off <= 0.15 else "Not both medians lie"
    return [
        f"One replica of each stage of {asked['model']}, {asked['dtype']}, {asked['requests']} "
        f"requests of {asked['trace'] or 'a drawn load'} with lengths divided by "
        f"{asked['divisor']:g}, {asked['rate']:g} a second. {verdict} within 15 % "
        f"(the larger difference is {100 * off:.0f} %); {found['failed']} requests failed.",
        Table(("", "real, ms", "simulated, ms", "simulated / real"), rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report, label=model_label)
