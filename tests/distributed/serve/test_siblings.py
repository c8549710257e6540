"""Sums over ingress replicas: whoever is asked, and whoever has died, they never run backwards."""

from __future__ import annotations

import asyncio

from rayapp.api.metrics import ApiMetrics
from rayapp.api.service import HealthReport
from rayapp.distributed.serve.ingress.siblings import Siblings
from rayapp.kv.ledger import Ledger


class Cluster:
    """Ingress replicas, as Serve's handle of them all."""

    def __init__(self, *names):
        self.replicas = {}
        for name in names:
            self.start(name)

    def start(self, name):
        metrics, ledger = ApiMetrics(), Ledger()
        siblings = Siblings(name, self, ledger, metrics.counts)
        self.replicas[name] = (siblings, metrics, ledger)

    def broadcast(self, method):
        assert method == "tallies"
        return self

    async def results_async(self, **_):
        return [siblings.own() for siblings, *_ in self.replicas.values()]

    async def prompts(self, name):
        """What /metrics of a replica shows as its sum."""
        siblings, metrics, ledger = self.replicas[name]
        others = await siblings.others()
        text = metrics.render(HealthReport(ready=True), None, [t.counts for t in others.values()])
        (line,) = [
            line for line in text.decode().splitlines()
            if line.startswith("rayapp_prompt_tokens_total")
        ]  # fmt: skip
        sent = Ledger.merge([ledger, *(t.ledger for t in others.values())]).totals.bytes_sent
        return float(line.split()[1]), sent

    def work(self, name, amount):
        _, metrics, ledger = self.replicas[name]
        metrics.count_prompt(amount)
        ledger.totals.bytes_sent += 10 * amount


def test_all_replicas_show_the_same_sums():
    async def scenario():
        cluster = Cluster("a", "b", "c")
        for amount, name in enumerate("abc", 1):
            cluster.work(name, amount)
        for name in "abc":
            assert await cluster.prompts(name) == (6.0, 60)
        cluster.work("b", 4)
        assert await cluster.prompts("c") == (10.0, 100)

    asyncio.run(scenario())


def test_what_a_dead_replica_counted_stays_as_it_was_last_read():
    async def scenario():
        cluster = Cluster("a", "b", "c")
        cluster.work("b", 5)
        assert await cluster.prompts("a") == (5.0, 50)
        del cluster.replicas["b"]
        cluster.start("d")
        for name in ("d", "c", "a"):
            assert await cluster.prompts(name) == (5.0, 50)
        del cluster.replicas["a"]  # the one who had read it, but others have heard of it
        cluster.work("d", 1)
        assert await cluster.prompts("c") == (6.0, 60)

    asyncio.run(scenario())
