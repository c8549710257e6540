"""Generation: the plan along the dense model's own greedy answers, and its own answers beside them.

The dense model answers a prompt greedily through the engine that serves. Both sides are then
teacher-forced through that answer, so KL and agreement are known at every position. The plan's own
greedy answer says how soon it differs, and whether it repeats itself.
Shapes: C = answer tokens, V = vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.evaluation.quality import Form, PositionBin, RolloutResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.likelihood import kl

_NGRAM = 4
_TOKENS_AT_ONCE = 64  # of one line: a vocabulary of 128,000 makes them 65 MB in float64


@dataclass(frozen=True)
class Opening:
    """A prompt that a rollout begins with.

    Attributes:
        prompt: Its token ids.
        form: How it is written.
        turns: The user's first two turns, if a second one is to follow the dense answer.
    """

    prompt: tuple[int, ...]
    form: Form
    turns: tuple[str, str] | None = None


@dataclass(frozen=True)
class Rollout:
    """One prompt's answers, and the comparison along the dense one, token by token.

    Attributes:
        dense: Tokens of the dense model's greedy answer.
        plan: Tokens of the plan's own.
        kl: KL(dense || plan) at every token of the dense answer, in nats.
        agrees: Whether both sides' likeliest tokens are the same there.
    """

    dense: tuple[int, ...]
    plan: tuple[int, ...]
    kl: tuple[float, ...]
    agrees: tuple[bool, ...]

    @property
    def num_same(self) -> int:
        """Number of tokens that both answers begin with alike."""
        pairs = zip(self.dense, self.plan, strict=False)
        return next((n for n, (d, p) in enumerate(pairs) if d != p), min(self._lengths))

    @property
    def is_same(self) -> bool:
        """Whether both answers are the same."""
        return self.dense == self.plan

    @property
    def _lengths(self) -> tuple[int, int]:
        return len(self.dense), len(self.plan)


def roll_out(
    dense: LocalPipeline,
    plan: LocalPipeline,
    sides: tuple[TwoStages, TwoStages],
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: int,
) -> list[Rollout]:
    """Answer prompts greedily on both sides, and compare along the dense answers.

    Args:
        dense: The dense model's pipeline.
        plan: The plan's.
        sides: The teacher-forced stages of both.
        prompts: Token ids of the prompts.
        max_tokens: Length at which an answer is cut off.
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    answers, others = (
        [done.token_ids for done in side.generate(list(prompts), [sampling] * len(prompts))]
        for side in (dense, plan)
    )
    compared = [
        _compared(sides, prompt, tuple(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return [
        Rollout(tuple(answer), tuple(other), *found)
        for answer, other, found in zip(answers, others, compared, strict=True)
    ]


def _compared(
    sides: tuple[TwoStages, TwoStages], prompt: tuple[int, ...], answer: tuple[int, ...]
) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    """KL and agreement at every token of an answer."""
    prompt_1T, answer_1C = torch.tensor([prompt]), torch.tensor([answer])
    dense_CV, plan_CV = (side.logits(prompt_1T, answer_1C)[0] for side in sides)
    values: list[float] = []
    for start in range(0, len(answer), _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        values += kl(dense_CV[rows], plan_CV[rows]).tolist()
    agrees_C = dense_CV.argmax(-1) == plan_CV.argmax(-1)
    return tuple(values), tuple(agrees_C.tolist())


def repetition(token_ids: Sequence[int]) -> float:
    """Share of an answer's 4-grams that stood in it before; 0 of an answer without any."""
    grams = [tuple(token_ids[n : n + _NGRAM]) for n in range(len(token_ids) - _NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def position_bins(rollouts: Sequence[Rollout]) -> tuple[PositionBin, ...]:
    """KL and agreement of tokens 0, 1-3, 4-15, 16-63, 64-255, ..."""
    longest = max(len(rollout.dense) for rollout in rollouts)
    edges = [0, *(4**n for n in range(math.ceil(math.log(longest, 4)) + 2))]
    bins = []
    for first, end in itertools.pairwise(edges):
        values = [value for rollout in rollouts for value in rollout.kl[first:end]]
        agreed = [agrees for rollout in rollouts for agrees in rollout.agrees[first:end]]
        if values:
            bins.append(
                PositionBin(
                    first=first,
                    last=min(end, longest) - 1,
                    num_tokens=len(values),
                    kl=math.fsum(values) / len(values),
                    agreement=sum(agreed) / len(agreed),
                )
            )
    return tuple(bins)


def rollout_result(
    source: str,
    form: Form,
    rollouts: Sequence[Rollout],
    settings: EvaluationSettings,
    *,
    by_prefill: bool,
) -> RolloutResult:
    """One row of the result.

    Args:
        source: The task whose prompts begin the rollouts.
        form: How the prompts are written.
        rollouts: The rollouts.
        settings: Seeds and resamples.
        by_prefill: Whether the plan's prefill makes the first token.
    """
    lengths = [len(rollout.dense) for rollout in rollouts]
    total, count = sum(lengths), len(rollouts)
    return RolloutResult(
        source=source,
        form=form,
        num_rollouts=count,
        num_tokens=total,
        max_tokens=settings.max_rollout_tokens,
        decode_share=1 - by_prefill * count / total,
        kl=upper_bound(
            [[math.fsum(r.kl) / len(r.kl) for r in rollouts]],
            weights=[[float(length) for length in lengths]],
            seed=settings.seed,
            num_resamples=settings.num_resamples,
        ),
        agreement=sum(sum(rollout.agrees) for rollout in rollouts) / total,
        bins=position_bins(rollouts),
        num_same=sum(rollout.is_same for rollout in rollouts),
        mean_same_tokens=sum(rollout.num_same for rollout in rollouts) / count,
        dense_repetition=sum(repetition(rollout.dense) for rollout in rollouts) / count,
        plan_repetition=sum(repetition(rollout.plan) for rollout in rollouts) / count,
    )
