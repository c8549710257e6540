"""Tables of the primary end points, and of generation."""

from __future__ import annotations

from collections.abc import Sequence

from rayapp.evaluation.bootstrap import Interval
from rayapp.evaluation.cells import NAMELESS, Table
from rayapp.evaluation.quality import MarginRow, PerplexityRow, Quality, RolloutResult
from rayapp.evaluation.result import MEAN


def quality_tables(quality: Quality) -> list[Table]:
    """Margin kept and perplexity on what counts, then what does not count, and why."""
    tables = []
    if quality.counted:
        tables.append(_margins(quality))
    unseen = [text for text in quality.texts if not text.seen]
    if unseen:
        title = "Perplexity of text that the plan has not seen"
        tables.append(_texts(title, unseen, quality.perplexity_ratio))
    if quality.margins:
        tables.append(_admission(quality.margins))
    seen = [text for text in quality.texts if text.seen]
    if seen:
        tables.append(_texts("Perplexity of text that chose or trained the plan", seen, None))
    return tables


def _margins(quality: Quality) -> Table:
    columns = ("task", "n", "dense", "plan", "kept", "95 %", "at least")
    rows = [
        (
            row.task or NAMELESS,
            f"{row.num_examples:,}",
            f"{row.dense.mean:.1%}",
            f"{row.plan_accuracy:.1%}",
            *_kept(row.margin_kept),
        )
        for row in quality.counted
    ]
    if len(rows) > 1:
        count = sum(row.num_examples for row in quality.counted)
        rows.append((MEAN, f"{count:,}", "", "", *_kept(quality.macro)))
    told = f", widened for {quality.num_compared} plans" if quality.num_compared > 1 else ""
    worst = f", worst: {quality.worst or NAMELESS}" if len(rows) > 1 else ""
    return Table(f"Margin above chance that the plan keeps{worst}{told}", columns, tuple(rows))


def _kept(kept: Interval | None) -> tuple[str, str, str]:
    if kept is None:
        return "", "", ""
    return f"{kept.mean:.1%}", _ends(kept, 100, 1), f"{kept.at_least:.1%}"


def _admission(rows: Sequence[MarginRow]) -> Table:
    """Every task's bars: what counts lies above them, and what does not says why."""
    columns = ("task", "metric", "dense, 95 %", "chance", "majority", "by decode")
    cells = tuple(
        (
            (row.task or NAMELESS) + (f" does not count: {row.reason}" if row.reason else ""),
            row.metric,
            _ends(row.dense, 100, 1),
            f"{row.chance:.1%}",
            f"{row.majority:.1%}",
            f"{row.decode_share:.0%}",
        )
        for row in rows
    )
    return Table("Which tasks count", columns, cells)


def _texts(title: str, rows: Sequence[PerplexityRow], mean: Interval | None) -> Table:
    columns = ("text", "tokens", "dense", "plan", "plan/dense", "95 %")
    cells = [
        (
            row.task or NAMELESS,
            f"{row.num_tokens:,}",
            f"{row.dense:.2f}",
            f"{row.plan:.2f}",
            *_ratio(row.ratio),
        )
        for row in rows
    ]
    if mean is not None and len(rows) > 1:
        total = sum(row.num_tokens for row in rows)
        cells.append((MEAN, f"{total:,}", "", "", *_ratio(mean)))
    return Table(title, columns, tuple(cells))


def _ratio(ratio: Interval) -> tuple[str, str]:
    return f"{ratio.mean:.3f}", _ends(ratio, 1, 3)


def _ends(interval: Interval, factor: int, digits: int) -> str:
    """The ends of an interval, multiplied."""
    ends = (factor * interval.lower, factor * interval.upper)
    return " to ".join(f"{end:.{digits}f}" for end in ends)


def rollout_tables(rollouts: Sequence[RolloutResult]) -> list[Table]:
    """Generation: along dense answers, the plan's own answers, and along them by position."""
    along = tuple(
        (
            _named(row),
            f"{row.num_rollouts:,}",
            f"{row.num_tokens:,}",
            f"{row.kl.mean:.4f}",
            f"{row.kl.upper:.4f}",
            f"{row.agreement:.1%}",
        )
        for row in rollouts
    )
    own = tuple(
        (
            _named(row),
            f"{row.num_same:,}",
            f"{row.mean_same_tokens:.1f}",
            f"{row.dense_repetition:.1%}",
            f"{row.plan_repetition:.1%}",
        )
        for row in rollouts
    )
    columns = ("prompts", "n", "tokens", "KL", "at most", "agreement")
    own_columns = ("prompts", "same answers", "tokens alike", "repeated: dense", "plan")
    return [
        Table("Along the dense model's own greedy answers", columns, along),
        Table("The plan's own greedy answers", own_columns, own),
        _bins(rollouts),
    ]


def _bins(rollouts: Sequence[RolloutResult]) -> Table:
    """KL and agreement by position; columns are those of the longest answers."""
    longest = max(rollouts, key=lambda row: len(row.bins)).bins
    names = [f"{b.first}" if b.first == b.last else f"{b.first} to {b.last}" for b in longest]
    rows = tuple(
        (
            _named(row),
            *(f"{b.kl:.3f} {b.agreement:.0%}" for b in row.bins),
            *[""] * (len(longest) - len(row.bins)),
        )
        for row in rollouts
    )
    return Table("KL and agreement by position of the answer token", ("prompts", *names), rows)


def _named(row: RolloutResult) -> str:
    return f"{row.source or NAMELESS}, {row.form}"
