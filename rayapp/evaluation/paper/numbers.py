"""The numbers of outcomes, with sample sizes and, if examples vary, paired bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rayapp.data.published_sets import IN_DOMAIN
from rayapp.evaluation.bootstrap import Bound, Interval, upper_bound
from rayapp.evaluation.measures.margins import Answers, quality_of
from rayapp.evaluation.paper.outcome import NUM_RESAMPLES, DataOutcome, RowOutcome
from rayapp.evaluation.result import MEAN, LatencyResult
from rayapp.evaluation.settings import EvaluationSettings

ACCURACY, MARGIN, PERPLEXITY = "accuracy", "margin kept", "perplexity"
BY_DECODE = "by decode"
ANSWER, TTFT, TPOT = "answer ms", "TTFT ms", "TPOT ms"
WITH_TRANSFER = "answer ms with transfer"
BYTES, TIMED_BYTES = "bytes per request", "bytes of a timed prompt"
ALL_DATA = "all data"
_ANSWERED: dict[str, Literal["acc", "acc_norm", "answer"]] = {
    "acc": "acc",
    "acc_norm": "acc_norm",
    "answer": "answer",
}
"""Metrics that margins are taken of; an exact match needs the end marker too."""


@dataclass(frozen=True)
class Number:
    """One quantity of one row.

    Attributes:
        data: Data set, ``mean``, ``all data``, or batch size.
        metric: The name of the metric; ``by decode`` is the share of the scored tokens that decode
            computed, in per cent.
        num: Number of examples, windows, runs or requests that it rests on.
        dense: The dense model's value.
        plan: The plan's value.
        difference: Points or nats per token lost; for times and bytes, dense over plan.
        bound: One-sided 95 % bound of the difference on its bad side, if there is one.
    """

    data: str
    metric: str
    num: int
    dense: float
    plan: float
    difference: float
    bound: float | None = None


def row_numbers(row: RowOutcome, *, link_gbps: float, seed: int) -> list[Number]:
    """All numbers of a row.

    Args:
        row: The outcome of the row; a unified row sends nothing.
        link_gbps: Link that transfers are reckoned with, in gigabits per second.
        seed: Seed of the resampling.
    """
    numbers = [
        Number(
            name,
            metric.name,
            len(metric.dense),
            metric.dense_value,
            metric.plan_value,
            *_mean_and_bound(metric.lost(seed=seed)),
        )
        for name, data in row.data.items()
        for metric in data.metrics
    ]
    numbers += _shares(row)
    numbers += _mean(row, seed)
    numbers += margins(row, seed=seed)
    for timing in row.latency:
        numbers += _times(timing)
    if row.base is None:
        numbers += _bytes(row)
        numbers += [_with_transfer(t, row, link_gbps) for t in row.latency if t.batch_size == 1]
    return numbers


def _mean_and_bound(bound: Bound) -> tuple[float, float]:
    return bound.mean, bound.upper


def _accuracies(row: RowOutcome) -> dict[str, list[float]]:
    """Points lost per example of every data set that has an accuracy."""
    return {n: d.primary.losses for n, d in _heading(row).items() if d.primary.is_accuracy}


def _heading(row: RowOutcome) -> dict[str, DataOutcome]:
    """The data sets that means are taken over: none of a domain that plans were chosen on."""
    return {name: data for name, data in row.data.items() if not name.endswith(IN_DOMAIN)}


def _shares(row: RowOutcome) -> list[Number]:
    """Shares that decode computed, of every data set with right answers."""
    known = [
        (n, d, 100 * d.decode_share) for n, d in row.data.items() if d.decode_share is not None
    ]
    return [Number(n, BY_DECODE, len(d.primary.dense), s, s, 0.0) for n, d, s in known]


def decode_shares(numbers: Sequence[Number]) -> str:
    """Shares that decode computed in one cell, in the order of the data sets."""
    return ", ".join(f"{n.plan:.0f}" for n in numbers if n.metric == BY_DECODE)


def _mean(row: RowOutcome, seed: int) -> list[Number]:
    """The mean over the data sets that have an accuracy; every data set counts alike."""
    metrics = [d.primary for d in _heading(row).values() if d.primary.is_accuracy]
    if not metrics:
        return []
    lost = upper_bound([m.losses for m in metrics], seed=seed, num_resamples=NUM_RESAMPLES)
    dense = sum(m.dense_value for m in metrics) / len(metrics)
    plan = sum(m.plan_value for m in metrics) / len(metrics)
    return [Number(MEAN, ACCURACY, lost.num_examples, dense, plan, lost.mean, lost.upper)]


def margins(row: RowOutcome, *, seed: int) -> list[Number]:
    """The share of the dense model's margin above chance that a plan keeps, in per cent.

    Data sets that do not count for this row have none. They are admitted, and their mean is taken,
    by :mod:`rayapp.evaluation.measures.margins`. Of ``acc`` and ``acc_norm`` that one counts in
    which dense is better.
    """
    answers = {name: _answers(data) for name, data in row.data.items() if data.chance}
    seen = {name: "calibration domain" for name in answers if name.endswith(IN_DOMAIN)}
    settings = EvaluationSettings(seed=seed, num_resamples=NUM_RESAMPLES)
    quality = quality_of(answers, {}, seen, settings, only_decode=row.only_decode)
    rows = [(each.task, each.margin_kept) for each in quality.margins]
    return [_margin(name, kept) for name, kept in [*rows, (MEAN, quality.macro)] if kept]


def _answers(data: DataOutcome) -> Answers:
    """The answers of a data set, by the metric that dense does best in."""
    kinds = [metric for metric in data.metrics if metric.name in _ANSWERED]
    best = max(kinds, key=lambda metric: metric.dense_value)
    dense, plan = ([bool(value) for value in side] for side in (best.dense, best.plan))
    assert data.decode_share is not None, "outcomes with right answers have one"
    return Answers(_ANSWERED[best.name], dense, plan, data.chance, data.keys, data.decode_share)


def _margin(name: str, kept: Interval) -> Number:
    mean, at_least = 100 * kept.mean, 100 * kept.at_least
    return Number(name, MARGIN, kept.num_examples, 100.0, mean, 100 - mean, 100 - at_least)


def _times(timing: LatencyResult) -> list[Number]:
    # Where decode samples the first token, it waits for the handoff.
    first = timing.ttft_ms("dense"), timing.ttft_ms("plan")
    data, runs, dense, plan = (
        f"batch {timing.batch_size}",
        timing.num_runs,
        timing.dense,
        timing.plan,
    )
    return [
        Number(data, TTFT, runs, *first, first[0] / first[1]),
        Number(data, TPOT, runs, dense.tpot_ms, plan.tpot_ms, timing.tpot_speedup),
        Number(
            data,
            ANSWER,
            runs,
            dense.answer_ms,
            plan.answer_ms,
            timing.speedup,
            timing.speedup_at_least,
        ),
    ]


def _with_transfer(timing: LatencyResult, row: RowOutcome, link_gbps: float) -> Number:
    """A computed time, not a measured one: bytes over bandwidth.

    No transfer is hidden, and round trips are left out.
    """
    dense, plan = (
        answer_ms + 8e-6 * num_bytes / link_gbps
        for answer_ms, num_bytes in zip(
            (timing.dense.answer_ms, timing.plan.answer_ms), row.timed_bytes, strict=True
        )
    )
    return Number("batch 1", WITH_TRANSFER, timing.num_runs, dense, plan, dense / plan)


def _bytes(row: RowOutcome) -> list[Number]:
    num = sum(data.num_prompts for data in row.data.values())
    full = sum(data.bytes_full for data in row.data.values())
    sent = sum(data.bytes_sent for data in row.data.values())
    numbers = [Number(ALL_DATA, BYTES, num, full / num, sent / num, full / sent)] if num else []
    dense, plan = row.timed_bytes
    if plan:
        numbers.append(Number(ALL_DATA, TIMED_BYTES, 1, dense, plan, dense / plan))
    return numbers


def beside_ours(peer: RowOutcome, ours: RowOutcome, *, seed: int) -> Number | None:
    """How many points of mean accuracy a peer loses more than ours, with its 95 % bound.

    Both plans are paired on the same examples, with ours in the place of dense. The result is None
    if no data set of both has an accuracy.
    """
    theirs, mine = _accuracies(peer), _accuracies(ours)
    names = [name for name in theirs if name in mine]
    if not names:
        return None
    less = [_differences(mine[name], theirs[name]) for name in names]
    bound = upper_bound(less, seed=seed, num_resamples=NUM_RESAMPLES)
    return Number(
        MEAN,
        ACCURACY,
        bound.num_examples,
        _mean_plan(ours, names),
        _mean_plan(peer, names),
        -bound.mean,
        -bound.upper,
    )


def _differences(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(mine, theirs, strict=True)]


def _mean_plan(row: RowOutcome, names: Sequence[str]) -> float:
    return sum(row.data[name].primary.plan_value for name in names) / len(names)
