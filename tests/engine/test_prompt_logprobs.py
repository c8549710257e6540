"""Log-probabilities of prompt tokens: those of one forward pass, whatever the chunks."""

from __future__ import annotations

import pytest
import torch

from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling import prompt_logprobs
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.stack import BlockStack

PROMPTS = [
    [(7 * n + 3 * i + i * i) % 90 for i in range(length)] for n, length in enumerate((1, 2, 37))
]


def engine_of(model, plan) -> PrefillEngine:
    return PrefillEngine(BlockStack(model, plan, "prefill"), plan, max_model_len=96)


def request_of(prompt, **sampling) -> GenerationRequest:
    return GenerationRequest("r", tuple(prompt), SamplingParams(**sampling))


def expected(model, prompt) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt])).logits[0]
    return logits_TV.double().log_softmax(-1)


def check(model, prompt, found, num_best) -> None:
    logprobs_TV = expected(model, prompt)
    assert found[0] is None
    assert len(found) == len(prompt)
    for position, entry in enumerate(found[1:], 1):
        row_V = logprobs_TV[position - 1]
        assert entry.logprob == pytest.approx(row_V[prompt[position]].item(), abs=1e-5)
        best = row_V.topk(num_best)
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        for token, value in entry.top:
            if token == prompt[position]:
                assert value == entry.logprob  # the same float: clients compare them


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("num_best", [0, 1, 5])
def test_they_are_those_of_one_pass(tiny_model, make_plan, first_token, num_best):
    model = tiny_model("llama")
    engine = engine_of(model, make_plan(model, first_token=first_token))
    for prompt in PROMPTS:
        output = engine.run(request_of(prompt, prompt_logprobs=num_best))
        check(model, prompt, output.prompt_logprobs, num_best)


def test_chunks_and_neighbours_change_nothing(tiny_model, make_plan):
    """One of two prompts that share passes asks for them."""
    model = tiny_model("llama")
    engine = engine_of(model, make_plan(model))
    asking = engine.begin(request_of(PROMPTS[2], prompt_logprobs=2))
    other = engine.begin(request_of(PROMPTS[2][::-1]))
    outputs = []
    while asking.num_left or other.num_left:
        chunks = [(run, min(count, run.num_left)) for run, count in ((other, 3), (asking, 5))]
        outputs += engine.advance([(run, count) for run, count in chunks if count])
    (found,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    assert len(outputs) == 2
    check(model, PROMPTS[2], found, 2)


def test_equal_logits_are_named_by_rising_ids():
    """More tokens are equally likely than are sorted first."""
    logits_TV = torch.zeros(3, 2000)
    logits_TV[1, 1999] = 1.0
    found = prompt_logprobs(logits_TV, [5, 1999, 0], 3)
    assert [token for token, _ in found[0].top] == [0, 1, 2]
    assert [token for token, _ in found[1].top] == [1999, 0, 1]
    assert found[0].logprob == found[0].top[0][1]
