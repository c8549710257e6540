"""Baselines judged as a plan would be: the masked full cache equals what is served."""

from __future__ import annotations

import math
import random

import pytest
import torch
from kv.attention import WINDOW, PromptAttention
from kv.choosers import FixedRules, LazyBlocks, ScoredTokens, in_all_blocks
from kv.key_groups import encoded_bytes, in_groups
from kv.quality import attentions, kv_quality, tuned

from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.measures.likelihood import TwoStages, likelihoods
from rayapp.kv.cache import Prefix, PrefixCache
from rayapp.kv.ledger import KVShape
from rayapp.kv.quantize import buffer_sizes, round_trip
from rayapp.models.blocks import signature_of
from rayapp.plan import KEY_GROUP, KVTransfer, PruningPlan
from rayapp.pruning.kv_choice.bytes import KVBytes

RULES = {
    0: KVTransfer(first=2, last=0.25),
    1: KVTransfer(encoding="int8"),
    2: KVTransfer(first=1, last=5, encoding="int4"),
}


def lines(*lengths: int) -> list[TokenizedLine]:
    rng = random.Random(0)
    return [
        TokenizedLine(
            tuple(rng.choices(range(256), k=length)),
            tuple(rng.choices(range(256), k=1 + n % 4)),
            "ab"[n % 2],
        )
        for n, length in enumerate(lengths)
    ]


def plan_of(model, first_token: str = "prefill", **modes: dict) -> PruningPlan:
    return PruningPlan.model_validate(
        {"model": signature_of(model), "first_token": first_token, **modes}
    )


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_fixed_rules_are_judged_as_they_are_served(tiny_model, family, first_token):
    model, some = tiny_model(family), lines(9, 9, 30, 30, 30, 41, 3)
    modes = {
        "prefill": {"blocks": {1: "kv_only"}},
        "decode": {"blocks": {3: "removed"}},
    }
    plan = plan_of(model, first_token, **modes)
    served = plan.model_copy(update={"kv_transfer": RULES})
    dense = TwoStages(model, PruningPlan())
    wanted = dict(likelihoods(dense, TwoStages(model, served), some))
    found = kv_quality(model, served, {"rules": FixedRules(RULES), "all": FixedRules({})}, some)
    for index, line in enumerate(some):
        want = wanted[index]
        assert found["rules"].kl[index] == pytest.approx(want.kl, rel=1e-3, abs=1e-6)
        assert len(line.continuation) == want.num_tokens
    num_bytes = KVBytes(model.config, plan, [len(line.prompt) for line in some])
    assert found["rules"].bytes_sent == num_bytes.sent(RULES)
    assert found["rules"].bytes_full == num_bytes.full
    assert found["rules"].reduction > found["all"].reduction
    assert found["rules"].mean_kl()[0] > found["all"].mean_kl()[0]


def test_exact_match_is_that_of_greedy_decoding(tiny_model):
    model = tiny_model("llama")
    prompts = [line.prompt for line in lines(20, 20, 35, 12)]
    some = []
    for number, prompt in enumerate(prompts):
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        answer = greedy[0, len(prompt) :].tolist()
        answer[-1] = (answer[-1] + number % 2) % 256  # every second one is wrong at its end
        some.append(TokenizedLine(prompt, tuple(answer), "t"))
    found = kv_quality(model, plan_of(model), {"all": FixedRules({})}, some)["all"]
    assert found.is_match == {0: True, 1: False, 2: True, 3: False}
    assert found.exact_match() == {"t": 0.5}
    assert found.mean_kl()[0] == pytest.approx(0, abs=1e-9)


def attention_of(**last: list[float]) -> PromptAttention:
    """One prompt of ten tokens; weights of the last token by block."""
    weights = {int(block[1:]): torch.tensor([values]) for block, values in last.items()}
    votes = {block: w[:, None].expand(1, 2, -1).clone() for block, w in weights.items()}
    return PromptAttention(10, 1, 2, dict.fromkeys(weights, 10), weights, votes)


