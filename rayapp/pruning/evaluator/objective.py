"""Scores: token values summed per line, and lines combined to one number (EVALUATION, "the score").

Everything here is float64; sums of lines are exact (``fsum``), so neither chunks nor workers change
them.
Shapes: B = lines, C = continuation tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rayapp.errors import SearchError
from rayapp.models.likelihood import kl, kl_top_k, log_softmax64, nll, top_k
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.settings.objective import Objective

_SLICE_ELEMENTS = 1 << 22  # Number of logits that are float64 at one time: 32 MB per copy.


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
"""The dense model's outputs that candidates are compared with: log-probabilities and probabilities,
float64; if these would be large, logits ``(B, C, V)``; or the ``top_k`` of logits."""


def reference_of(objective: Objective, logits_BCV: torch.Tensor) -> Reference:
    """The reference that dense logits make; bounded in size if only the likeliest tokens count."""
    if not objective.kl_top_k and logits_BCV.numel() <= _SLICE_ELEMENTS:
        logprobs_BCV = log_softmax64(logits_BCV)
        return logprobs_BCV, logprobs_BCV.exp()
    if not objective.kl_top_k:
        return (logits_BCV,)
    slices = [top_k(logits_BCV[rows], objective.kl_top_k) for rows in _slices(logits_BCV)]
    return tuple(torch.cat(parts) for parts in zip(*slices, strict=True))


def token_values(
    objective: Objective,
    reference: Reference | None,
    logits_BCV: torch.Tensor,
    token_ids_BC: torch.Tensor,
) -> torch.Tensor:
    """The objective at every continuation token, ``(B, C)``, float64; slices bound memory."""
    token_ids_BC = token_ids_BC.to(logits_BCV.device)
    parts = []
    for rows in _slices(logits_BCV):
        if objective.kind == "nll" or reference is None:
            parts.append(nll(logits_BCV[rows], token_ids_BC[rows]))
        elif objective.kl_top_k:
            top_BCK, ids_BCK, others_BC = (tensor[rows] for tensor in reference)
            parts.append(kl_top_k((top_BCK, ids_BCK, others_BC), logits_BCV[rows]))
        elif len(reference) == 2:
            logprobs_BCV, probs_BCV = (tensor[rows] for tensor in reference)
            gaps_BCV = logprobs_BCV - log_softmax64(logits_BCV[rows])
            parts.append((probs_BCV * gaps_BCV).sum(dim=-1))
        else:
            parts.append(kl(reference[0][rows], logits_BCV[rows]))
    return torch.cat(parts)


def _slices(logits_BCV: torch.Tensor) -> list[slice]:
    step = max(1, _SLICE_ELEMENTS // logits_BCV[0].numel())
    return [slice(start, start + step) for start in range(0, len(logits_BCV), step)]


def combine(
    objective: Objective, calibration: Calibration, sums: Mapping[int, float], *, name: str
) -> Score:
    """One score from the sums of the lines that were scored.

    Args:
        objective: Says how tasks are weighted.
        calibration: Gives the task and the number of continuation tokens of every line.
        sums: Sum over a line's continuation tokens, by line index.
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
    tasks = {task: _mean(calibration, sums, lines) for task, lines in sorted(groups.items())}
    pooled = objective.score_by == "token"
    value = _mean(calibration, sums, sums) if pooled else math.fsum(tasks.values()) / len(tasks)
    return Score(value, tasks, tuple(sums[line] for line in sorted(sums)))


def _mean(
    calibration: Calibration, sums: Mapping[int, float], lines: Sequence[int] | Mapping[int, float]
) -> float:
    tokens = sum(len(calibration.lines[line].continuation) for line in lines)
    return math.fsum(sums[line] for line in lines) / tokens
