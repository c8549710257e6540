"""Continuous batching against ``model.generate``, and everything that frees a slot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import (
    IntegrityError,
    OverloadedError,
    RequestError,
    TransferError,
    WireError,
)
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
LENGTHS = ((5, 6), (30, 11), (1, 9), (17, 13), (9, 1), (26, 7), (12, 15))


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(0, 250, (length,), generator=generator).tolist())


def request(name: str, length: int, num_tokens: int, **sampling) -> GenerationRequest:
    params = SamplingParams(max_tokens=num_tokens, **sampling)
    return GenerationRequest(name, prompt(length), params)


def generated(model, request: GenerationRequest) -> list[int]:
    token_ids = torch.tensor([request.prompt_token_ids])
    answer = model.generate(token_ids, max_new_tokens=request.sampling.max_tokens, do_sample=False)
    return answer[0, token_ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_joining_and_leaving_sequences_equal_generate(tiny_model, engines, family):
    model = tiny_model(family)
    both = engines(model, max_num_seqs=4)
    requests = [request(f"r{i}", *lengths) for i, lengths in enumerate(LENGTHS)]
    waiting = list(requests)
    most = 0
    while waiting or both.decode.num_running:
        if waiting and both.decode.num_free:  # one joins per step, so all are at other tokens
            both.start(waiting.pop(0))
        most = max(most, both.decode.num_running)
        both.step()
    assert most == 4
    for each in requests:
        assert both.answers[each.request_id] == generated(model, each)


def test_windows_are_shorter_than_what_was_compared(tiny_model):
    stack = BlockStack(tiny_model("mistral"), PruningPlan(), "decode")
    assert set(stack.windows) == {12}
    assert min(p + n for p, n in LENGTHS) < 12 < max(p + n for p, n in LENGTHS)


def test_cancelling_frees_the_slot_at_once_and_leaves_others_alone(tiny_model, engines):
    model = tiny_model("llama")
    both = engines(model)
    kept = [request("a", 20, 15), request("c", 7, 15)]
    for each in (kept[0], request("b", 25, 15), kept[1]):
        both.start(each)
    both.step()
    assert both.decode.cancel("b")
    both.decode.check_integrity()
    assert (both.decode.num_running, both.decode.num_free) == (2, 2)
    assert not both.decode.cancel("b")
    both.drain()
    for each in kept:
        assert both.answers[each.request_id] == generated(model, each)


def test_what_a_request_left_behind_reaches_nobody(tiny_model, engines):
    model = tiny_model("llama")
    both = engines(model)
    poison = request("poison", 40, 5)
    output = both.prefill.run(poison)
    blocks = tuple(
        replace(b, keys_HND=b.keys_HND * torch.nan, values_HND=b.values_HND * torch.inf)
        for b in output.segment.blocks
    )
    both.decode.admit(poison, replace(output.segment, blocks=blocks), output.first)
    both.decode.cancel("poison")
    healthy = [request("a", 6, 12), request("b", 30, 12)]  # a is masked where poison lay
    for each in healthy:
        both.start(each)
    both.drain()
    for each in healthy:
        assert both.answers[each.request_id] == generated(model, each)


def test_full_slots_refuse_and_free_ones_accept_again(tiny_model, engines):
    both = engines(tiny_model("llama"), max_num_seqs=1)
    both.start(request("a", 5, 3))
    with pytest.raises(OverloadedError, match="0 of 1 are free"):
        both.start(request("b", 5, 3))
    both.drain()
    both.start(request("c", 5, 3))
    both.drain()
    assert len(both.answers["c"]) == 3


def test_an_answer_that_does_not_fit_is_refused(tiny_model, engines):
    both = engines(tiny_model("llama"), max_model_len=20)
    both.start(request("fits", 12, 8))
    both.drain()
    assert len(both.answers["fits"]) == 8
    long = request("long", 12, 8)
    output = both.prefill.run(long)
    longer = replace(long, sampling=SamplingParams(max_tokens=9))
    with pytest.raises(RequestError, match="12 entries and max_tokens=9"):
        both.decode.admit(longer, output.segment, output.first)
    both.decode.check_integrity()
    assert both.decode.num_running == 0


def test_kv_bytes_follow_from_the_limits(tiny_model, engines, make_plan):
    model = tiny_model("llama")
    both = engines(model, max_num_seqs=3, max_model_len=40)
    assert both.decode.kv_bytes == 5 * 2 * 3 * 2 * 48 * 16 * 4  # 40 entries are 3 pages of 16
    plan = make_plan(model, decode={1: "removed", 3: "mlp_only"})
    pruned = engines(model, plan, max_num_seqs=3, max_model_len=40)
    assert pruned.decode.kv_bytes == 3 * 2 * 3 * 2 * 48 * 16 * 4
    pruned.start(request("a", 15, 5))
    assert pruned.decode.usage == pytest.approx(1 / 9)
    for _ in range(2):
        pruned.step()
    assert pruned.decode.usage == pytest.approx(2 / 9)


def test_segments_that_do_not_belong_are_refused(tiny_model, engines, make_plan):
    model = tiny_model("llama")
    both = engines(model)
    asked = request("a", 10, 5)
    output = both.prefill.run(asked)
    segment = output.segment
    fewer = replace(segment, blocks=segment.blocks[1:])
    ragged = replace(
        segment,
        blocks=(*segment.blocks[:-1], replace(segment.blocks[-1], positions_N=torch.arange(1, 11))),
    )
    cast = replace(
        segment,
        blocks=tuple(replace(b, keys_HND=b.keys_HND.bfloat16()) for b in segment.blocks),
    )
    for wrong in (fewer, ragged, cast, replace(segment, num_prompt_tokens=11)):
        with pytest.raises(WireError):
            both.decode.admit(asked, wrong, output.first)
    other = engines(model, make_plan(model, first_token="decode"))
    with pytest.raises(WireError, match="prefill again"):
        other.decode.admit(asked, segment, output.first)
    for each in (both, other):
        each.decode.check_integrity()
        assert each.decode.num_running == 0


def test_a_later_attempt_takes_over_and_an_earlier_one_comes_too_late(tiny_model, engines):
    model = tiny_model("llama")
    both = engines(model)
    asked = request("a", 10, 8)
    again = replace(asked, attempt=1)
    both.start(asked)
    both.step()
    output = both.prefill.run(again)
    both.decode.admit(again, output.segment, output.first)
    assert both.decode.num_running == 1
    for late in (asked, again):
        with pytest.raises(TransferError, match="came late"):
            both.decode.admit(late, output.segment, output.first)
    both.decode.check_integrity()


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_replayed_answer_goes_on_as_it_would_have(
    tiny_model, engines, make_plan, first_token, temperature
):
    model = tiny_model("qwen3")
    plan = make_plan(model, first_token=first_token)
    asked = request("a", 14, 20, temperature=temperature, seed=7, ignore_eos=True)
    whole = engines(model, plan)
    whole.start(asked)
    whole.start(request("b", 22, 20))
    whole.drain()
    for num_sent in (1, 2, 11):
        sent = whole.answers["a"][:num_sent]
        again = engines(model, plan)
        again.start(request("c", 9, 3))
        again.answers["a"] = list(sent)
        again.start(replace(asked, attempt=1), replay=sent)
        again.drain()
        assert again.answers["a"] == whole.answers["a"]


def test_replay_rebuilds_the_stop_state(tiny_model, engines, byte_tokenizer):
    model = tiny_model("llama")
    plain = engines(model)
    plain.start(request("a", 14, 20, ignore_eos=True))
    plain.drain()
    token_ids = plain.answers["a"]
    ends = next(
        i for i in range(4, 20) if token_ids[i - 1] < 128 and token_ids[i] < 128
    )  # two neighbouring ASCII bytes make a stop string over the seam
    stop = bytes(token_ids[ends - 1 : ends + 1]).decode()
    asked = request("a", 14, 20, ignore_eos=True, stop=(stop,))
    both = engines(model, tokenizer=byte_tokenizer)
    both.answers["a"] = token_ids[:ends]
    both.start(asked, replay=token_ids[:ends])
    both.drain()
    assert both.answers["a"] == token_ids[: ends + 1]
    assert both.reasons["a"] == "stop"


def test_a_complete_answer_cannot_be_replayed(tiny_model, engines):
    both = engines(tiny_model("llama"))
    asked = request("a", 14, 3)
    with pytest.raises(IntegrityError, match="nothing to decode"):
        both.start(asked, replay=(1, 2, 3))
    with pytest.raises(IntegrityError, match="without its first token"):
        both.decode.admit(asked, both.prefill.run(asked).segment, None)


def test_sampled_tokens_do_not_depend_on_the_batch(tiny_model, engines):
    model = tiny_model("qwen2")
    params = {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 11, "ignore_eos": True}
    alone, among = engines(model), engines(model)
    alone.start(request("a", 10, 15, **params))
    alone.drain()
    among.start(request("b", 30, 12, temperature=0.7, seed=3))
    among.step()
    among.start(request("c", 4, 12))
    among.start(request("a", 10, 15, **params))
    among.drain()
    assert among.answers["a"] == alone.answers["a"]


def test_answers_end_at_eos_unless_told_otherwise(tiny_model, engines):
    model = tiny_model("llama")
    both = engines(model)
    both.start(request("free", 10, 30, ignore_eos=True))
    both.drain()
    free = both.answers["free"]
    both.decode._eos_token_ids = frozenset({free[5]})  # a token of this answer becomes its end
    both.start(request("ended", 10, 30))
    both.start(request("ignoring", 10, 30, ignore_eos=True))
    both.drain()
    assert both.answers["ended"] == free[: free.index(free[5], 1) + 1]
    assert both.reasons["ended"] == "stop"
    assert both.answers["ignoring"] == free
    assert both.reasons["ignoring"] == "length"


def test_logprobs_are_those_of_the_unmodified_logits(tiny_model, engines):
    model = tiny_model("llama")
    both = engines(model)
    asked = request("a", 10, 6, temperature=1.5, seed=2, logprobs=3, ignore_eos=True)
    output = both.prefill.run(asked)
    both.decode.admit(asked, output.segment, output.first)
    batches: list[TokenBatch] = [output.first]
    while both.decode.num_running:
        batches += both.decode.step()
    answer = [batch.token_ids[0] for batch in batches]
    logits = model(torch.tensor([[*asked.prompt_token_ids, *answer]])).logits[0, 9:-1]
    expected = logits.double().log_softmax(-1)
    for row, batch in zip(expected, batches, strict=True):
        (entry,) = batch.logprobs
        assert entry.logprob == pytest.approx(row[batch.token_ids[0]].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


def test_integrity_finds_a_page_table_that_disagrees_with_its_pool(tiny_model, engines):
    both = engines(tiny_model("llama"))
    both.start(request("a", 10, 5))
    (held,) = both.decode.running[0].kv
    held.sheet.used = 97
    with pytest.raises(IntegrityError, match="runs of 96 entries, 97 of them used"):
        both.decode.check_integrity()
    held.sheet.used = 10
    both.decode.pages.arenas[0].pool.share(held.sheet)
    with pytest.raises(IntegrityError, match="1 sheets with 2 references, page tables hold 1 with"):
        both.decode.check_integrity()


def test_an_idle_step_does_nothing(tiny_model, engines):
    assert engines(tiny_model("llama")).decode.step() == []


def test_a_stage_that_attends_nowhere_still_decodes(tiny_model, engines, make_plan, reference):
    model = tiny_model("llama")
    plan = make_plan(model, decode=dict.fromkeys(range(5), "mlp_only"))
    both = engines(model, plan, max_num_seqs=2)
    assert both.decode.kv_bytes == 0
    asked = request("a", 6, 5, ignore_eos=True)
    both.start(asked)
    assert both.decode.usage == 0.5
    both.drain()
    logits = reference(model, plan).answer_logits(asked.prompt_token_ids, both.answers["a"])
    assert both.answers["a"] == logits.argmax(-1).tolist()
