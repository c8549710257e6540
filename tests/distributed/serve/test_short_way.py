"""Short prompts that decode replicas prefill: the same tokens, and no transfer."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayapp.distributed.serve.ingress import short_way
from rayapp.distributed.serve.ingress.answering import Answering
from rayapp.distributed.serve.ingress.short_way import ShortWayAttempts
from rayapp.distributed.serve.replicas.short_way import short_way_obstacle
from rayapp.distributed.serve.settings import DECODE, PREFILL, ServiceSettings
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest, PromptRequests, Timeline, TokenBatch
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan
from rayapp.scaling.reports import Standing
from tests.distributed.serve.test_plans import OPTIONS, check_answers
from tests.services import LEASE_S

MOST = 30
SHORT = [[32 + (5 * n + 3 * i + i * i) % 90 for i in range(2 + 3 * n)] for n in range(9)]
LONG = [40 + i % 80 for i in range(MOST + 20)]
SKIPS = {"0": "mlp_and_kv", "2": "kv_only", "3": "attention_only"}
RULES = {"1": {"first": 1, "last": 0.5, "encoding": "int8"}}
PLANS = {
    "dense": {},
    "prefill skips": {"prefill": {"blocks": SKIPS}, "kv_transfer": RULES},
    "decode begins": {"prefill": {"blocks": SKIPS}, "first_token": "decode"},
    "both miss a block": {
        "prefill": {"blocks": {**SKIPS, "4": "removed"}},
        "decode": {"blocks": {"4": "removed"}},
    },
}


def settings_of(model, plan=None, **options):
    """Targets so generous that no running answer keeps a prompt from the short way."""
    return {
        "model": str(model),
        "plan": plan,
        "max_num_seqs": 4,
        "max_waiting": 40,
        "short_prompt_tokens": MOST,
        "scaling": {"targets": {"tpot_ms": 60_000}, "interval_s": 0.2},
        "deadlines": {"lease_s": LEASE_S},
        **options,
    }


def planned(loaded, content, directory):
    """The plan in a directory; None for the dense model."""
    if not content:
        return PruningPlan(), None
    plan = PruningPlan.model_validate({**content, "model": signature_of(loaded.model).model_dump()})
    plan.save(directory)
    return plan, str(directory)


def num_transfers(service):
    return service.client.get("/v1/transfers").json()["totals"]["num_transfers"]


def wait_for_the_short_way(service):
    """The ingress has to know both pools first, and how long a handoff takes."""
    until_s = time.monotonic() + 60
    while True:
        before = num_transfers(service)
        assert service.complete(SHORT[3], max_tokens=3).status_code == 200
        if num_transfers(service) == before:
            return
        assert time.monotonic() < until_s, "every prompt was prefilled apart"
        time.sleep(0.2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill skips", "decode begins"])
def test_answers_equal_the_local_ones_on_either_way(deploy, tiny_llama, tmp_path, name):
    """All plans are compared within one process, in `replicas/test_both_stages.py`."""
    content = PLANS[name]
    loaded = load_model(tiny_llama, dtype="float32")
    plan, directory = planned(loaded, content, tmp_path)
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, plan)
    expected = pipeline.generate(SHORT, SamplingParams(**OPTIONS))
    with deploy(**settings_of(tiny_llama, directory)) as service:
        wait_for_the_short_way(service)
        before = num_transfers(service)
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda p: service.complete(p, **OPTIONS), SHORT))
        for answer, completion in zip(answers, expected, strict=True):
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == completion.text
        # Which way is sooner was measured for every prompt; some went the short way for certain.
        assert num_transfers(service) < before + len(SHORT)
        several = service.complete(SHORT[5], **{**OPTIONS, "n": 3})
        assert len(several.json()["choices"]) == 3
        assert several.json()["choices"][0]["text"] == expected[5].text
        before = num_transfers(service)
        (long,) = pipeline.generate([LONG], SamplingParams(**OPTIONS))
        assert service.complete(LONG, **OPTIONS).json()["choices"][0]["text"] == long.text
        assert num_transfers(service) == before + 1
        service.check_idle()


@pytest.mark.ray
@pytest.mark.slow
def test_a_plan_whose_prefill_needs_more_than_decode_has_takes_the_usual_way(deploy, planned_model):
    options = {**planned_model.served, "short_prompt_tokens": 512}
    obstacle = short_way_obstacle(ServiceSettings.parse(options))
    assert obstacle == "the model takes images, which decode replicas cannot read"
    with deploy(**options) as service:
        before = num_transfers(service)
        expected = check_answers(service, planned_model)
        sent = sum(completion.transfer is not None for completion in expected)
        assert num_transfers(service) == before + sent


def test_why_all_prompts_are_prefilled_apart(save_tiny, tiny_model, tmp_path):
    model = save_tiny(tmp_path, "llama")
    signature = signature_of(tiny_model("llama")).model_dump()
    plan = PruningPlan.model_validate({"decode": {"blocks": {1: "removed"}}, "model": signature})
    plan.save(tmp_path)

    def obstacle(**options):
        return short_way_obstacle(ServiceSettings.parse(settings_of(model, **options)))

    assert obstacle() is None
    assert obstacle(short_prompt_tokens=0) == "short_prompt_tokens is 0"
    assert obstacle(mode="unified") == "unified replicas run both stages"
    assert obstacle(plan=str(tmp_path)) == (
        "it would need weights that decode lacks: block 1 is full in prefill and removed in decode"
    )


class Way:
    """Attempts on one way that take a moment for prefill and another one for the handoff."""

    def __init__(self, handoff_s):
        self.taken, self.waiting_tokens, self._handoff_s = [], 0, handoff_s

    async def run(self, answering):
        request = answering.prompt.prompt
        self.taken.append(request.num_prompt_tokens)
        timeline = answering.timelines[request.request_id]
        timeline.prefill_finished_s = 10.0
        yield TokenBatch(request.request_id, request.attempt, 0, (7,))
        timeline.admitted_s = 10.0 + self._handoff_s
        yield TokenBatch(request.request_id, request.attempt, 1, (8,), "length")


def ask(attempts, num_tokens, attempt=0):
    request = GenerationRequest("it", (1,) * num_tokens, attempt=attempt)
    prompt = PromptRequests.of([request])
    answering = Answering(prompt, {"it": Timeline()}, lambda: None)

    async def tokens():
        return [token async for batch in attempts.run(answering) for token in batch.token_ids]

    assert asyncio.run(tokens()) == [7, 8]


@pytest.fixture
def pools(monkeypatch):
    """What the ingress knows of both pools: an idle replica of either."""
    known = {
        PREFILL: [Standing(0.0, 0.0, token_s=1e-3, errand_s=0.0, num_failed=0)],
        DECODE: [Standing(0.0, 0.0, 0.0, 0.0, 0, step_s=0.03, most_prompt=30.0)],
    }
    work_s = {PREFILL: 0.0}
    monkeypatch.setattr(short_way, "standings_of", known.__getitem__)
    monkeypatch.setattr(short_way, "wait_s", work_s.__getitem__)
    return known, work_s


def test_the_way_is_chosen_from_what_was_measured(pools):
    known, work_s = pools
    usual, short = Way(handoff_s=0.02), Way(handoff_s=0.0)
    attempts = ShortWayAttempts(usual, short, most_tokens=30, tpot_s=0.1)
    ask(attempts, 10)  # How long a handoff takes is not known yet.
    ask(attempts, 10)  # 30 ms apart, and 40 ms behind a step of decode.
    assert (usual.taken, short.taken) == ([10, 10], [])
    work_s[PREFILL] = 0.5
    ask(attempts, 10)
    assert short.taken == [10]
    ask(attempts, 31)  # is too long
    ask(attempts, 10, attempt=1)  # The first attempt was lost.
    known[DECODE] = [Standing(0.0, 0.0, 0.0, 0.0, 0, step_s=0.095, most_prompt=30.0)]
    ask(attempts, 10)  # A running answer would wait for 105 ms.
    known[DECODE] = [Standing(0.0, 0.0, 0.0, 0.0, 0, step_s=0.01)]
    ask(attempts, 10)  # Its weights do not suffice.
    assert short.taken == [10]
    assert usual.taken == [10, 10, 31, 10, 10, 10]
