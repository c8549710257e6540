"""The work of decode in seconds, as routing and scaling count it."""

from __future__ import annotations

from collections.abc import Sequence

from rayapp.scaling.reports import DecodeReport, Standing
from rayapp.scaling.routing import Errand

_UNMET = 1.5
_PAGES_USED = 0.9


def carried(report: DecodeReport, tpot_s: float, entries_each: float) -> tuple[float, float]:
    """The sequences that a replica carries within a target, and the seconds of their step.

    A target that one sequence alone misses is met by no number of replicas; then half again the
    step of one sequence is the limit.

    Args:
        report: The report of the replica.
        tpot_s: Longest time per token, seconds.
        entries_each: Mean number of entries of KV of a sequence.
    """
    limit_s = max(tpot_s, _UNMET * report.cost.seconds(1, entries_each))
    batch = min(report.max_rows, report.cost.largest_batch(limit_s, entries_each))
    if entries_each > 0.0:
        batch = min(batch, _PAGES_USED * report.max_entries / entries_each)
    batch = max(1.0, float(batch))
    return batch, report.cost.seconds(batch, batch * entries_each)


def entries_each(reports: Sequence[DecodeReport]) -> float:
    """Mean number of entries of KV of a running sequence; 0 if none runs."""
    rows = sum(report.rows for report in reports)
    return sum(report.entries for report in reports) / rows if rows else 0.0


def decode_work_s(report: DecodeReport, tpot_s: float) -> float:
    """Seconds in which a replica would end the sequences that it has, half done on average."""
    batch, step_s = carried(report, tpot_s, entries_each([report]))
    return (report.rows / 2 + report.waiting) / batch * report.answer_tokens * step_s


def answer_lasts_s(report: DecodeReport, tpot_s: float) -> float:
    """Seconds that an answer of usual length takes in a full batch."""
    return report.answer_tokens * carried(report, tpot_s, entries_each([report]))[1]


def decode_wait_s(report: DecodeReport) -> float:
    """Seconds until a decode replica would have room for one more sequence, by forecast."""
    each = entries_each([report])
    limit = max(1.0, report.max_rows)
    if each > 0.0:
        limit = max(1.0, min(limit, _PAGES_USED * report.max_entries / each))
    excess = report.rows + report.waiting + 1.0 - limit
    step_s = report.cost.seconds(limit, limit * each)
    return max(0.0, excess) / limit * report.answer_tokens * step_s


def decode_errand(reports: Sequence[DecodeReport], tpot_s: float) -> Errand:
    """The work of one more sequence, for the router."""
    if not reports:
        return Errand()
    each = entries_each(reports)
    batch, step_s = carried(reports[0], tpot_s, each)
    return Errand(reports[0].answer_tokens * step_s / batch)


def decode_standing(report: DecodeReport, tpot_s: float, at_s: float, num_failed: int) -> Standing:
    """The standing of a decode replica, for the router.

    Args:
        report: The report of the replica.
        tpot_s: Longest time per token, seconds.
        at_s: The present Unix time.
        num_failed: Steps that failed one after the other.
    """
    return Standing(
        at_s=at_s,
        work_s=decode_work_s(report, tpot_s),
        token_s=0.0,
        errand_s=decode_errand([report], tpot_s).work_s,
        num_failed=num_failed,
        lasts_s=answer_lasts_s(report, tpot_s),
        wait_s=decode_wait_s(report),
        step_s=present_step_s(report),
    )


def present_step_s(report: DecodeReport) -> float:
    """Seconds of a step of the sequences that a replica runs; 0 where none run."""
    return report.cost.seconds(report.rows, report.entries) if report.rows else 0.0
