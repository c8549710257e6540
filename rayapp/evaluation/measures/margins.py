"""The margin above chance that a plan keeps, on tasks that the dense model can do.

A task is admitted if the dense model's two-sided 95 % interval lies above chance and above the
share of the commonest answer, and if decode computed some of its scored tokens: an answer of one
letter is mostly prefill's, and says nothing about decode. Where a plan changes decode alone, a
task counts only if decode computed at least half of its scored tokens: most answers of another one
are right or wrong whatever the plan does. Of an admitted task the plan keeps
``(plan - chance) / (dense - chance)``, resampled in pairs. The mean over tasks is resampled
jointly, tasks counting alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayapp.evaluation.bootstrap import Interval, Resampled, resampled_means
from rayapp.evaluation.measures.choices import AnsweredQuestions
from rayapp.evaluation.measures.completions import JudgedCompletions
from rayapp.evaluation.measures.perplexity import ScoredWindows
from rayapp.evaluation.quality import MarginRow, PerplexityRow, Quality
from rayapp.evaluation.settings import EvaluationSettings

Metric = Literal["acc", "acc_norm", "answer"]
LEAST_SHARE = 0.5
"""Share of a task's scored tokens that decode computes at least, for plans that change decode alone
(project default)."""


@dataclass(frozen=True)
class Answers:
    """Right and wrong answers of one task on both sides, example by example.

    Attributes:
        metric: What being right means.
        dense: Whether the dense model is right.
        plan: Whether the plan is.
        chance: Chance of guessing right.
        keys: The right answers, by what an answer without looking at the question would be: a
            choice's number, or its text.
        decode_share: Share of the scored tokens that decode computed.
    """

    metric: Metric
    dense: Sequence[bool]
    plan: Sequence[bool]
    chance: Sequence[float]
    keys: tuple[Sequence[Hashable], ...]
    decode_share: float

    @property
    def majority(self) -> float:
        """Share of examples that the commonest answer is right for."""
        counts = [max(Counter(keys).values()) for keys in self.keys]
        return max(counts) / len(self.dense)

    @classmethod
    def of_choices(cls, group: AnsweredQuestions, metric: Literal["acc", "acc_norm"]) -> Answers:
        """The answers of a multiple-choice task."""
        by_character = metric == "acc_norm"
        questions = group.questions
        return cls(
            metric,
            group.right(group.dense, by_character=by_character),
            group.right(group.plan, by_character=by_character),
            [1 / len(question.choices) for question in questions],
            (
                [question.answer for question in questions],
                [question.choices[question.answer] for question in questions],
            ),
            group.decode_share,
        )

    @classmethod
    def of_completions(cls, group: JudgedCompletions) -> Answers:
        """The answers of a task of completions, the end marker aside; guessing is never right."""
        return cls(
            "answer",
            [answer.begins for answer in group.dense],
            [answer.begins for answer in group.plan],
            [0.0] * len(group.lines),
            ([line.continuation for line in group.lines],),
            group.answer_share,
        )


def quality_of(
    answers: Mapping[str, Answers],
    texts: Mapping[str, ScoredWindows],
    seen: Mapping[str, str],
    settings: EvaluationSettings,
    *,
    only_decode: bool = False,
) -> Quality:
    """The primary end points of a plan.

    Args:
        answers: The tasks with right answers.
        texts: The tasks of text.
        seen: How the plan has seen a task; empty if it has not.
        settings: The number of compared plans, seed and resamples.
        only_decode: Whether the plan changes decode alone.
    """
    margins: list[MarginRow] = []
    kept: list[Resampled] = []
    for task, group in answers.items():
        least = LEAST_SHARE if only_decode else 0.0
        row, margin = _margin(task, group, seen.get(task, ""), settings, least)
        margins.append(row)
        if margin is not None and not row.reason:
            kept.append(margin)
    rows, losses = [], []
    for task, windows in texts.items():
        row_of_text, loss = _perplexity(task, windows, seen.get(task, ""), settings)
        rows.append(row_of_text)
        if not row_of_text.seen:
            losses.append(loss)
    compared = settings.num_compared
    counted = [
        (row.margin_kept.mean, row.task) for row in margins if row.margin_kept and not row.reason
    ]
    return Quality(
        margins=tuple(margins),
        macro=Resampled.mean_of(kept).interval(compared) if kept else None,
        worst=min(counted)[1] if counted else None,
        texts=tuple(rows),
        perplexity_ratio=_ratio(Resampled.mean_of(losses), compared) if losses else None,
        num_compared=compared,
    )


def _margin(
    task: str, answers: Answers, seen: str, settings: EvaluationSettings, least_share: float
) -> tuple[MarginRow, Resampled | None]:
    """A task's row, and its kept margin if there is any margin to keep."""
    columns = [
        np.asarray(values, float) for values in (answers.dense, answers.plan, answers.chance)
    ]
    means_K, drawn_KR = resampled_means(
        columns, seed=settings.seed, num_resamples=settings.num_resamples
    )
    dense, plan, chance = (
        Resampled(float(mean), drawn_R, len(answers.dense))
        for mean, drawn_R in zip(means_K, drawn_KR, strict=True)
    )
    interval = dense.interval()
    reason = _refusal(answers, interval, chance.mean, least_share)
    margin = _kept(dense, plan, chance) if not reason else None
    row = MarginRow(
        task=task,
        metric=answers.metric,
        num_examples=len(answers.dense),
        decode_share=answers.decode_share,
        dense=interval,
        plan_accuracy=plan.mean,
        chance=chance.mean,
        majority=answers.majority,
        admitted=not reason,
        seen=seen,
        reason=reason or seen,
        margin_kept=margin.interval(settings.num_compared) if margin else None,
    )
    return row, margin