def test_lazy_blocks_are_cut_where_the_mass_reaches_the_threshold(tiny_model):
    model = tiny_model("llama")
    num_bytes = KVBytes(model.config, plan_of(model), [10])
    ends = [0.5, 0, 0, 0, 0, 0, 0, 0, 0.3, 0.2]
    middle = [0.1, 0, 0, 0, 0.7, 0, 0, 0, 0.1, 0.1]
    attention = attention_of(b0=ends, b1=middle)
    attention.held[4] = 10  # nothing was seen of it
    cut = KVTransfer(first=1, last=2, encoding="int8")
    choice = LazyBlocks(0.9, cut).choose(attention, num_bytes)
    assert choice.kept[0].flatten().nonzero().flatten().tolist() == [0, 8, 9]
    assert choice.kept[1].all()
    assert choice.kept[4].all()
    uncut = KVTransfer(encoding="int8")
    assert choice.bytes_sent == (num_bytes.message({0: cut, 1: uncut, 4: uncut}, 10),)


def test_scored_tokens_keep_the_window_and_what_it_votes_for(tiny_model):
    model = tiny_model("llama")
    held, seen = 60, 12
    plan = plan_of(model, decode={"blocks": dict.fromkeys([1, 2, 4], "removed")})
    num_bytes = KVBytes(model.config, plan, [held])
    votes = torch.zeros(1, 2, held)
    votes[0, 0, seen] = 1.0
    attention = PromptAttention(held, 1, 2, {0: held, 3: held}, {}, {0: votes})
    choice = ScoredTokens(39 / 60, pool=7).choose(attention, num_bytes)
    kept = [set(row.nonzero().flatten().tolist()) for row in choice.kept[0][0]]
    recent = set(range(held - WINDOW, held))
    assert kept[0] == recent | set(range(seen - 3, seen + 4))
    assert len(kept[1]) == 39
    assert recent < kept[1]
    assert set(choice.kept[3][0, 0].nonzero().flatten().tolist()) == set(range(held - 39, held))
    payload = 2 * sum(buffer_sizes("model", 2, 39, 16, 4))
    index = 2 * 2 * math.ceil(held / 8)
    assert 0 < choice.bytes_sent[0] - payload - index < 1000  # the header
    few = ScoredTokens(0.1).choose(attention, num_bytes)
    assert set(few.kept[0][0, 0].nonzero().flatten().tolist()) == set(range(54, 60))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tuned_choosers_meet_the_budget(tiny_model, family):
    model, some = tiny_model(family), lines(50, 50, 64, 41)
    plan = plan_of(model)
    num_bytes = KVBytes(model.config, plan, [len(line.prompt) for line in some])
    seen = attentions(model, plan, some)
    cut = KVTransfer(first=2, last=0.1)
    makers = {
        "recent": lambda x: in_all_blocks(KVTransfer(first=2, last=x), range(5)),
        "lazy": lambda x: LazyBlocks(x, cut),
        "scored": ScoredTokens,
    }
    budget = num_bytes.full / 2
    choosers = {name: tuned(make, seen, num_bytes, budget) for name, make in makers.items()}
    found = kv_quality(model, plan, choosers, some)
    for name, quality in found.items():
        assert 0.6 * budget < quality.bytes_sent <= budget, name
        assert math.isfinite(quality.mean_kl()[1])
    assert tuned(makers["lazy"], seen, num_bytes, 100) is None
    assert tuned(makers["scored"], seen, num_bytes, 10 * num_bytes.full).keep_ratio == 1.0


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_groups_of_any_size_meet_the_encoding_at_its_own(encoding):
    """The benchmark of group sizes encodes as the wire does where the size is the wire's."""
    keys, values = torch.randn(2, 2, 3, 2 * KEY_GROUP + 5, 4)
    full = PrefixCache({0: Prefix(keys, values, torch.arange(keys.shape[2]))}, (None,))
    found = in_groups(full, encoding, KEY_GROUP).prefixes[0]
    wanted = round_trip(keys, values, encoding)
    assert torch.equal(found.keys_BHND, wanted[0])
    assert torch.equal(found.values_BHND, wanted[1])
    shape = KVShape(1, 3, 4, 4, (None,))
    sent = sum(buffer_sizes(encoding, 3, keys.shape[2], 4, 4))
    assert encoded_bytes(shape, encoding, KEY_GROUP, keys.shape[2]) == sent
    assert encoded_bytes(shape, encoding, keys.shape[2], keys.shape[2]) == sent - 2 * 3 * 4 * 2
