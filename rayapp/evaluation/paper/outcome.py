"""The outcome of one plan beside the dense model, example by example, kept in its directory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from rayapp.errors import InputError
from rayapp.evaluation.bootstrap import Bound, upper_bound
from rayapp.evaluation.data import EvaluationData, Kind
from rayapp.evaluation.measures.choices import AnsweredQuestions
from rayapp.evaluation.measures.completions import JudgedCompletions
from rayapp.evaluation.measures.margins import Answers
from rayapp.evaluation.measures.perplexity import ScoredWindows
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.pieces.measurer import Measurer
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.sides import Sides
from rayapp.models.architecture import text_config
from rayapp.models.products.joined import named_weights
from rayapp.models.products.packed import PackedLinear
from rayapp.settings import Strict

MetricName = Literal["acc", "acc_norm", "exact match", "answer", "perplexity"]
ROW_FILE = "row.json"
NUM_RESAMPLES = 2_000
"""Number of resamples of every interval in the tables, which are written anew after every row."""


class Metric(Strict):
    """One metric of a data set, per example; all its tasks together, examples counting alike.

    Accuracies are 100 or 0. Perplexity is kept as nats per token, with numbers of tokens as
    ``weights``; without weights, examples count alike.
    """

    name: MetricName
    dense: tuple[float, ...]
    plan: tuple[float, ...]
    weights: tuple[float, ...] = ()

    @property
    def is_accuracy(self) -> bool:
        """Whether values are percentages, and higher is better."""
        return self.name != "perplexity"

    @property
    def dense_value(self) -> float:
        """The dense model's accuracy in per cent, or its perplexity."""
        return self._value(self.dense)

    @property
    def plan_value(self) -> float:
        """The plan's accuracy in per cent, or its perplexity."""
        return self._value(self.plan)

    @property
    def losses(self) -> list[float]:
        """How much worse the plan is, example by example: points, or nats per token."""
        sign = 1.0 if self.is_accuracy else -1.0
        return [sign * (d - p) for d, p in zip(self.dense, self.plan, strict=True)]

    def lost(self, *, seed: int) -> Bound:
        """The plan's mean loss, and its 95 % bound."""
        weights = [self.weights] if self.weights else None
        return upper_bound([self.losses], weights=weights, seed=seed, num_resamples=NUM_RESAMPLES)

    def _value(self, values: Sequence[float]) -> float:
        weights = self.weights or (1.0,) * len(values)
        mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
        return mean if self.is_accuracy else math.exp(mean)


class DataOutcome(Strict):
    """The outcome of a plan on one data set; ``sha256`` is the file's.

    ``num_prompts`` is the number of prompts whose bytes are summed. Of examples with right answers,
    ``chance`` is the probability of guessing right, and ``keys`` are the right answers as numbers,
    by what an answer without looking at the question would be. ``decode_share`` is the share of the
    scored tokens that decode computed.
    """

    sha256: str
    kind: Kind
    metrics: tuple[Metric, ...]
    num_prompts: int
    min_prompt_tokens: int
    bytes_full: int
    bytes_sent: int
    num_left_out: int = 0
    chance: tuple[float, ...] = ()
    keys: tuple[tuple[int, ...], ...] = ()
    decode_share: float | None = None

    @property
    def primary(self) -> Metric:
        """The metric that enters the mean: ``acc``, exact match or perplexity."""
        return self.metrics[0]


class SearchCost(Strict):
    """The cost of the search for a plan."""

    evaluations: int
    seconds: float
    score: float


class WeightBytes(Strict):
    """Parameter bytes of a replica, tied ones once; unified counts the blocks of either stage."""

    prefill: int
    decode: int
    unified: int

    @classmethod
    def of(cls, sides: Sides) -> WeightBytes:
        """The bytes of both stages' models of a plan."""
        stages = [_weights(stage.model) for stage in (sides.plan.prefill, sides.plan.decode)]
        prefill, decode, unified = (
            sum(each.numel() * each.element_size() for each in tensors.values())
            for tensors in (*stages, stages[0] | stages[1])
        )
        return cls(prefill=prefill, decode=decode, unified=unified)


def _weights(model: Any) -> dict[int, torch.Tensor]:
    """Weights by identity, without the packed copy of a head that is tied to the embeddings."""
    head, is_tied = model.get_output_embeddings(), text_config(model.config).tie_word_embeddings
    weights = {id(tensor): tensor for _, tensor in named_weights(model)}
    if is_tied and isinstance(head, PackedLinear):
        del weights[id(head.packed)]
    return weights


