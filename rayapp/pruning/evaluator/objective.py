"""Scores: token values summed per line, and lines combined to one number (EVALUATION, "the score").

Everything here is float64; sums of lines are exact (``fsum``), so neither chunks nor workers change
them.
Shapes: B = lines, C = continuation tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from rayapp.errors import SearchError
from rayapp.models.likelihood import dense_logits, kl_from, kl_top_k, nll, top_k
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.settings.objective import Objective


@dataclass(frozen=True)
class Score:
    """A candidate's score, lower is better, and its parts.

    ``lines`` holds the sums over each line's continuation tokens, for paired comparisons.
    ``num_chunks`` is how many chunks it was scored on. If it lost a race before it ran on all of
    them, ``value`` is an estimate (:mod:`rayapp.pruning.search.racing`), and ``tasks`` cover its
    own chunks only.
    """

    value: float
    tasks: dict[str, float]
    lines: tuple[float, ...] = ()
    seconds: float = 0.0
    num_chunks: int = 0


Reference = tuple[torch.Tensor, ...]
"""The dense model's outputs that candidates are compared with: logits ``(..., V)`` in the model's
element type and three numbers a token (:data:`rayapp.models.likelihood.DenseLogits`), or the
``top_k`` of logits."""


def reference_of(objective: Objective, logits_CV: torch.Tensor) -> Reference:
    """The reference that dense logits make; small if only the likeliest tokens count."""
    if objective.kl_top_k:
        return top_k(logits_CV, objective.kl_top_k)
    return dense_logits(logits_CV)


def token_values(
    objective: Objective,
    reference: Reference | None,
    logits_CV: torch.Tensor,
    token_ids_C: torch.Tensor,
) -> torch.Tensor:
    """The objective at every continuation token, ``(C,)``, float64; any leading shape works."""
    if objective.kind == "nll" or reference is None:
        return nll(logits_CV, token_ids_C)
    if objective.kl_top_k:
        top_CK, ids_CK, others_C = reference
        return kl_top_k((top_CK, ids_CK, others_C), logits_CV)
    dense_CV, norms_C, totals_C, likeliest_C = reference
    return kl_from((dense_CV, norms_C, totals_C, likeliest_C), logits_CV)


def line_sum(objective: Objective, values_C: torch.Tensor) -> float:
    """The sum over one line's continuation tokens, of which the first counts as several."""
    more = objective.first_token_weight - 1
    return float(values_C.sum() + more * values_C[0]) if more else float(values_C.sum())


def combine(
    objective: Objective, calibration: Calibration, sums: Mapping[int, float], *, name: str
) -> Score:
    """One score from the sums of the lines that were scored.

    Args:
        objective: Says how tasks are weighted.
        calibration: Gives the task and the number of continuation tokens of every line.
        sums: Sum over a line's continuation tokens (:func:`line_sum`), by line index.
        name: The candidate's name, for the error.

    Raises:
        SearchError: If a line's sum is not finite.
    """
    broken = [line for line, value in sums.items() if not math.isfinite(value)]
    if broken:
        raise SearchError(
            f"candidate {name} scores {sums[broken[0]]} on calibration line {broken[0] + 1}; "
            "scores must be finite: check the model in its element type (float16 overflows), or "
            "use --dtype float32"
        )
    groups: dict[str, list[int]] = {}
    for line in sorted(sums):
        groups.setdefault(calibration.lines[line].task, []).append(line)
    mean = partial(_mean, objective, calibration, sums)
    tasks = {task: mean(lines) for task, lines in sorted(groups.items())}
    pooled = objective.score_by == "token"
    value = mean(sums) if pooled else math.fsum(tasks.values()) / len(tasks)
    return Score(value, tasks, tuple(sums[line] for line in sorted(sums)))


def _mean(
    objective: Objective,
    calibration: Calibration,
    sums: Mapping[int, float],
    lines: Collection[int],
) -> float:
    tokens = sum(objective.num_counted(len(calibration.lines[line].continuation)) for line in lines)
    return math.fsum(sums[line] for line in lines) / tokens