def _refusal(answers: Answers, dense: Interval, chance: float, least_share: float) -> str:
    """Why a task is not admitted; empty if it is."""
    if not answers.decode_share:
        return "decode computed none of its scored tokens; score whole answers"
    if answers.decode_share < least_share:
        return (
            f"decode computed {answers.decode_share:.0%} of its scored tokens, and the plan "
            "changes decode alone"
        )
    bars = (("chance", chance), ("the commonest answer", answers.majority))
    missed = [f"{name}, {bar:.1%}" for name, bar in bars if dense.lower <= bar]
    if not missed:
        return ""
    return f"dense may be no better than {' and '.join(missed)} (at least {dense.lower:.1%})"


def _kept(dense: Resampled, plan: Resampled, chance: Resampled) -> Resampled:
    """The share of the margin that the plan keeps; a resample without margin keeps none of it."""
    margin_R = dense.drawn_R - chance.drawn_R
    kept_R: NDArray[np.floating] = np.where(
        margin_R > 0, (plan.drawn_R - chance.drawn_R) / np.where(margin_R > 0, margin_R, 1.0), 0.0
    )
    mean = (plan.mean - chance.mean) / (dense.mean - chance.mean)
    return Resampled(mean, kept_R, dense.num_examples)


def _perplexity(
    task: str, windows: ScoredWindows, seen: str, settings: EvaluationSettings
) -> tuple[PerplexityRow, Resampled]:
    """A text's row, and its loss in nats per token."""
    means_K, drawn_KR = resampled_means(
        [windows.nll_lost],
        weights=windows.num_tokens,
        seed=settings.seed,
        num_resamples=settings.num_resamples,
    )
    loss = Resampled(float(means_K[0]), drawn_KR[0], len(windows.likelihoods))
    row = PerplexityRow(
        task=task,
        num_tokens=round(sum(windows.num_tokens)),
        decode_share=windows.decode_share,
        dense=math.exp(windows.nll("dense_nll")),
        plan=math.exp(windows.nll("plan_nll")),
        ratio=_ratio(loss, settings.num_compared),
        seen=seen,
    )
    return row, loss


def _ratio(loss: Resampled, num_compared: int) -> Interval:
    """Perplexity of the plan over that of the dense model, from nats per token."""
    ratio = Resampled(math.exp(loss.mean), np.exp(loss.drawn_R), loss.num_examples)
    return ratio.interval(num_compared)
