"""Tables of the primary end points, and of generation."""

from __future__ import annotations

from collections.abc import Sequence

from rayapp.evaluation.bootstrap import Interval
from rayapp.evaluation.cells import DECODED, NAMELESS, Table, decoded
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
    refused = [row for row in quality.margins if row.reason]
    if refused:
        tables.append(_refused(refused))
    seen = [text for text in quality.texts if text.seen]
    if seen:
        tables.append(_texts("Perplexity of text that chose or trained the plan", seen, None))
    return tables


def _margins(quality: Quality) -> Table:
    columns = (
        "task",
        "n",
        DECODED,
        "metric",
        "chance",
        "majority",
        "dense (95 %)",
        "plan",
        "margin kept (95 %)",
        "at least",
    )
    rows = [(*_accuracies(row), *_kept(row.margin_kept)) for row in quality.counted]
    if len(rows) > 1:
        worst = f"{MEAN} (worst: {quality.worst})"
        count = sum(row.num_examples for row in quality.counted)
        rows.append((worst, f"{count:,}", *[""] * 6, *_kept(quality.macro)))
    told = f", widened for {quality.num_compared} plans" if quality.num_compared > 1 else ""
    return Table(f"Margin above chance that the plan keeps{told}", columns, tuple(rows))


def _accuracies(row: MarginRow) -> tuple[str, ...]:
    return (
        row.task or NAMELESS,
        f"{row.num_examples:,}",
        decoded(row.decode_share),
        row.metric,
        f"{row.chance:.1%}",
        f"{row.majority:.1%}",
        f"{row.dense.mean:.1%} ({row.dense.lower:.1%} to {row.dense.upper:.1%})",
        f"{row.plan_accuracy:.1%}",
    )


def _kept(kept: Interval | None) -> tuple[str, str]:
    if kept is None:
        return "", ""
    return f"{kept.mean:.1%} ({kept.lower:.1%} to {kept.upper:.1%})", f"{kept.at_least:.1%}"


def _refused(rows: Sequence[MarginRow]) -> Table:
    columns = ("task", "n", DECODED, "metric", "chance", "majority", "dense (95 %)", "plan", "why")
    cells = tuple((*_accuracies(row), row.reason) for row in rows)
    return Table("Tasks that do not count", columns, cells)


def _texts(title: str, rows: Sequence[PerplexityRow], mean: Interval | None) -> Table:
    columns = ("text", "tokens", DECODED, "dense", "plan", "plan / dense (95 %)")
    cells = [
        (
            row.task or NAMELESS,
            f"{row.num_tokens:,}",
            decoded(row.decode_share),
            f"{row.dense:.2f}",
            f"{row.plan:.2f}",
            _ratio(row.ratio),
        )
        for row in rows
    ]
    if mean is not None and len(rows) > 1:
        total = sum(row.num_tokens for row in rows)
        cells.append((MEAN, f"{total:,}", "", "", "", _ratio(mean)))
    return Table(title, columns, tuple(cells))


def _ratio(ratio: Interval) -> str:
    return f"{ratio.mean:.3f} ({ratio.lower:.3f} to {ratio.upper:.3f})"


def rollout_tables(rollouts: Sequence[RolloutResult]) -> list[Table]:
    """Generation along dense answers: a row per source and form, then positions."""
    columns = (
        "prompts",
        "form",
        "n",
        "tokens",
        "KL",
        "agreement",
        "same answers",
        "first difference at",
        "repetition dense",
        "repetition plan",
    )
    rows = tuple(
        (
            row.source or NAMELESS,
            row.form,
            f"{row.num_rollouts:,}",
            f"{row.num_tokens:,}",
            f"{row.kl.mean:.4f}",
            f"{row.agreement:.1%}",
            f"{row.num_same:,}",
            f"{row.mean_same_tokens:.1f}",
            f"{row.dense_repetition:.1%}",
            f"{row.plan_repetition:.1%}",
        )
        for row in rollouts
    )
    return [
        Table("Generation along the dense model's greedy answers", columns, rows),
        _bins(rollouts),
    ]


def _bins(rollouts: Sequence[RolloutResult]) -> Table:
    """KL and agreement by position; columns are those of the longest answers."""
    longest = max(rollouts, key=lambda row: len(row.bins)).bins
    names = [f"{b.first}" if b.first == b.last else f"{b.first} to {b.last}" for b in longest]
    rows = tuple(
        (
            f"{row.source or NAMELESS}, {row.form}",
            *(f"{b.kl:.3f} ({b.agreement:.0%})" for b in row.bins),
            *[""] * (len(longest) - len(row.bins)),
        )
        for row in rollouts
    )
    return Table("KL (agreement) by position of the answer token", ("prompts", *names), rows)
