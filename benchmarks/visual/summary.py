"""Summaries of both sides' runs: medians, speed-ups with intervals, and shares."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hardware.rates import Rates

from visual.bounds import Work
from visual.runs import PHASES, Times

RESAMPLES = 10_000

TTFT = ("tower", "embed", "prefill")


def ttft_s(times: Times) -> float:
    return sum(times.phases[name] for name in TTFT)


def answer_s(times: Times) -> float:
    return ttft_s(times) + times.phases["decode"]


def prepared_answer_s(times: Times) -> float:
    return times.phases["prepare"] + answer_s(times)


def decode_s(times: Times) -> float:
    return times.phases["decode"]


SPANS: dict[str, Callable[[Times], float]] = {
    "ttft": ttft_s,
    "tpot": decode_s,
    "answer": answer_s,
    "answer_with_preparation": prepared_answer_s,
}


def summarise(
    runs: dict[str, list[Times]], works: dict[str, Work], rates: Rates, num_answer: int
) -> dict[str, Any]:
    """One batch size: milliseconds, speed-ups, and both sides' distances from the bound."""
    bounds = {side: _bounds(work, rates, num_answer) for side, work in works.items()}
    sides = {side: _side(runs[side], bounds[side], num_answer) for side in runs}
    dense_prefill = sides["dense"]["ttft_ms"]
    selection_ms = 1e3 * statistics.median(times.selection_s for times in runs["pruned"])
    speedups = {
        name: {
            **ratio(runs["dense"], runs["pruned"], span),
            **_ratio_of_bounds(bounds, name),
        }
        for name, span in SPANS.items()
    }
    return {
        "sides": sides,
        "speedups": speedups,
        "selection_ms": selection_ms,
        "selection_share_of_dense_ttft": selection_ms / dense_prefill,
        "ttft_operations_ratio": _operations(works["dense"]) / _operations(works["pruned"]),
        "decode_bytes_ratio": works["dense"].decode_step[1] / works["pruned"].decode_step[1],
    }


def ratio(
    dense: Sequence[Times], pruned: Sequence[Times], span: Callable[[Times], float]
) -> dict[str, Any]:
    """The ratio of medians with a 95 % interval and a one-sided bound, from resampled pairs of
    runs.
    """
    dense_N, pruned_N = (np.array([span(times) for times in side]) for side in (dense, pruned))
    index_RN = np.random.default_rng(0).integers(len(dense_N), size=(RESAMPLES, len(dense_N)))
    ratios_R = np.median(dense_N[index_RN], axis=1) / np.median(pruned_N[index_RN], axis=1)
    low, high = np.quantile(ratios_R, [0.025, 0.975])
    return {
        "speedup": float(np.median(dense_N) / np.median(pruned_N)),
        "interval_95": [float(low), float(high)],
        "at_least": float(np.quantile(ratios_R, 0.05, method="lower")),
    }


def _side(runs: Sequence[Times], bound: dict[str, float], num_answer: int) -> dict[str, Any]:
    phases = {
        f"{name}_ms": 1e3 * statistics.median(times.phases[name] for times in runs)
        for name in PHASES
    }
    ttft = statistics.median(map(ttft_s, runs))
    tpot = statistics.median(map(decode_s, runs)) / (num_answer - 1)
    answer = statistics.median(map(answer_s, runs))
    return {
        **phases,
        "ttft_ms": 1e3 * ttft,
        "tpot_ms": 1e3 * tpot,
        "answer_ms": 1e3 * answer,
        "bound_ms": {name: 1e3 * seconds for name, seconds in bound.items()},
        "share_of_bound": {
            name: bound[name] / found
            for name, found in (("ttft", ttft), ("tpot", tpot), ("answer", answer))
        },
        "runs": [{"phases_s": times.phases, "selection_s": times.selection_s} for times in runs],
    }


def _bounds(work: Work, rates: Rates, num_answer: int) -> dict[str, float]:
    return {
        "ttft": work.ttft_s(rates),
        "tpot": work.tpot_s(rates),
        "answer": work.answer_s(rates, num_answer),
    }


def _ratio_of_bounds(bounds: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """The ratio to the device's bound; None for work that is not the device's."""
    if name not in bounds["dense"]:
        return {}
    return {"bound": bounds["dense"][name] / bounds["pruned"][name]}


def _operations(work: Work) -> float:
    return sum(stage[0] for stage in (work.tower, work.selection, work.prefill))
