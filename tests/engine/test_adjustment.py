"""Bias, least length and penalties: against transformers, a plain computation, and both stages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.engine.adjustment import Adjustment, adjusted
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling import sample
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import RequestError

PROMPT = [5, 9, 9, 3, 17, 2]
VOCAB = 12


def request_of(prompt=(1, 2), **sampling) -> GenerationRequest:
    return GenerationRequest("r", tuple(prompt), SamplingParams(**sampling))


def after(answer, ends=(), prompt=(1, 2), **sampling) -> Adjustment:
    adjustment = Adjustment.of(request_of(prompt, **sampling), ends)
    assert adjustment is not None
    for token in answer:
        adjustment.take(token)
    return adjustment


def plain(logits: list[float], prompt, answer, ends, sampling: SamplingParams) -> list[float]:
    """The definition, one token at a time."""
    found = []
    for token, logit in enumerate(logits):
        value = logit + sampling.logit_bias.get(token, 0.0)
        if token in ends and len(answer) < sampling.min_tokens:
            value = float("-inf")
        if token in prompt or token in answer:
            factor = sampling.repetition_penalty
            value = value / factor if value > 0 else value * factor
        times = answer.count(token)
        value -= sampling.frequency_penalty * times
        value -= sampling.presence_penalty * (times > 0)
        found.append(value)
    return found


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=VOCAB, max_size=VOCAB),
    TOKENS.filter(len),
    TOKENS,
    st.builds(
        SamplingParams,
        min_tokens=st.integers(0, 6),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.1, 3),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4),
    ),
)
def test_logits_follow_the_definition(logits, prompt, answer, sampling):
    ends = {0, 7}
    adjustment = Adjustment(GenerationRequest("r", tuple(prompt), sampling), ends)
    for token in answer:
        adjustment.take(token)
    given_BV = torch.tensor([logits, logits])
    got_BV = adjusted(given_BV, [adjustment, None])
    assert got_BV[0].tolist() == pytest.approx(
        plain(logits, prompt, answer, ends, sampling), rel=1e-4, abs=1e-4
    )
    assert got_BV[1].tolist() == logits
    assert given_BV[0].tolist() == logits


def test_nothing_asked_for_changes_nothing():
    assert Adjustment.of(request_of(temperature=1.0, stop=("x",)), {0}) is None
    logits_BV = torch.randn(2, VOCAB)
    assert adjusted(logits_BV, [None, None]) is logits_BV
    assert adjusted(logits_BV, []) is logits_BV


def test_log_probabilities_stay_the_models():
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.bfloat16)
    adjustment = after([], logit_bias={3: 50.0})
    (token,), (entry,) = sample(logits_BV, [SamplingParams(logprobs=2)], [0], [adjustment])
    assert token == 3
    assert entry is not None
    assert entry.logprob == pytest.approx(logits_BV[0].double().log_softmax(-1)[3].item())
    assert [best for best, _ in entry.top] == [0, 1]


def test_draws_are_those_of_the_changed_logits():
    logits_BV = torch.randn(64, 900, generator=torch.Generator().manual_seed(0))
    params = [
        SamplingParams(temperature=1.0, top_k=row % 5, seed=row, logit_bias={7: 4.0, 800: 3.0})
        for row in range(64)
    ]
    adjustments = [Adjustment(GenerationRequest("r", (1,), each), ()) for each in params]
    changed_BV = logits_BV.clone()
    changed_BV[:, 7] += 4.0
    changed_BV[:, 800] += 3.0
    indices = [0] * 64
    assert sample(logits_BV, params, indices, adjustments) == sample(changed_BV, params, indices)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def generated(model, **options) -> list[int]:
    out = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=0, **options
    )
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
        (
            {"logit_bias": {11: 2.5, 4: -3.0}},
            {"sequence_bias": {(11,): 2.5, (4,): -3.0}},
        ),
    ],
)
def test_greedy_answers_equal_generate(model, make_plan, first_token, sampling, options):
    plan = make_plan(model, first_token=first_token)
    asked = SamplingParams(max_tokens=24, ignore_eos=True, **sampling)
    (answer,) = LocalPipeline(model, plan=plan).generate([PROMPT], asked)
    dense = generated(model)
    assert list(answer.token_ids) == generated(model, **options) != dense


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_an_answer_ends_no_earlier_than_asked(model, make_plan, first_token):
    """The token that ends answers is one that the model would say early."""
    plan = make_plan(model, first_token=first_token)
    dense = generated(model)
    end = dense[2]
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, end
    try:
        pipeline = LocalPipeline(model, plan=plan)
        short, long = pipeline.generate(
            [PROMPT] * 2, [SamplingParams(max_tokens=24, min_tokens=least) for least in (0, 9)]
        )
        want = generated(model, min_new_tokens=9, eos_token_id=end)
    finally:
        model.generation_config.eos_token_id = before
    assert short.token_ids[-1] == end
    assert len(short.token_ids) <= 3
    assert list(long.token_ids) == want
    assert end not in long.token_ids[:9]


def test_a_strong_penalty_makes_every_token_another(model):
    asked = SamplingParams(max_tokens=30, ignore_eos=True, frequency_penalty=2.0)
    (plain_answer,) = LocalPipeline(model).generate(
        [PROMPT], SamplingParams(max_tokens=30, ignore_eos=True)
    )
    (answer,) = LocalPipeline(model).generate([PROMPT], asked)
    assert len(set(answer.token_ids)) > len(set(plain_answer.token_ids))


def test_a_replayed_answer_goes_on_as_it_would_have(model, engines):
    """Penalties count the tokens that came before the interruption."""
    asked = SamplingParams(max_tokens=20, ignore_eos=True, frequency_penalty=0.5, temperature=0.8)
    request = GenerationRequest("r", tuple(PROMPT), asked)
    whole = engines(model)
    whole.start(request)
    whole.drain()
    for num_sent in (1, 7, 19):
        again = engines(model)
        again.answers["r"] = list(whole.answers["r"][:num_sent])
        again.start(request, whole.answers["r"][:num_sent])
        again.drain()
        assert again.answers == whole.answers


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens=5 is more than max_tokens=4"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token id -1 is not in the vocabulary"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias: token id 1000000 is not in the vocabulary"),
    ],
)
def test_what_cannot_be_is_refused(model, sampling, words):
    with pytest.raises(RequestError, match=words):
        LocalPipeline(model).generate([PROMPT], SamplingParams(**sampling))
