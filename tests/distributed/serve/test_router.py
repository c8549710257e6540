"""The router's picture of the replicas, from what they tell and what it has sent; no cluster."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rayapp.distributed.serve.app import deployment_options
from rayapp.distributed.serve.ingress.router import AddressedRouter
from rayapp.distributed.serve.known_work import standings_of, wait_s
from rayapp.distributed.serve.messages import Address
from rayapp.distributed.serve.settings import PREFILL, ServiceSettings
from rayapp.engine.request import GenerationRequest, PromptRequests
from rayapp.engine.sampling_params import SamplingParams
from rayapp.scaling.reports import Standing

ROOT = Path(__file__).parents[3]


def replica(name, work_s=None, *, at_s=None, num_failed=0):
    standing = Standing(at_s or time.time(), work_s or 0.0, 1e-3, 0.0, num_failed)
    stats = {} if work_s is None else standing.numbers()
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)


def pending(num_tokens, address=None):
    prompt = PromptRequests.of([GenerationRequest("r", (1,) * num_tokens, SamplingParams())])
    return SimpleNamespace(
        args=[prompt], kwargs={"address": address or Address()}, routing_context=SimpleNamespace()
    )


def router(kind=AddressedRouter):
    made = object.__new__(kind)
    made._deployment_id = SimpleNamespace(name="tested")
    made.initialize_state()
    return made


async def order(made, replicas, request):
    ranks = await made.choose_replicas(replicas, request)
    return [[one.replica_id.unique_id for one in rank] for rank in ranks]


def run(coroutine):
    import asyncio

    return asyncio.run(coroutine)


def test_the_least_work_is_tried_first_then_the_next():
    replicas = [replica("a", 3.0), replica("b", 1.0), replica("c", 2.0)]
    assert run(order(router(), replicas, pending(10))) == [["b"], ["c"], ["a"]]


def test_replicas_that_say_nothing_share_a_rank_for_serve_to_choose():
    assert run(order(router(), [replica("a"), replica("b")], pending(10))) == [["a", "b"]]


def test_what_was_sent_since_the_last_report_counts():
    made, replicas = router(), [replica("a", 0.5), replica("b", 0.7)]
    request = pending(1000)  # a second of work
    assert run(order(made, replicas, request))[0] == ["a"]
    made.on_request_routed(request, replicas[0].replica_id, None)
    assert run(order(made, replicas, request))[0] == ["b"]
    later = [replica("a", 0.1, at_s=time.time() + 1), replicas[1]]
    assert run(order(made, later, request))[0] == ["a"]


def test_admission_reads_the_shortest_wait_that_the_router_knows():
    assert wait_s("unknown") == 0.0
    run(order(router(), [replica("a", 30.0), replica("b", 50.0)], pending(10)))
    assert wait_s("tested") == pytest.approx(30.0, abs=1.0)
    # 20,000 tokens come before, at a millisecond each, to two replicas.
    assert wait_s("tested", 20_000) == pytest.approx(40.0, abs=1.0)


def test_work_that_is_done_side_by_side_is_no_wait():
    """A decode replica has 90 s of work, and room for one more in 2 s."""
    standing = Standing(time.time(), 90.0, 0.0, 1.0, 0, lasts_s=60.0, wait_s=2.0)
    busy = SimpleNamespace(
        replica_id=SimpleNamespace(unique_id="a"), routing_stats=standing.numbers()
    )
    run(order(router(), [busy], pending(10)))
    assert wait_s("tested") == 2.0


def test_the_replica_that_has_booked_room_is_tried_first_and_is_no_new_work():
    made, replicas = router(), [replica("a", 0.5), replica("b", 0.7), replica("c", 0.6)]
    booked = pending(9000, Address(preferred="b"))
    assert run(order(made, replicas, booked)) == [["b"], ["a"], ["c"]]
    made.on_request_routed(booked, replicas[1].replica_id, None)
    assert run(order(made, replicas, pending(10))) == [["a"], ["c"], ["b"]]
    gone = pending(10, Address(preferred="gone"))
    assert run(order(made, replicas, gone)) == [["a"], ["c"], ["b"]]
    avoided = pending(10, Address(preferred="b", avoid=frozenset({"b"})))
    assert run(order(made, replicas, avoided))[-1] == ["b"]


def test_what_replicas_told_last_is_known_in_the_process():
    assert standings_of("unknown") == []
    told = replica("a", 30.0)
    run(order(router(), [told, replica("b")], pending(10)))
    assert [standing.numbers() for standing in standings_of("tested")] == [told.routing_stats]


IN_ANOTHER_PROCESS = """
import sys
from ray import cloudpickle
from rayapp.distributed.serve.ingress.router import AddressedRouter
from rayapp.distributed.serve.known_work import wait_s
from tests.distributed.serve.test_router import order, pending, replica, router, run

kind = cloudpickle.loads(sys.stdin.buffer.read())
assert kind is not AddressedRouter
run(order(router(kind), [replica("a", 7.0)], pending(10)))
print(round(wait_s("tested")))
"""


def test_admission_knows_what_a_router_knows_that_came_from_serve():
    """Serve pickles the router's module by value, so its variables are copies in a replica."""
    settings = ServiceSettings.parse({"model": "m"})
    config = deployment_options(settings, PREFILL, settings.prefill)["request_router_config"]
    ended = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=config.get_serialized_request_router_cls(),
        capture_output=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert ended.stdout.decode().strip() == "7", ended.stderr.decode()


def test_calls_with_an_address_are_no_new_work():
    made, replicas = router(), [replica("a", 0.5), replica("b", 0.7)]
    made.on_request_routed(pending(9000, Address("a")), replicas[0].replica_id, None)
    assert run(order(made, replicas, pending(10)))[0] == ["a"]
    assert run(order(made, replicas, pending(10, Address("b")))) == [["b"]]


def test_a_replica_whose_steps_fail_comes_last_for_a_while():
    replicas = [replica("a", 0.0, num_failed=2), replica("b", 50.0)]
    made = router()
    assert run(order(made, replicas, pending(10))) == [["b"], ["a"]]
    replicas[0] = replica("a", 0.0, at_s=time.time() + 1)
    assert run(order(made, replicas, pending(10)))[0] == ["a"]
