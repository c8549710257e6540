"""The whole path in one process, against ``model.generate`` and a masked full computation."""

from __future__ import annotations

import random

import pytest
import torch

from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import PlanError, RequestError
from rayapp.plan import STAGE_MODES, STAGES, PruningPlan

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
EVERY_MODE = {
    "prefill": {1: "kv_only", 2: "mlp_and_kv", 3: "removed", 4: "attention_only", 5: "mlp_only"},
    "decode": {2: "attention_only", 3: "removed", 5: "mlp_only"},
    "kv_transfer": {
        0: {"first": 2, "last": 5},
        1: {"first": 0, "last": 0.5},
        2: {"first": 3},
        4: {"last": 4},
        6: {"first": 1, "last": 1},
    },
}


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 250, (length,), generator=generator).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_plan_generates_what_the_model_does(tiny_model, byte_tokenizer, family):
    model = tiny_model(family)
    prompts = [prompt(length) for length in (3, 31, 18, 1, 24, 9)]
    limits = [SamplingParams(max_tokens=n) for n in (10, 5, 14, 13, 1, 6)]
    answers = LocalPipeline(model, byte_tokenizer, max_num_seqs=3).generate(prompts, limits)
    for given, params, answer in zip(prompts, limits, answers, strict=True):
        expected = model.generate(
            torch.tensor([given]), max_new_tokens=params.max_tokens, do_sample=False
        )[0, len(given) :].tolist()
        assert list(answer.token_ids) == expected
        assert answer.text == byte_tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.prompt_token_ids == tuple(given)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_equals_the_masked_reference(
    tiny_model, make_plan, reference, family, first_token
):
    model = tiny_model(family, num_hidden_layers=8)
    plan = make_plan(model, **EVERY_MODE, first_token=first_token)
    pipeline = LocalPipeline(model, None, plan)
    for length, num_answers in ((30, 18), (1, 6), (8, 1)):
        answer = prompt(100 + num_answers)[:num_answers]
        found = pipeline.answer_logits(prompt(length), answer)
        expected = reference(model, plan).answer_logits(prompt(length), answer)
        assert found.shape == (num_answers, model.config.vocab_size)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_equal_the_masked_reference(tiny_model, make_plan, reference, seed):
    rng = random.Random(seed)
    model = tiny_model(FAMILIES[seed % 4])
    plan = make_plan(model, **random_plan(rng, 5))
    given, answer = prompt(rng.randint(1, 30)), prompt(rng.randint(1, 20))
    found = LocalPipeline(model, None, plan).answer_logits(given, answer)
    expected = reference(model, plan).answer_logits(given, answer)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


def random_plan(rng: random.Random, num_blocks: int) -> dict[str, object]:
    plan: dict[str, dict] = {"prefill": {}, "decode": {}, "kv_transfer": {}}
    for block in range(num_blocks):
        while True:
            modes = {stage: rng.choice(sorted(STAGE_MODES[stage])) for stage in STAGES}
            if not modes["decode"].attends or modes["prefill"].writes_kv:
                break
        for stage in STAGES:
            plan[stage][block] = modes[stage]
        if modes["decode"].attends and rng.random() < 0.7:
            plan["kv_transfer"][block] = {"first": rng.randint(0, 3), "last": rng.random() or 1}
    return {**plan, "first_token": rng.choice(STAGES)}


def test_generated_tokens_are_the_best_of_the_logits(tiny_model, make_plan, reference):
    model = tiny_model("mistral", num_hidden_layers=8)
    plan = make_plan(model, **EVERY_MODE, first_token="decode")
    prompts = [prompt(length) for length in (30, 1, 13, 22, 7)]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    answers = LocalPipeline(model, None, plan, max_num_seqs=3).generate(prompts, params)
    for given, answer in zip(prompts, answers, strict=True):
        logits = reference(model, plan).answer_logits(given, answer.token_ids)
        assert list(answer.token_ids) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_encoded_kv_moves_the_logits_a_little(tiny_model, make_plan, encoding):
    model = tiny_model("llama")
    plan = make_plan(model, kv_transfer={b: {"encoding": encoding} for b in range(5)})
    answer = prompt(12)
    exact = LocalPipeline(model).answer_logits(prompt(24), answer)
    coded = LocalPipeline(model, None, plan).answer_logits(prompt(24), answer)
    assert torch.equal(exact[0], coded[0])  # prefill's own logits saw no transfer
    error = (exact[1:] - coded[1:]).abs().mean() / exact.abs().mean()
    assert 0 < error < {"int8": 0.05, "int4": 0.8}[encoding]


