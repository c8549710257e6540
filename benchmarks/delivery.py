"""Claim: a token costs at most 0.1 ms of CPU from the engine to ASGI's send, at 64 streams.

A replica without a model gives every running answer a token per step, at a set rate. Streams of
answers are read from the app of the ingress, in the ingress's process, without a server: with one
item per step for all of them, as the service does, and with one item per stream and step, as it did
before. Then they are read over HTTP through Serve's proxy, to see what that costs beside it. CPU is
that of whole processes while all streams run, less what they use when idle.

    python benchmarks/delivery.py --streams 1 8 64
"""

from __future__ import annotations

import asyncio
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import serving
from ray import cloudpickle, serve
from ray.serve.context import _get_global_client
from recorder.options import add_model, benchmark_parser, model_label
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from serving import per_stream, stand_in, streams
from serving.per_stream import PerStreamAttempts
from serving.stand_in import StandIn
from serving.streams import Span, cpu_s, from_app, over_http

from rayapp.api.routes import build_app
from rayapp.distributed.cluster.local import local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.app import deployment_options
from rayapp.distributed.serve.ingress.ingress import Ingress, open_service
from rayapp.distributed.serve.settings import APP_NAME, INGRESS, UNIFIED, ServiceSettings

WAYS = {"step": "one item per step", "stream": "one item per stream and step"}


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    options.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--rate", type=float, default=20.0, help="steps of the engine per second")
    options.add_argument("--tokens", type=int, default=200, help="of every answer")
    options.add_argument("--idle-s", type=float, default=5.0, help="for which idle CPU is counted")
    return options


class Reading:
    """The ingress's process: it calls the app of a service, as a server would."""

    def __init__(self, settings: ServiceSettings) -> None:
        pool = serve.get_deployment_handle(UNIFIED, APP_NAME)
        self._services = {way: open_service(settings, {UNIFIED: pool}, None) for way in WAYS}
        before = self._services["stream"]
        before._attempts = PerStreamAttempts(pool, before._versions)
        self._pool = pool

    async def pids(self) -> dict[str, int]:
        return {"replica": await self._pool.pid.remote(), "ingress": os.getpid()}

    async def cost(self, way: str, num_streams: int, num_tokens: int) -> dict[str, float]:
        """Tokens, and seconds of CPU of every process, while all streams run."""
        app = build_app(self._services[way])
        return await from_app(app, Span(num_streams, num_tokens), await self.pids())


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    results: dict[str, Any] = {"to_send": [], "over_http": []}
    for module in (serving, stand_in, per_stream, streams):
        cloudpickle.register_pickle_by_value(module)
    with deployed(arguments) as settings:
        reading = ray.remote(Reading).options(num_cpus=0).remote(settings)
        pids = ray.get(reading.pids.remote())
        ray.get(reading.cost.remote("step", 2, 24))  # warms everything up
        idle = idle_share(pids, arguments.idle_s)
        for count in arguments.streams:
            for way in WAYS:
                found = ray.get(reading.cost.remote(way, count, arguments.tokens))
                row = {"way": way, "streams": count, **per_token(found, idle)}
                results["to_send"].append(row)
                print(row, flush=True)
                recorder.write(results=results)
        pids = {"replica": pids["replica"], **serving_pids()}
        asyncio.run(over_http(settings.url, Span(2, 24), pids))
        idle = idle_share(pids, arguments.idle_s)
        for count in arguments.streams:
            found = asyncio.run(over_http(settings.url, Span(count, arguments.tokens), pids))
            row = {"streams": count, **per_token(found, idle)}
            results["over_http"].append(row)
            print(row, flush=True)
            recorder.write(results=results)


@contextmanager
def deployed(arguments: Namespace) -> Iterator[ServiceSettings]:
    """The application with a stand-in for its replica, and its real ingress."""
    settings = ServiceSettings.parse(
        {
            "model": str(arguments.model.resolve()),
            "mode": "unified",
            "dtype": "float32",
            "port": free_port(),
            "max_num_seqs": max(arguments.streams),
            "max_waiting": 2 * max(arguments.streams),
            "unified": {"num_cpus": 0.1},
            "ingress": {"num_cpus": 0.1},
        }
    )
    options = deployment_options(settings, UNIFIED, settings.unified)
    pool = serve.deployment(StandIn, name=UNIFIED, **options).bind(arguments.rate)
    options = deployment_options(settings, INGRESS, settings.ingress)
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS, **options)
    with local_cluster() as cluster:
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": settings.host, "port": settings.port},
            )
            serve.run(ingress.bind(settings, unified=pool), name=APP_NAME)
            yield settings
        finally:
            serve.shutdown()
            ray.shutdown()


def serving_pids() -> dict[str, int]:
    """The processes of the ingress and of Serve's proxy, which all belong to this cluster."""
    details = _get_global_client().get_serve_details()
    (ingress,) = details["applications"][APP_NAME]["deployments"][INGRESS]["replicas"]
    raylet = psutil.Process(ingress["pid"]).parent()
    relatives = raylet.children() if raylet is not None else []
    (proxy,) = [p.pid for p in proxies(relatives)] or [
        p.pid for p in proxies(psutil.process_iter())
    ]
    return {"ingress": ingress["pid"], "proxy": proxy}


def proxies(processes: Any) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and "ProxyActor" in p.name() + str(p.cmdline())]


def idle_share(pids: dict[str, int], for_s: float) -> dict[str, float]:
    """The share of a CPU that every process uses when nobody asks anything."""
    time.sleep(2.0)  # the last calls end
    before, began_s = cpu_s(pids), time.monotonic()
    time.sleep(for_s)
    after, took_s = cpu_s(pids), time.monotonic() - began_s
    return {name: (after[name] - before[name]) / took_s for name in pids}


def per_token(found: dict[str, float], idle: dict[str, float]) -> dict[str, float]:
    """Milliseconds of CPU per token of every process, less its idle share; the sum is ``all``."""
    tokens, wall_s = found["tokens"], found["wall_s"]
    costs = {
        name: 1000 * (found[f"{name}_cpu_s"] - share * wall_s) / tokens
        for name, share in idle.items()
    }
    rates = {f"{name}_idle_share": share for name, share in idle.items()}
    return {"tokens_per_s": tokens / wall_s, **costs, "all": sum(costs.values()), **rates}


def report(record: Record) -> list[Block]:
    asked, results = record["configuration"], record["results"]
    ways = [
        (
            WAYS[row["way"]],
            str(row["streams"]),
            f"{row['tokens_per_s']:.0f}",
            *(f"{row[name]:.3f}" for name in ("replica", "ingress", "all")),
        )
        for row in results["to_send"]
    ]
    http = [
        (
            str(row["streams"]),
            f"{row['tokens_per_s']:.0f}",
            *(f"{row[name]:.3f}" for name in ("replica", "ingress", "proxy", "all")),
        )
        for row in results["over_http"]
    ]
    return [
        "CPU per token in milliseconds, from an engine that gives every stream "
        f"{asked['rate']:g} tokens per second to ASGI's send, answers of {asked['tokens']} tokens; "
        "CPU of idle processes is taken off:",
        Table(("delivery", "streams", "tokens/s", "replica", "ingress", "both"), ways),
        "The same over HTTP, one item per step; the ingress hands every event on to Serve's proxy:",
        Table(("streams", "tokens/s", "replica", "ingress", "proxy", "all"), http),
    ]


if __name__ == "__main__":
    run(parser(), measure, report, label=model_label)
