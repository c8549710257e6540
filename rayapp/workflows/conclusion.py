"""What a plan comes to in words: a line that says what it gains, a line that says what it costs.

Every number is a measured one, and two that read alike as they are written count as equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rayapp.evaluation.result import EvaluationResult, TaskResult
from rayapp.plan import STAGES, PruningPlan

_NOTHING_GAINED = "nothing that was measured"
_NOTHING_LOST = "nothing that was measured; no task's exact match falls"


class Conclusion(NamedTuple):
    """What a plan gains and what it costs, one line for each."""

    gained: str
    cost: str


class _Weighed(NamedTuple):
    """A quantity whose less is better: dense over plan, and the words for less and for more."""

    ratio: float
    less: str
    more: str


def conclude(plan: PruningPlan, evaluation: EvaluationResult, ledger: dict[str, Any]) -> Conclusion:
    """What a plan gains and costs, by its evaluation and by the ledger of a service.

    Args:
        plan: The plan that both were measured with.
        evaluation: A finished evaluation with timings.
        ledger: The JSON of ``GET /v1/transfers``.
    """
    gains, costs = list(_blocks_run(plan)), []
    for weighed in _weighed(evaluation, ledger):
        less, more = f"{weighed.ratio:.2f}", f"{1 / weighed.ratio:.2f}"
        if weighed.ratio > 1 and less != "1.00":
            gains.append(weighed.less.format(less))
        if weighed.ratio < 1 and more != "1.00":
            costs.append(weighed.more.format(more))
    gains += _matches_gained(evaluation)
    costs += [*_matches_lost(evaluation), *_likelihood_lost(evaluation)]
    return Conclusion(
        f"Gained: {', '.join(gains) or _NOTHING_GAINED}.",
        f"Cost: {', '.join(costs) or _NOTHING_LOST}.",
    )


def _blocks_run(plan: PruningPlan) -> Iterator[str]:
    if plan.model is None or not any(plan.removed(stage) for stage in STAGES):
        return
    total = plan.model.num_blocks
    prefill, decode = (total - plan.removed(stage) for stage in STAGES)
    yield f"prefill runs {prefill:g} of {total} blocks and decode {decode:g}"


def _weighed(evaluation: EvaluationResult, ledger: dict[str, Any]) -> Iterator[_Weighed]:
    timing = evaluation.latency[0]
    time = ("takes {} times less time", "takes {} times as long")
    yield _Weighed(timing.ttft_speedup, *(f"a prompt {words}" for words in time))
    yield _Weighed(timing.tpot_speedup, *(f"a token {words}" for words in time))
    factor = ledger["totals"]["reduction_factor"]  # None where nothing was sent
    if factor:
        weight = ("weighs {} times less on the wire", "weighs {} times as much on the wire")
        yield _Weighed(factor, *(f"a prompt's KV {words}" for words in weight))


def _matches_gained(evaluation: EvaluationResult) -> Iterator[str]:
    dense, plan = _percent(_mean(evaluation))
    if plan > dense:
        yield f"exact match rises from {dense:g} to {plan:g} % on average"


def _matches_lost(evaluation: EvaluationResult) -> Iterator[str]:
    dense, plan = _percent(_mean(evaluation))
    fallen = [words for _, words in sorted(_fallen(evaluation.tasks), reverse=True)]
    if plan < dense:
        yield f"exact match falls from {dense:g} to {plan:g} % on average"
        if fallen and len(evaluation.tasks) > 1:
            yield f"{'most' if len(fallen) > 1 else 'all of it'} in {fallen[0]}"
    elif fallen:
        yield f"exact match falls in {' and '.join(fallen)}"


def _fallen(tasks: Iterable[TaskResult]) -> Iterator[tuple[float, str]]:
    """How many points a task loses, and its words; of tasks that lose any."""
    for task in tasks:
        dense, plan = _percent(task)
        if plan < dense:
            yield dense - plan, f"{task.task} ({dense:g} to {plan:g})"


def _likelihood_lost(evaluation: EvaluationResult) -> Iterator[str]:
    mean = _mean(evaluation)
    dense, plan = f"{mean.dense_nll:.4f}", f"{mean.plan_nll:.4f}"
    if mean.plan_nll > mean.dense_nll and dense != plan:
        yield f"the answers' NLL rises from {dense} to {plan} nats a token"


def _mean(evaluation: EvaluationResult) -> TaskResult:
    assert evaluation.mean is not None, "a finished evaluation has a mean"
    return evaluation.mean


def _percent(task: TaskResult) -> tuple[float, float]:
    """Exact match, dense and plan, as they are written."""
    return round(100 * task.dense_exact_match, 1), round(100 * task.plan_exact_match, 1)