class RowOutcome(Strict):
    """All measurements of one row.

    ``only_decode`` says whether the plan changes decode alone. ``timed_bytes`` are the bytes that
    the dense model and the plan send of a prompt of the timed length. ``tokens`` of both sides were
    evaluated in ``seconds``. ``base`` names the row whose plan and numbers a unified row shares.
    """

    name: str
    plan: str
    prefill_removed: float
    decode_removed: float
    only_decode: bool = False
    search: SearchCost | None = None
    data: dict[str, DataOutcome] = Field(default_factory=dict)
    latency: tuple[LatencyResult, ...] = ()
    timed_bytes: tuple[int, int] = (0, 0)
    weights: WeightBytes | None = None
    tokens: int = 0
    seconds: float = 0.0
    base: str | None = None

    def save(self, directory: Path) -> None:
        """Write the outcome into the row's directory, complete or not at all."""
        target = directory / ROW_FILE
        temporary = target.with_suffix(".tmp")
        temporary.write_text(self.model_dump_json() + "\n", encoding="utf-8")
        temporary.replace(target)

    @classmethod
    def load(cls, directory: Path) -> RowOutcome | None:
        """The outcome in a row's directory; None if nothing was measured yet.

        Raises:
            InputError: The file is no outcome.
        """
        file = directory / ROW_FILE
        if not file.is_file():
            return None
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError):
            raise InputError(
                f"{file}: is not what a reproduction writes; delete it to measure the row again"
            ) from None


def measure_data(measurer: Measurer, name: str, data: EvaluationData) -> DataOutcome:
    """Measure a data set of one kind on both sides; its tasks count together."""
    groups: list[JudgedCompletions | AnsweredQuestions | ScoredWindows] = [
        *(measurer.completions(_label(name, t), lines) for t, lines in data.completions.items()),
        *(measurer.choices(_label(name, t), questions) for t, questions in data.choices.items()),
        *(measurer.texts(_label(name, t), windows) for t, windows in data.texts.items()),
    ]
    sent = PromptBytes.total(group.sent for group in groups)
    lengths = [length for group in groups for length in _prompt_lengths(group)]
    by_group = [_metrics(group) for group in groups]
    return DataOutcome(
        sha256=data.files[0].sha256,
        kind=kind_of_data(data),
        metrics=tuple(_joined(metrics) for metrics in zip(*by_group, strict=True)),
        num_prompts=len(lengths),
        min_prompt_tokens=min(lengths),
        bytes_full=sent.bytes_full,
        bytes_sent=sent.bytes_sent,
        num_left_out=sum(windows.num_left_out for windows in data.texts.values()),
        **_guesses(groups),
    )


def _guesses(
    groups: Sequence[JudgedCompletions | AnsweredQuestions | ScoredWindows],
) -> dict[str, Any]:
    """Chances, keys and shares of all tasks together; none of texts, which have no answers."""
    answers = [
        Answers.of_choices(group, "acc")
        if isinstance(group, AnsweredQuestions)
        else Answers.of_completions(group)
        for group in groups
        if not isinstance(group, ScoredWindows)
    ]
    if not answers:
        return {}
    counts = [len(each.dense) for each in answers]
    shares = [each.decode_share * count for each, count in zip(answers, counts, strict=True)]
    return {
        "chance": tuple(chance for each in answers for chance in each.chance),
        "keys": tuple(
            _numbered([key for keys in kinds for key in keys])
            for kinds in zip(*(each.keys for each in answers), strict=True)
        ),
        "decode_share": math.fsum(shares) / sum(counts),
    }


def _numbered(keys: Sequence[Hashable]) -> tuple[int, ...]:
    """Keys as numbers, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def kind_of_data(data: EvaluationData) -> Kind:
    """The only kind of a data set's lines."""
    if data.completions:
        return "completions"
    return "choices" if data.choices else "texts"


def _label(name: str, task: str) -> str:
    return f"{name} {task}" if task else name


def _metrics(group: JudgedCompletions | AnsweredQuestions | ScoredWindows) -> list[Metric]:
    if isinstance(group, JudgedCompletions):
        sides = (group.dense, group.plan)
        return [
            _accuracy("exact match", *([a.is_match for a in side] for side in sides)),
            _accuracy("answer", *([a.begins for a in side] for side in sides)),
        ]
    if isinstance(group, AnsweredQuestions):
        kinds: tuple[tuple[MetricName, bool], ...] = (("acc", False), ("acc_norm", True))
        return [
            _accuracy(name, *(group.right(s, by_character=norm) for s in (group.dense, group.plan)))
            for name, norm in kinds
        ]
    likelihoods = group.likelihoods
    return [
        Metric(
            name="perplexity",
            dense=tuple(sums.dense_nll / sums.num_tokens for sums in likelihoods),
            plan=tuple(sums.plan_nll / sums.num_tokens for sums in likelihoods),
            weights=tuple(group.num_tokens),
        )
    ]


def _accuracy(name: MetricName, dense: Sequence[bool], plan: Sequence[bool]) -> Metric:
    return Metric(name=name, dense=_percent(dense), plan=_percent(plan))


def _percent(right: Sequence[bool]) -> tuple[float, ...]:
    return tuple(100.0 * is_right for is_right in right)


def _joined(metrics: Sequence[Metric]) -> Metric:
    """One metric, joined over several tasks."""
    return Metric(
        name=metrics[0].name,
        dense=tuple(value for metric in metrics for value in metric.dense),
        plan=tuple(value for metric in metrics for value in metric.plan),
        weights=tuple(weight for metric in metrics for weight in metric.weights),
    )


def _prompt_lengths(
    group: JudgedCompletions | AnsweredQuestions | ScoredWindows,
) -> list[int]:
    if isinstance(group, AnsweredQuestions):
        return [len(question.prompt) for question in group.questions]
    lines = group.lines if isinstance(group, JudgedCompletions) else group.windows.lines
    return [len(line.prompt) for line in lines]
