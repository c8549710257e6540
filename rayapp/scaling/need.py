"""The number of replicas that a pool needs, from the work before it and the work that arrives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from rayapp.scaling.memory import SIGNIFICANT, Level, Rates
from rayapp.scaling.queueing import replicas_in_time
from rayapp.scaling.reports import DecodeReport, PrefillReport
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.work import carried

_BUSY_WAIT = 0.5
_FULL = 0.95
_MARGIN = 3.0
_SHORTEST_S = 0.5
_STEEP = 3.0
_AVERAGED = 1.0
_EVENED = 0.55


@dataclass(frozen=True)
class Need:
    """The replicas that a pool needs, and why.

    A pool grows where it has fewer than ``least``, and then to ``rest``, with which it is at rest:
    the two differ by the margin that keeps it from growing and shrinking in turns. It shrinks to
    ``rest``.
    """

    least: int
    rest: int
    reason: str

    @property
    def grown(self) -> int:
        """The size to which a pool grows that is too small."""
        return max(self.least, self.rest)


def prefill_need(
    reports: Sequence[PrefillReport],
    rates: Rates,
    settings: ScalingSettings,
    *,
    cold_s: float,
    elsewhere_tokens: float = 0.0,
    factor: float = 1.0,
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
        cold_s: Seconds until a replica that starts now works.
        elsewhere_tokens: Prompt tokens that wait in the ingress.
        factor: Replicas that carry work over those that report.
    """
    mean_s = rates.mean_s or _mean_prompt_s(reports)
    slack_s = max(settings.targets.ttft_s - mean_s, _BUSY_WAIT * mean_s)
    token_s = max(report.token_s for report in reports)
    queued_s = factor * sum(report.queued_s for report in reports) + elsewhere_tokens * token_s
    # Work that may wait until a new replica works need not be foreseen.
    late, ahead = 1.0 - settings.attainment, rates.ahead(max(0.0, cold_s - slack_s), settings)

    def in_time(share: float) -> int:
        return replicas_in_time(ahead, mean_s, rates.spread, slack_s, late=share, usage=_FULL)

    ready = factor * len(reports)
    waiting = _for_work(queued_s, rates.fast, ready, cold_s, slack_s)
    rest = max(waiting, in_time(late))
    work = f"{queued_s / ready:.1f} s of work against a target of {slack_s:.1f} s"
    if waiting < rest:
        work = (
            f"{ahead:.2f} s of work arrive per second, and {settings.attainment:.0%} of it may "
            f"wait {slack_s:.1f} s"
        )
    return Need(max(waiting, in_time(_MARGIN * late)), rest, work)


def _for_work(queued_s: float, load: float, ready: float, cold_s: float, slack_s: float) -> int:
    """Replicas for the work that will be too much still once a replica that starts now is ready.

    Args:
        queued_s: Seconds of work that are there.
        load: Seconds of work that arrive per second.
        ready: Replicas that work.
        cold_s: Seconds until a replica that starts now works.
        slack_s: Seconds that work may wait.
    """
    left_s = queued_s + (load - ready) * cold_s
    if min(queued_s, left_s) <= ready * slack_s / 2:
        return 1
    # The rest of it shall be done while as much time passes as work may wait.
    return math.ceil(load + left_s / max(slack_s, _SHORTEST_S) - 1e-9)


def _mean_prompt_s(reports: Sequence[PrefillReport]) -> float:
    count = sum(report.arrived for report in reports)
    return sum(report.arrived_s for report in reports) / count if count else 0.0


def entries_ahead(sizes: Level, num_sequences: float, cold_s: float) -> float:
    """Entries of KV of a sequence once a replica that starts now works.

    They grow on where they grow by more than chance explains: prompts or answers have become
    longer, and a replica will carry fewer of them.

    Args:
        sizes: The mean entries of a sequence, measured over time.
        num_sequences: Number of sequences over which the mean is taken.
        cold_s: Seconds until a replica that starts now works.
    """
    noise = sizes.slow / math.sqrt(max(1.0, num_sequences))
    if sizes.per_s > 0.0 and sizes.fast > sizes.slow + SIGNIFICANT * noise:
        return max(sizes.now, sizes.fast) + sizes.per_s * cold_s
    return sizes.now


def steady_step_s(report: DecodeReport, settings: ScalingSettings, size: float) -> float:
    """Seconds of a step for which a replica is sized, below the TPOT target by a margin.

    Sequences are not equally long, so the steps of one replica take longer than another's. An
    answer meets half of that on average.

    Args:
        report: The report of the replica.
        settings: Targets and limits.
        size: Mean entries of a sequence.
    """
    tpot_s = settings.targets.tpot_s
    batch, _ = carried(report, tpot_s, size)
    uneven_s = report.entry_s * size * math.sqrt(batch)
    late = NormalDist().inv_cdf(settings.attainment)
    return min(settings.usage * tpot_s, tpot_s - _EVENED * late * uneven_s)


def decode_need(
    reports: Sequence[DecodeReport],
    level: Level,
    rates: Rates,
    settings: ScalingSettings,
    *,
    cold_s: float,
    sizes: Level,
) -> Need:
    """Replicas that decode needs so that further tokens come in time.

    A replica carries as many sequences as a step within the TPOT target can have, as its slots, or
    as its pages hold, whichever is least. Independent arrivals make the number of sequences vary by
    its square root, and an answer meets its own stretch of that; a margin is kept for as many
    standard deviations as the share of answers in time asks for.

    Args:
        reports: The reports that are fresh, at least one.
        level: The sequences that run or wait, measured over time.
        rates: The requests that arrived per second, measured over time.
        settings: Targets and limits.
        cold_s: Seconds until a replica that starts now works.
        sizes: The mean entries of a sequence, measured over time.
    """
    # Where sequences become fewer, long ones are left, and nobody as long as they follows.
    each = entries_ahead(sizes, level.now, cold_s) if level.per_s >= 0.0 else sizes.now
    able = [carried(report, steady_step_s(report, settings, each), each) for report in reports]
    capacity = sum(batch for batch, _ in able) / len(able)
    step_s = sum(seconds for _, seconds in able) / len(able)
    number = level.ahead(cold_s)
    if rates.rises and rates.slow > 0.0:
        # Whoever arrives now stays for a while: the number will rise as the arrivals did.
        number = max(number, level.slow * min(rates.ahead(cold_s, settings) / rates.slow, _STEEP))
    spread = NormalDist().inv_cdf(settings.attainment) * _AVERAGED * math.sqrt(number)
    target_s = median(report.answer_tokens for report in reports) * step_s
    work_s = level.now / capacity * target_s / len(reports)
    return Need(
        max(1, math.ceil((number + spread / 2) / capacity - 1e-9)),
        max(1, math.ceil((number + spread) / capacity - 1e-9)),
        f"{work_s:.1f} s of work against a target of {target_s:.1f} s "
        f"({level.now:.0f} sequences, {capacity:.0f} a replica)",
    )
