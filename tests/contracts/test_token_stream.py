"""The contract of a token stream, for all implementations of ``rayapp.api.service.Service``.

The calls are those of the routes: ``generate``, ``health``, ``transfers`` and ``description``.

An implementation joins by a parameter of the fixture ``stream``: an object with ``service``, the
``reference`` pipeline of the same model and plan, ``run(coroutine)`` on the service's event loop,
the number of decode slots, and ``check_idle()``, which raises if resources are still in use.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest, Timeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import OverloadedError, RequestError
from tests.api.in_process import InProcessService, Patience

MAX_MODEL_LEN, MAX_NUM_SEQS = 96, 3
PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 7, 20, 31, 5)]


def max_waiting(num_slots):
    """Waiting places for twice as many requests as there are slots, and for a few more."""
    return 2 * num_slots + 2


def _in_process(request, tiny_model, tokenizer):
    del request
    model = tiny_model("llama")
    limits = {"max_num_seqs": MAX_NUM_SEQS, "max_model_len": MAX_MODEL_LEN}
    service = InProcessService(
        model, tokenizer, patience=Patience(max_waiting(MAX_NUM_SEQS)), **limits
    )
    return SimpleNamespace(
        service=service,
        reference=LocalPipeline(model, tokenizer, **limits),
        num_slots=MAX_NUM_SEQS,
        run=asyncio.run,
        check_idle=service.check_idle,
        close=service.close,
    )


def _over_ray(request, tiny_model, tokenizer):
    """The service in this process, its replicas those of the standard service."""
    standard = request.getfixturevalue("standard")
    from rayapp.distributed.serve.ingress.ingress import open_service

    limits = {"max_model_len": MAX_MODEL_LEN, "max_waiting": max_waiting(standard.num_slots)}
    settings = standard.settings.model_copy(update=limits)
    handles = {name: standard.handle(name) for name in settings.pools}
    service = open_service(settings, handles, standard.handle("ingress"))

    def check_idle():
        assert not any(service.counts().values()), service.counts()
        standard.check_idle()

    return SimpleNamespace(
        service=service,
        reference=LocalPipeline(
            tiny_model("llama"), tokenizer, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN
        ),
        num_slots=standard.num_slots,
        run=asyncio.run,
        check_idle=check_idle,
        close=lambda: None,
    )


STREAMS = {"in_process": _in_process, "standard": _over_ray}


@pytest.fixture(
    scope="module", params=["in_process", pytest.param("standard", marks=pytest.mark.ray)]
)
def stream(request, tiny_model, byte_tokenizer):
    opened = STREAMS[request.param](request, tiny_model, byte_tokenizer)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _idle_means_zero(stream):
    yield
    deadline = time.monotonic() + 60
    while True:
        try:
            return stream.check_idle()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def request_of(name, prompt, **sampling):
    return GenerationRequest(name, tuple(prompt), SamplingParams(**sampling))


async def batches_of(service, request, timeline=None):
    async with aclosing(service.generate([request], [timeline] if timeline else [])) as batches:
        return [batch async for batch in batches]


def test_answers_equal_the_reference(stream):
    sampling = SamplingParams(max_tokens=12, logprobs=2)
    requests = [GenerationRequest(f"eq-{i}", p, sampling) for i, p in enumerate(PROMPTS)]

    async def all_at_once():
        return await asyncio.gather(*(batches_of(stream.service, r) for r in requests))

    answers = stream.run(all_at_once())
    for request, batches, expected in zip(
        requests, answers, stream.reference.generate(PROMPTS, sampling), strict=True
    ):
        tokens = [token for batch in batches for token in batch.token_ids]
        assert tuple(tokens) == expected.token_ids
        check_close([e for batch in batches for e in batch.logprobs], expected.logprobs)
        assert [b.finish_reason for b in batches[:-1]] == [None] * (len(batches) - 1)
        assert batches[-1].finish_reason == expected.finish_reason
        indices = [batch.first_index for batch in batches]
        assert indices == [sum(len(b.token_ids) for b in batches[:i]) for i in range(len(batches))]
        assert {batch.request_id for batch in batches} == {request.request_id}


def check_close(found, expected):
    """Another batch shape rounds differently; tokens do not."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        for one, other in zip(
            [ours.logprob, *(p for _, p in ours.top)],
            [theirs.logprob, *(p for _, p in theirs.top)],
            strict=True,
        ):
            assert one == pytest.approx(other, abs=1e-4)


def test_an_answer_of_one_token(stream):
    (batch,) = stream.run(batches_of(stream.service, request_of("one", (1, 2), max_tokens=1)))
    assert batch.finish_reason == "length"


def test_the_timeline_is_in_order(stream):
    timeline = Timeline()
    request = request_of("timed", PROMPTS[2], max_tokens=4, ignore_eos=True)
    stream.run(batches_of(stream.service, request, timeline))
    marks = [
        timeline.arrived_s,
        timeline.prefill_started_s,
        timeline.prefill_finished_s,
        timeline.admitted_s,
    ]
    assert None not in marks
    assert marks == sorted(marks)


@pytest.mark.parametrize("prompt", [(), (-1,), (10**6,), (1,) * MAX_MODEL_LEN])
def test_limits_are_checked_before_anything_starts(stream, prompt):
    with pytest.raises(RequestError):
        stream.run(batches_of(stream.service, request_of("bad", prompt, max_tokens=4)))