def test_each_answer_has_its_transfer_record(tiny_model, make_plan):
    model = tiny_model("llama", num_hidden_layers=8)
    plan = make_plan(model, **EVERY_MODE)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (6, 1)]
    sent, unsent = LocalPipeline(model, None, plan).generate([prompt(20)] * 2, params)
    entry_bytes = 2 * 2 * 16 * 4
    assert sent.transfer.bytes_full == 8 * 20 * entry_bytes
    # blocks 0, 1, 2, 4, 6 as the plan cuts them, 7 whole; 3 and 5 are not needed
    assert sent.transfer.bytes_sent - sent.transfer.overhead_bytes == entry_bytes * (
        7 + 10 + 3 + 4 + 2 + 20
    )
    assert unsent.transfer is None
    assert (len(unsent.token_ids), unsent.finish_reason) == (1, "length")


def test_the_timeline_of_an_answer_ascends(tiny_model):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    (answer,) = LocalPipeline(tiny_model("llama")).generate([prompt(5)], params)
    marks = {name: mark for name, mark in vars(answer.timeline).items() if name != "transfer"}
    assert None not in marks.values()
    intervals = answer.timeline.intervals()
    assert min(intervals.values()) >= 0
    assert intervals["e2e_s"] >= intervals["ttft_s"] + intervals["decode_s"] * 0.5


def test_stop_strings_end_the_text_and_the_sequence(tiny_model, byte_tokenizer):
    model = tiny_model("qwen3")
    pipeline = LocalPipeline(model, byte_tokenizer)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (free,) = pipeline.generate(["Say something."], params)
    at = next(i for i in range(3, 30) if free.text[i].isascii())
    stop = free.text[at]
    stopping = params.model_copy(update={"stop": (stop, "never there")})
    (stopped,) = pipeline.generate(["Say something."], stopping)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 40


def test_sampling_is_reproducible_and_seeds_differ(tiny_model):
    pipeline = LocalPipeline(tiny_model("llama"))
    params = [
        SamplingParams(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
        for seed in (1, 1, 2)
    ]
    one, same, other = pipeline.generate([prompt(9)] * 3, params)
    assert one.token_ids == same.token_ids
    assert one.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("one string", "pass a list"),
        ([[]], "no tokens"),
        ([[1] * 510], "at most 512"),
        ([[1, 300]], r"token id 300 is not in the vocabulary; ids lie in 0\.\.299"),
        ([[1, -1]], "token id -1"),
        (["text"], "needs a tokenizer"),
    ],
)
def test_bad_prompts_are_refused_with_a_reason(tiny_model, prompts, message):
    with pytest.raises(RequestError, match=message):
        LocalPipeline(tiny_model("llama")).generate(prompts)


def test_one_set_of_parameters_or_as_many_as_prompts(tiny_model):
    with pytest.raises(RequestError, match="2 prompts but 1 sampling"):
        LocalPipeline(tiny_model("llama")).generate([[1], [2]], [SamplingParams()])


def test_stop_strings_without_a_tokenizer_are_refused(tiny_model):
    with pytest.raises(RequestError, match="need a tokenizer"):
        LocalPipeline(tiny_model("llama")).generate([[1]], SamplingParams(stop=("x",)))


def test_a_plan_of_another_model_is_refused(tiny_model, make_plan):
    plan = make_plan(tiny_model("llama"), decode={1: "removed"})
    with pytest.raises(PlanError, match="another model"):
        LocalPipeline(tiny_model("qwen2"), None, plan)


def test_no_prompts_give_no_answers(tiny_model):
    assert LocalPipeline(tiny_model("llama"), None, PruningPlan()).generate([]) == []
