"""Exact match through the engine, with ``model.generate`` as the oracle."""

from __future__ import annotations

import random

import torch

from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.evaluation.measures.answers import judge_answers


def generated(model, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=257,
    )
    return tuple(out[0, len(prompt) :].tolist())


def test_matches_are_those_of_generate(tiny_model):
    model, rng = tiny_model("llama"), random.Random(0)
    prompts = [tuple(rng.choices(range(256), k=k)) for k in (9, 17, 30, 12, 25, 40)]
    answers = [generated(model, prompt, 2 + i) for i, prompt in enumerate(prompts)]
    right = [TokenizedLine(p, a, "") for p, a in zip(prompts, answers, strict=True)]
    wrong_first = [TokenizedLine(p, ((a[0] + 1) % 256, *a[1:]), "") for p, a, _ in _rows(right)]
    wrong_last = [TokenizedLine(p, (*a[:-1], (a[-1] + 1) % 256), "") for p, a, _ in _rows(right)]
    pipeline = LocalPipeline(model, max_num_seqs=4)
    judged = judge_answers(pipeline, [*right, *wrong_first, *wrong_last])
    assert [answer.is_match for answer in judged] == [True] * 6 + [False] * 12
    assert [a.transfer.num_prompt_tokens for a in judged[:6]] == [len(p) for p in prompts]


def _rows(lines):
    return [(line.prompt, line.continuation, line.task) for line in lines]


def test_another_end_marker_of_the_model_counts_as_the_end(tiny_model):
    model = tiny_model("llama")
    prompt = tuple(range(40, 60))
    *answer, end = generated(model, prompt, 4)
    line = TokenizedLine(prompt, (*answer, 299 if end != 299 else 298), "")
    pipeline = LocalPipeline(model)
    assert not judge_answers(pipeline, [line])[0].is_match
    assert judge_answers(pipeline, [line], end_token_ids=(end,))[0].is_match


def test_an_answer_that_ends_at_once_is_accounted_for_too(tiny_model):
    model = tiny_model("llama")
    prompt = tuple(range(40, 60))
    (first,) = generated(model, prompt, 1)
    model.generation_config.eos_token_id = first
    (answer,) = judge_answers(LocalPipeline(model), [TokenizedLine(prompt, (first + 1, 256), "")])
    assert not answer.is_match
    assert answer.transfer.bytes_sent > 0


def test_a_worked_answer_is_judged_by_its_final_number(tiny_model):
    model = tiny_model("llama")
    prompt = tuple(range(40, 60))
    answer = generated(model, prompt, 12)
    texts = {answer: "9 * 2 = 18, so", answer[:5]: "4 + 4 = 8"}

    def judged(number: str, end: int | None = None) -> bool:
        line = TokenizedLine(prompt, (1, 2, 256), "", number=number, longest=12)
        ends = () if end is None else (end,)
        (found,) = judge_answers(
            LocalPipeline(model),
            [line],
            end_token_ids=ends,
            decode=lambda ids: texts.get(tuple(ids), "nothing"),
        )
        assert found.is_match == found.begins
        assert found.transfer.num_prompt_tokens == len(prompt)
        return found.is_match

    assert judged("18")
    assert not judged("8")
    if answer.index(answer[5]) == 5:
        assert judged("8", answer[5]), "what stands behind the end marker does not count"
