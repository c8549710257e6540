"""Two ingress replicas share the requests and count together; a dead one holds nothing for long."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import psutil
import pytest
import ray

from tests.services import LEASE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STREAMS = 8
LONG = {"prompt": [9, 8, 7], "max_tokens": 500, "ignore_eos": True, "temperature": 0}
FREED_WITHIN_S = 3.0
"""Two seconds are promised; a busy machine may look a little later."""


@pytest.fixture(scope="module")
def service(services, deep_model):
    return services.get(
        model=str(deep_model),
        max_num_seqs=NUM_STREAMS,
        max_waiting=60,
        ingress={"labels": {"role": "head"}, "replicas": 2, "num_cpus": 0.5},
        deadlines={"lease_s": LEASE_S},
    )


@pytest.fixture(autouse=True)
def _whole_before_and_idle_after(service):
    service.wait_for("ingress", {2})
    yield
    service.check_idle()


def prompt_tokens(service):
    """What /metrics shows, whichever replica answers."""
    text = service.client.get("/metrics").text
    return float(re.search(r"^rayapp_prompt_tokens_total ([\d.e+]+)$", text, re.MULTILINE)[1])


def tallies(service):
    """What every replica has counted by itself, by name."""
    names = {}
    for told in service.handle("ingress").broadcast("tallies").results(timeout_s=60):
        own = max(told, key=lambda name: told[name].at_s)
        names[own] = told[own]
    return names


def test_they_share_the_load_and_count_together(service):
    before = {name: len(t.ledger.recent) for name, t in tallies(service).items()}
    sums = [prompt_tokens(service)]

    def ask(number):
        with httpx.Client(base_url=service.settings.url, timeout=120) as client:
            body = {**LONG, "prompt": [number, 1, 2], "max_tokens": 3}
            assert client.post("/v1/completions", json=body).status_code == 200
            sums.append(prompt_tokens(service))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(48)))
    after = tallies(service)
    shares = [len(t.ledger.recent) - before.get(name, 0) for name, t in after.items()]
    assert len(shares) == 2
    assert sum(shares) == 48
    assert min(shares) >= 6
    assert sums[-1] - sums[0] == 3 * 48
    seen = [prompt_tokens(service) for _ in range(8)]
    assert len(set(seen)) == 1  # nobody shows only its own
    totals = [service.client.get("/v1/transfers").json()["totals"] for _ in range(6)]
    assert {t["num_transfers"] for t in totals} == {
        sum(len(t.ledger.recent) for t in after.values())
    }


class Streams:
    """Long answers that are read at once, until they end or their connections break."""

    def __init__(self, service):
        self.service = service
        self._begun = threading.Semaphore(0)

    def lines(self, _):
        """The lines of an answer; None if its connection broke."""
        lines = []
        try:
            with (
                httpx.Client(base_url=self.service.settings.url, timeout=120) as client,
                client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer,
            ):
                for line in answer.iter_lines():
                    if not lines:
                        self._begun.release()
                    lines.append(line)
        except httpx.TransportError:
            return None
        return lines if lines[-2:] == ["data: [DONE]", ""] else None

    def num_leases(self):
        found = self.service.handle("decode").broadcast("check_integrity").results(timeout_s=30)
        return sum(held["leases"] for held in found)

    def killed(self, pid):
        """Kill a process while all are under way.

        Returns the number of leases that are left, and the lines of the answers that came whole.
        """
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            answers = [pool.submit(self.lines, n) for n in range(NUM_STREAMS)]
            for _ in answers:
                self._begun.acquire()
            until_s = time.monotonic() + 60
            while self.num_leases() < NUM_STREAMS:  # first tokens come before decode has taken over
                assert time.monotonic() < until_s
                time.sleep(0.02)
            os.kill(pid, signal.SIGKILL)
            killed_s = time.monotonic()
            while self.num_leases() == NUM_STREAMS:
                assert time.monotonic() - killed_s < FREED_WITHIN_S
                time.sleep(0.05)
            time.sleep(0.3)  # requests that end one by one all have by now
            return self.num_leases(), [lines for a in answers if (lines := a.result()) is not None]


def test_what_a_killed_ingress_held_is_free_at_once_and_the_others_answers_are_whole(service):
    expected = service.client.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
    counted = prompt_tokens(service)
    (ingress, *_) = service.replicas("ingress").values()
    held, whole = Streams(service).killed(ingress)
    assert 0 < len(whole) < NUM_STREAMS
    assert held == len(whole)
    for lines in whole:
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == expected
    service.wait_for("ingress", {2})
    assert prompt_tokens(service) >= counted


def test_what_the_requests_of_a_killed_proxy_held_is_free_at_once(service):
    (ingress, *_) = service.replicas("ingress").values()
    relatives = psutil.Process(ingress).parent().children()
    (proxy,) = [p.pid for p in relatives if "ProxyActor" in " ".join(p.cmdline())]
    assert Streams(service).killed(proxy) == (0, [])
    until_s = time.monotonic() + 120
    while True:  # Serve brings up another proxy.
        try:
            assert service.client.get("/health").status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < until_s
            time.sleep(0.5)


def test_ray_exports_the_numbers_of_every_stage(service):
    """On the port of every node, under Ray's prefix and with Serve's labels."""
    wanted = {
        'ray_rayapp_num_requests_running{[^}]*stage="prefill"',
        'ray_rayapp_num_requests_running{[^}]*stage="decode"',
        'ray_rayapp_time_to_first_token_seconds_bucket{[^}]*deployment="ingress"',
        'ray_rayapp_prompt_tokens_total{[^}]*deployment="ingress"',
        'ray_rayapp_kv_transfer_bytes_total{[^}]*deployment="ingress"',
    }
    body = {**LONG, "max_tokens": 5}
    assert service.client.post("/v1/completions", json=body).status_code == 200
    until_s, text = time.monotonic() + 60, ""
    while not all(re.search(pattern, text) for pattern in wanted):
        assert time.monotonic() < until_s, [p for p in wanted if not re.search(p, text)]
        time.sleep(1.0)
        for node in ray.nodes():
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with suppress(httpx.TransportError):
                text += httpx.get(address, timeout=5).text
