"""Prefill: the first token, what is left of the prompt, and what is refused."""

from __future__ import annotations

import pytest
import torch

from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import RequestError


def ask(num_prompt_tokens: int = 12, **sampling) -> GenerationRequest:
    return GenerationRequest(
        "r", tuple(range(1, num_prompt_tokens + 1)), SamplingParams(**sampling)
    )


def test_the_first_token_is_the_best_of_the_last_logits(tiny_model, engines):
    model = tiny_model("llama")
    output = engines(model).prefill.run(ask(logprobs=2))
    logits = model(torch.tensor([list(range(1, 13))])).logits[0, -1]
    assert output.first.token_ids == (int(logits.argmax()),)
    assert output.first.first_index == 0
    assert output.first.logprobs[0].logprob == output.first.logprobs[0].top[0][1]
    assert output.num_prompt_tokens == 12
    assert output.prefill_s > 0


def test_the_segment_holds_what_the_dense_cache_holds(tiny_model, engines):
    model = tiny_model("qwen3")
    segment = engines(model).prefill.run(ask()).segment
    cache = model(torch.tensor([list(range(1, 13))]), use_cache=True).past_key_values
    assert [entry.block for entry in segment.blocks] == list(range(5))
    for entry, layer in zip(segment.blocks, cache.layers, strict=True):
        torch.testing.assert_close(entry.keys_HND, layer.keys[0])
        torch.testing.assert_close(entry.values_HND, layer.values[0])
        assert entry.positions_N.tolist() == list(range(12))


def test_decode_may_sample_the_first_token(tiny_model, engines, make_plan):
    model = tiny_model("llama")
    prefill = engines(model, make_plan(model, first_token="decode")).prefill
    output = prefill.run(ask())
    assert output.first is None
    assert not output.finished
    assert {entry.num_entries for entry in output.segment.blocks} == {11}
    empty = prefill.run(ask(1)).segment
    assert (empty.num_prompt_tokens, empty.num_prefilled, empty.nbytes) == (1, 0, 0)
    assert len(empty.blocks) == 5


def test_nothing_travels_where_the_first_token_is_the_last(tiny_model, engines, byte_tokenizer):
    model = tiny_model("llama")
    both = engines(model, tokenizer=byte_tokenizer)
    first = both.prefill.run(ask()).first.token_ids[0]
    reasons = {}
    both.prefill._eos_token_ids = frozenset({first})
    for name, request in {
        "eos": ask(),
        "ignored": ask(ignore_eos=True),
        "length": ask(max_tokens=1, ignore_eos=True),
    }.items():
        output = both.prefill.run(request)
        reasons[name] = output.first.finish_reason
        assert output.finished == (output.segment is None) == (reasons[name] is not None)
    assert reasons == {"eos": "stop", "ignored": None, "length": "length"}


def test_a_stop_string_may_end_the_answer_at_once(tiny_model, engines, byte_tokenizer):
    model = tiny_model("llama")
    both = engines(model, tokenizer=byte_tokenizer)
    for length in range(2, 40):
        first = both.prefill.run(ask(length)).first.token_ids[0]
        if first < 128:
            break
    output = both.prefill.run(ask(length, stop=(chr(first),)))
    assert (output.first.finish_reason, output.segment) == ("stop", None)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(0), "no tokens"),
        (ask(90, max_tokens=7), "90 prompt tokens and max_tokens=7 need 97 places"),
        (GenerationRequest("r", (1, 900)), "token id 900"),
    ],
)
def test_prompts_outside_the_limits_are_refused(tiny_model, engines, request_, message):
    with pytest.raises(RequestError, match=message):
        engines(tiny_model("llama")).prefill.run(request_)


def test_the_longest_prompt_that_fits_is_served(tiny_model, engines):
    both = engines(tiny_model("llama"))
    both.start(ask(90, max_tokens=6, ignore_eos=True))
    both.drain()
    assert len(both.answers["r"]) == 6
