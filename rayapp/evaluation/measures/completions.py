"""Completions: exact match through the serving engine, and likelihoods teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.measures.answers import JudgedAnswer
from rayapp.evaluation.measures.likelihood import LineLikelihood
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.result import TaskResult
from rayapp.evaluation.settings import EvaluationSettings


@dataclass(frozen=True)
class JudgedCompletions:
    """The measurements of one task, example by example.

    ``by_prefill`` says whether the plan's prefill computes the first token of every completion.
    """

    lines: Sequence[TokenizedLine]
    likelihoods: Sequence[LineLikelihood]
    dense: Sequence[JudgedAnswer]
    plan: Sequence[JudgedAnswer]
    by_prefill: bool = True

    @property
    def decode_share(self) -> float:
        """Share of the scored tokens that decode computed; prefill may make the first ones."""
        return 1 - self.by_prefill * len(self.lines) / sum(self.num_tokens)

    @property
    def answer_share(self) -> float:
        """The same share of the completions' own tokens, end markers aside."""
        lengths = [len(line.continuation) - line.ends for line in self.lines]
        return 1 - self.by_prefill * len(lengths) / sum(lengths)

    @property
    def points_lost(self) -> list[float]:
        """Percentage points lost, example by example: 100, 0 or -100."""
        pairs = zip(self.dense, self.plan, strict=True)
        return [100.0 * (dense.is_match - plan.is_match) for dense, plan in pairs]

    @property
    def token_kl(self) -> list[float]:
        """Mean KL over the continuation tokens, example by example."""
        return [sums.kl / sums.num_tokens for sums in self.likelihoods]

    @property
    def num_tokens(self) -> list[float]:
        """Number of continuation tokens, example by example."""
        return [float(sums.num_tokens) for sums in self.likelihoods]

    @property
    def sent(self) -> PromptBytes:
        """Sums over the plan's transfers."""
        transfers = [answer.transfer for answer in self.plan]
        return PromptBytes(
            sum(record.bytes_full for record in transfers),
            sum(record.bytes_sent for record in transfers),
            sum(record.overhead_bytes for record in transfers),
            sum(record.saved_by_visual_tokens_bytes for record in transfers),
        )


def completion_result(
    task: str, groups: Sequence[JudgedCompletions], settings: EvaluationSettings
) -> TaskResult:
    """One row of the result: a task, or the mean over tasks."""
    seed, resamples = settings.seed, settings.num_resamples
    weights = [group.num_tokens for group in groups]
    lengths = [len(line.prompt) for group in groups for line in group.lines]
    return TaskResult(
        task=task,
        num_examples=len(lengths),
        num_tokens=round(sum(sum(group) for group in weights)),
        min_prompt_tokens=min(lengths),
        mean_prompt_tokens=sum(lengths) / len(lengths),
        max_prompt_tokens=max(lengths),
        dense_nll=_mean([_token_nll(group, "dense_nll") for group in groups]),
        plan_nll=_mean([_token_nll(group, "plan_nll") for group in groups]),
        kl=upper_bound(
            [group.token_kl for group in groups],
            weights=weights,
            seed=seed,
            num_resamples=resamples,
        ),
        dense_exact_match=_mean([_mean([a.is_match for a in group.dense]) for group in groups]),
        plan_exact_match=_mean([_mean([a.is_match for a in group.plan]) for group in groups]),
        points_lost=upper_bound(
            [group.points_lost for group in groups], seed=seed, num_resamples=resamples
        ),
        decode_share=_mean([group.decode_share for group in groups]),
        dense_answer=_mean([_mean([a.begins for a in group.dense]) for group in groups]),
        plan_answer=_mean([_mean([a.begins for a in group.plan]) for group in groups]),
        **PromptBytes.total(group.sent for group in groups).fields(),
    )


def _token_nll(group: JudgedCompletions, side: str) -> float:
    return sum(getattr(sums, side) for sums in group.likelihoods) / sum(group.num_tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
