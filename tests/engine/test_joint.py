"""Tokens of sequences and chunks of prompts in one pass: what each would have been alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from rayapp.engine.joint import JointEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.blocks import find_decoder
from rayapp.models.healed import HealedWeights, attach

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
NUM_REQUESTS = 14
ALIKE = {"prefill": {3: "removed", 1: "mlp_only"}, "decode": {3: "removed", 1: "mlp_only"}}
APART = {
    "prefill": {1: "kv_only", 2: "mlp_and_kv", 4: "mlp_only"},
    "decode": {3: "mlp_only", 4: "removed"},
}
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


@pytest.mark.parametrize("stages", [ALIKE, APART], ids=["alike", "apart"])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_steps_change_no_token(tiny_model, engines, make_plan, family, first_token, stages):
    """Windows, cut KV, blocks that a stage runs in part, sampled answers, and scored prompts."""
    model = tiny_model(family)
    plan = make_plan(model, **stages, kv_transfer=CUT_KV, first_token=first_token)
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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_healed_blocks_run_with_the_weights_of_their_stage(tiny_model, engines, make_plan, family):
    """Decode has a bridge, and prefill has learnt the weights of another block."""
    model = tiny_model(family)
    down = find_decoder(model).layers[0].mlp.down_proj.weight.detach()
    generator = torch.Generator().manual_seed(3)
    weights = HealedWeights.of(
        {
            "prefill": {
                "layers.0.mlp.down_proj.weight": torch.randn(down.shape, generator=generator)
            },
            "decode": {
                "layers.2.bridge.weight": torch.randn(48, 48, generator=generator) / 10,
                "layers.2.bridge.bias": torch.randn(48, generator=generator),
            },
        }
    )
    plan = make_plan(model, decode={2: "removed"}).with_healed(weights.digest)
    attach(model, weights)
    both, alone, bare = (
        engines(model, p, max_num_seqs=5) for p in (plan, plan, plan.with_healed(None))
    )
    requests = requests_of(2)
    served(both, requests, seed=2)
    answers = [answer_alone(alone, request) for request in requests]
    assert answers != [answer_alone(bare, request) for request in requests]
    assert [both.answers[request.request_id] for request in requests] == answers


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