@pytest.mark.parametrize("num_batches", [0, 1, 3])
def test_closing_the_stream_frees_what_it_held(stream, num_batches):
    async def leave(name):
        request = request_of(name, PROMPTS[3], max_tokens=60, ignore_eos=True)
        async with aclosing(stream.service.generate([request])) as batches:
            for _ in range(num_batches):
                await anext(batches, None)  # a busy machine may send all in fewer

    async def more_than_there_are_slots():
        await asyncio.gather(
            *(leave(f"left-{num_batches}-{i}") for i in range(2 * stream.num_slots))
        )

    stream.run(more_than_there_are_slots())


def test_cancelling_a_request_that_waits(stream):
    async def scenario():
        long = {"max_tokens": 60, "ignore_eos": True}
        tasks = [
            asyncio.create_task(
                batches_of(stream.service, request_of(f"wait-{i}", PROMPTS[1], **long))
            )
            for i in range(2 * stream.num_slots)
        ]
        await asyncio.sleep(0.02)
        tasks[-1].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[-1], asyncio.CancelledError)
        assert all(r[-1].finish_reason == "length" for r in results[:-1])

    stream.run(scenario())


def test_more_than_may_wait_are_refused_and_the_others_answered(stream):
    async def crowd():
        requests = [
            request_of(f"crowd-{i}", PROMPTS[1], max_tokens=9, ignore_eos=True)
            for i in range(stream.num_slots + max_waiting(stream.num_slots) + 5)
        ]
        answers = (batches_of(stream.service, request) for request in requests)
        return await asyncio.gather(*answers, return_exceptions=True)

    results = stream.run(crowd())
    answered = [result for result in results if not isinstance(result, OverloadedError)]
    assert max_waiting(stream.num_slots) <= len(answered) < len(results)
    assert all(batches[-1].finish_reason == "length" for batches in answered)


def test_several_prompts_are_admitted_together_or_not_at_all(stream):
    num_places = max_waiting(stream.num_slots)

    def prompts(name, count):
        sampling = {"max_tokens": 9, "ignore_eos": True}
        return [[request_of(f"{name}-{i}", PROMPTS[1], **sampling)] for i in range(count)]

    async def crowd():
        too_many = prompts("many", num_places + stream.num_slots + 1)
        with pytest.raises(OverloadedError), stream.service.admitted(too_many):
            raise AssertionError
        together = prompts("together", num_places)
        others = prompts("other", num_places + stream.num_slots)
        with stream.service.admitted(together):
            calls = [batches_of(stream.service, answers[0]) for answers in (*others, *together)]
            found = await asyncio.gather(*calls, return_exceptions=True)
        return found[: len(others)], found[len(others) :]

    others, together = stream.run(crowd())
    assert any(isinstance(found, OverloadedError) for found in others)
    assert all(batches[-1].finish_reason == "length" for batches in together)


def test_stop_strings_end_an_answer(stream):
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    (plain,) = stream.reference.generate([PROMPTS[2]], sampling)
    stop = plain.text[5:7]
    (expected,) = stream.reference.generate(
        [PROMPTS[2]], sampling.model_copy(update={"stop": (stop,)})
    )
    request = request_of("stop", PROMPTS[2], max_tokens=30, ignore_eos=True, stop=(stop,))
    batches = stream.run(batches_of(stream.service, request))
    assert sum((b.token_ids for b in batches), ()) == expected.token_ids
    assert batches[-1].finish_reason == "stop"


def test_answers_to_one_prompt_equal_separate_ones(stream):
    """More of them than there are slots; every one has its own seed and its own stream."""
    sampling = [SamplingParams(max_tokens=9, temperature=0.9, seed=seed) for seed in range(7)]
    requests = [
        GenerationRequest(f"of-one-{params.seed}", PROMPTS[2], params) for params in sampling
    ]
    timelines = [Timeline() for _ in requests]

    async def all_of_them():
        async with aclosing(stream.service.generate(requests, timelines)) as batches:
            return [batch async for batch in batches]

    batches = stream.run(all_of_them())
    expected = stream.reference.generate([PROMPTS[2]] * len(sampling), sampling)
    for request, timeline, answer in zip(requests, timelines, expected, strict=True):
        mine = [batch for batch in batches if batch.request_id == request.request_id]
        assert sum((batch.token_ids for batch in mine), ()) == answer.token_ids
        assert [bool(batch.finish_reason) for batch in mine] == [False] * (len(mine) - 1) + [True]
        assert timeline.admitted_s is not None


def test_health_names_a_replica_of_every_stage(stream):
    report = stream.run(stream.service.health())
    assert report.ready
    pools = report.pools()
    assert set(pools) in ({"prefill", "decode"}, {"unified"})
    for replica in report.replicas:
        assert replica.parameter_bytes > 0
        assert replica.plan_fingerprint == stream.service.description.plan.fingerprint
    holders = pools.get("decode") or pools["unified"]
    assert all(replica.kv_bytes > 0 for replica in holders)


def test_the_ledger_grows_by_what_travelled(stream):
    def totals():
        return stream.run(stream.service.transfers())["totals"]

    before = totals()
    request = request_of("ledger", PROMPTS[3], max_tokens=3, ignore_eos=True)
    stream.run(batches_of(stream.service, request))
    after = totals()
    assert after["num_transfers"] == before["num_transfers"] + 1
    assert after["num_prompt_tokens"] == before["num_prompt_tokens"] + len(PROMPTS[3])
    assert after["bytes_full"] == after["bytes_sent"] - after["overhead_bytes"]
