"""The end points that reviewers ask of a plan: margin above chance kept, perplexity, generation.

Only tasks that the dense model can do are counted, and none that the plan was chosen or trained on
(:mod:`rayapp.evaluation.measures.margins`, :mod:`rayapp.evaluation.measures.rollouts`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayapp.evaluation.bootstrap import Bound, Interval
from rayapp.settings import Strict

Form = Literal["plain", "chat", "second turn"]
"""How the prompt of a rollout is written."""
FORMS: tuple[Form, ...] = ("plain", "chat", "second turn")


class PositionBin(Strict):
    """Answer tokens ``first`` to ``last`` (from 0) of all rollouts: their number, KL, agreement.

    ``kl`` is nats per token; ``agreement`` is the share of tokens whose likeliest successor is the
    dense model's choice under the plan as well.
    """

    first: int = Field(ge=0)
    last: int
    num_tokens: int = Field(ge=1)
    kl: float
    agreement: float


class RolloutResult(Strict):
    """Generation from the prompts of one source: the plan along the dense model's own answers.

    The dense model answers greedily, and both sides are teacher-forced through its answer.

    Attributes:
        source: The task whose prompts begin the rollouts.
        form: How prompts are written: as they stand (``plain``), under the chat template
            (``chat``), or as a conversation's second turn after the dense model's first answer.
        num_rollouts: Number of prompts.
        num_tokens: Tokens that were scored, end markers included.
        max_tokens: Length at which a rollout is cut off.
        kl: KL in nats per token, rollouts weighed by their tokens.
        agreement: Share of tokens on which both sides' likeliest tokens agree.
        bins: KL and agreement by position.
        num_same: Number of prompts that the plan by itself answers as the dense model does.
        mean_same_tokens: Mean number of tokens before the plan's own answer differs.
        dense_repetition: Mean share of 4-grams of a dense answer that stood in it before.
        plan_repetition: The same of the plan's own greedy answers.
    """

    source: str
    form: Form
    num_rollouts: int = Field(ge=1)
    num_tokens: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    decode_share: float = Field(ge=0, le=1)
    kl: Bound
    agreement: float
    bins: tuple[PositionBin, ...]
    num_same: int
    mean_same_tokens: float
    dense_repetition: float
    plan_repetition: float
    seen: str = ""


class MarginRow(Strict):
    """One task with right answers: whether it is counted, and what the plan keeps of it.

    Accuracies and shares lie between 0 and 1. The margin is what the dense model is right beyond
    chance; ``margin_kept`` is ``(plan - chance) / (dense - chance)``.

    Attributes:
        metric: ``acc`` or ``acc_norm`` of choices, ``answer`` of completions.
        dense: The dense model's accuracy, with its interval.
        chance: Accuracy of guessing: the mean of 1 / choices; 0 of completions.
        majority: Accuracy of always giving the commonest answer of these examples.
        admitted: Whether the dense model's interval lies above chance and majority.
        reason: Why the task is not counted: not admitted, or seen; empty if it is.
        margin_kept: None of a task that is not admitted.
    """

    task: str
    metric: Literal["acc", "acc_norm", "answer"]
    num_examples: int = Field(ge=1)
    decode_share: float = Field(ge=0, le=1)
    dense: Interval
    plan_accuracy: float
    chance: float
    majority: float
    admitted: bool
    seen: str = ""
    reason: str = ""
    margin_kept: Interval | None = None


class PerplexityRow(Strict):
    """One task of text: how much perplexity the plan loses; ``ratio`` is plan over dense."""

    task: str
    num_tokens: int = Field(ge=1)
    decode_share: float = Field(ge=0, le=1)
    dense: float
    plan: float
    ratio: Interval
    seen: str = ""


class Quality(Strict):
    """The primary end points of a plan: margin kept, and perplexity, on what it has not seen.

    Attributes:
        margins: All tasks with right answers, counted or not.
        macro: Mean margin kept over the counted tasks, which count alike; None without any.
        worst: The counted task that keeps least.
        texts: Perplexity of all tasks of text.
        perplexity_ratio: Geometric mean over the texts that the plan has not seen.
        num_compared: Number of plans that intervals are widened for.
    """

    margins: tuple[MarginRow, ...] = ()
    macro: Interval | None = None
    worst: str | None = None
    texts: tuple[PerplexityRow, ...] = ()
    perplexity_ratio: Interval | None = None
    num_compared: int = 1

    @property
    def counted(self) -> tuple[MarginRow, ...]:
        """The tasks that enter the mean."""
        return tuple(row for row in self.margins if not row.reason)
