"""Tokens of sequences and chunks of prompts in one pass: what each would have been alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from rayapp.engine.joint import JointEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
NUM_REQUESTS = 14
CUT_KV = {0: {"first": 2, "last": 4}, 2: {"first": 0.25, "last": 0.25}}


def requests_of(seed):
    """Prompts of 1 to 40 tokens, some of them sampled, some scored."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    made = []
    for number in range(NUM_REQUESTS):
        length = draw.choice((1, 2, 7, 16, 33, 40))
        prompt = tuple(torch.randint(0, 250, (length,), generator=generator).tolist())
        params = SamplingParams(
            max_tokens=draw.randint(1, 20), temperature=draw.choice((0.0, 0.9)), seed=number,
            prompt_logprobs=draw.choice((None, None, 2)), ignore_eos=True,
        )  # fmt: skip
        made.append(GenerationRequest(f"r{number}", prompt, params))
    return made


def served(both, requests, seed):
    """Serve requests by steps of random chunks of random prompts; return how many were shared."""
    draw = random.Random(seed)
    engine, num_shared = JointEngine(both.prefill, both.decode), 0
    assert engine.shares_passes
    waiting, running, scored = list(requests), [], {}
    while waiting or running or both.decode.num_running:
        while waiting and len(running) + both.decode.num_running < both.decode.max_num_seqs:
            running.append(both.prefill.begin(waiting.pop(0)))
        chunks = [(run, draw.randint(0, min(9, run.num_left))) for run in running]
        num_shared += bool(both.decode.running and any(count for _, count in chunks))
        batches, outputs = engine.step(chunks)
        for batch in batches:
            both.take(batch)
        ended = [run for run in running if not run.num_left]
        for run, output in zip(ended, outputs, strict=True):
            (request,) = run.requests
            both.answers[request.request_id], scored[request.request_id] = [], output
            if output.first is not None:
                both.take(output.first)
            if not output.finished:
                both.decode.admit(request, output.segment, output.first)
            running.remove(run)
        both.decode.check_integrity()
    return num_shared, scored


def answer_alone(alone, request):
    alone.start(request)
    alone.drain()
    return alone.answers[request.request_id]


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_steps_change_no_token(tiny_model, engines, make_plan, family, first_token):
    """Windows, cut KV, a block that neither stage runs, sampled answers, and scored prompts."""
    model = tiny_model(family)
    same = {3: "removed"}
    plan = make_plan(model, prefill=same, decode=same, kv_transfer=CUT_KV, first_token=first_token)
    requests = requests_of(len(family))
    both = engines(model, plan, max_num_seqs=5)
    num_shared, scored = served(both, requests, seed=len(family))
    assert num_shared > 10
    alone = engines(model, plan)
    for request in requests:
        assert both.answers[request.request_id] == answer_alone(alone, request)
        expected = alone.prefill.run(request).prompt_logprobs
        found = scored[request.request_id].prompt_logprobs
        assert [x and x.logprob for x in found] == pytest.approx(
            [x and x.logprob for x in expected], abs=1e-4
        )


def test_pages_that_nobody_filled_are_read_by_nobody(tiny_model, engines):
    model = tiny_model("llama")
    both = engines(model, max_num_seqs=5)
    for arena in both.decode.pages.arenas:
        arena.keys_HED.fill_(torch.nan)
        arena.values_HED.fill_(torch.nan)
    requests = requests_of(1)
    served(both, requests, seed=1)
    alone = engines(model)
    for request in requests:
        assert both.answers[request.request_id] == answer_alone(alone, request)


def test_one_kind_of_work_takes_the_engine_of_its_own(tiny_model, engines):
    both = engines(tiny_model("llama"))
    joint = JointEngine(both.prefill, both.decode)
    assert joint.step([]) == ([], [])
    run = both.prefill.begin(replace(requests_of(1)[0], prompt_token_ids=(1, 2, 3)))
    assert joint.step([(run, 0)]) == ([], [])
    batches, (output,) = joint.step([(run, 3)])
    assert not batches
    assert output.num_prompt_tokens == 3


@pytest.mark.parametrize("stages", [{"prefill": {3: "kv_only"}}, {"decode": {1: "mlp_only"}}])
def test_stages_that_differ_share_no_pass(tiny_model, engines, make_plan, stages):
    model = tiny_model("llama")
    both = engines(model, make_plan(model, **stages))
    assert not JointEngine(both.prefill, both.decode).shares_passes
