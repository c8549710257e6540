"""The number of replicas that a pool needs, from the work before it and the work that arrives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rayapp.scaling.memory import Rates
from rayapp.scaling.queueing import replicas_in_time
from rayapp.scaling.reports import DecodeReport, PrefillReport
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.work import carried, entries_each

_BUSY_WAIT = 0.5


@dataclass(frozen=True)
class Need:
    """The replicas that a pool needs, as a number with its fraction, and why.

    ``whole`` is the number that is enough now. ``rest`` is what remains enough with a margin: a
    pool shrinks to it, and no further. Where work can wait until a new replica would be there,
    ``whole`` does not ask for one.
    """

    whole: int
    rest: int
    reason: str


def prefill_need(
    reports: Sequence[PrefillReport],
    rates: Rates,
    settings: ScalingSettings,
    *,
    elsewhere_tokens: float = 0.0,
) -> Need:
    """Replicas that prefill needs so that first tokens come in time.

    A prompt may wait for what is left of the TTFT target after its own prefill. Two things are
    looked at: whether the prompts that keep arriving would wait longer than that (by queueing
    theory), and whether the work that is already there will still be too much once a replica that
    starts now is ready.

    Args:
        reports: The reports that are fresh, at least one.
        rates: The work that arrived per second, measured over time.
        settings: Targets and limits.
        elsewhere_tokens: Prompt tokens that wait in the ingress.
    """
    mean_s = rates.mean_s or _mean_prompt_s(reports)
    slack_s = max(settings.targets.ttft_s - mean_s, _BUSY_WAIT * mean_s)
    token_s = max(report.token_s for report in reports)
    queued_s = sum(report.queued_s for report in reports) + elsewhere_tokens * token_s
    cold_s = cold_start_s([report.start_s for report in reports], settings)
    arriving = _by_arrivals(rates, mean_s, slack_s, cold_s, settings)
    ready = len(reports)
    left_s = queued_s + (rates.fast - ready) * cold_s
    waiting = 0
    if min(queued_s, left_s) > ready * slack_s:
        drain_s = max(slack_s, cold_s)
        waiting = math.ceil(rates.fast + left_s / (drain_s + slack_s) - 1e-9)
    if waiting > arriving:
        return Need(
            waiting,
            waiting,
            f"{queued_s / ready:.1f} s of work against a target of {slack_s:.1f} s",
        )
    return Need(
        arriving,
        arriving,
        f"{rates.fast:.2f} s of prefill arrive per second, {queued_s / ready:.1f} s of work "
        f"against a target of {slack_s:.1f} s",
    )


def _by_arrivals(
    rates: Rates, mean_s: float, slack_s: float, cold_s: float, settings: ScalingSettings
) -> int:
    return replicas_in_time(
        rates.ahead(cold_s, settings),
        mean_s,
        rates.spread,
        slack_s,
        late=1.0 - settings.attainment,
        usage=settings.usage,
    )


def _mean_prompt_s(reports: Sequence[PrefillReport]) -> float:
    count = sum(report.arrived for report in reports)
    return sum(report.arrived_s for report in reports) / count if count else 0.0


def decode_need(reports: Sequence[DecodeReport], rates: Rates, settings: ScalingSettings) -> Need:
    """Replicas that decode needs so that further tokens come in time.

    A replica carries as many sequences as a step within the TPOT target can have, as its slots, or
    as its pages hold, whichever is least. Sequences are counted where they are now, and where the
    arrivals of the last seconds will bring them: a new answer stays for its length.

    Args:
        reports: The reports that are fresh, at least one.
        rates: The sequences that arrived per second, measured over time.
        settings: Targets and limits.
    """
    present = sum(report.rows + report.waiting for report in reports)
    each = entries_each(reports)
    able = [carried(report, settings.targets.tpot_s, each) for report in reports]
    capacity = sum(batch for batch, _ in able) / len(able)
    step_s = sum(seconds for _, seconds in able) / len(able)
    length = median(report.answer_tokens for report in reports)
    cold_s = cold_start_s([report.start_s for report in reports], settings)
    coming = rates.ahead(cold_s, settings) * length * step_s
    target_s = length * step_s
    work_s = present / capacity * target_s
    number = max(present, coming) / capacity
    return Need(
        max(1, math.ceil(number - 1e-9)),
        max(1, math.ceil(number / settings.usage - 1e-9)),
        f"{work_s / len(reports):.1f} s of work against a target of {target_s:.1f} s "
        f"({present:.0f} sequences, {capacity:.0f} a replica)",
    )


def cold_start_s(measured: Sequence[float], settings: ScalingSettings) -> float:
    """Seconds until a new replica works: the median of those measured, else the setting."""
    known = [seconds for seconds in measured if seconds > 0.0]
    return float(median(known)) if known else settings.cold_start_s
