"""A result as tables of text: the same cells for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from rich.table import Table as RichTable

from rayapp.evaluation.result import (
    MEAN,
    ChoiceResult,
    EvaluationResult,
    LatencyResult,
    MeasuredRow,
    StageTimes,
    TaskResult,
    TextResult,
)
from rayapp.evaluation.visual.result import VisualQuality, mean_over_tasks

NAMELESS = "(no task)"
SPEEDUP = "speed-up"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table under its title in bold."""
        rule = ("---", *("---:" for _ in self.columns[1:]))
        lines = [self.columns, rule, *self.rows]
        cells = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
        ]
        return "\n".join([f"**{self.title}**", "", *cells])

    def rich(self) -> RichTable:
        """The table as rich draws it on a terminal."""
        table = RichTable(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            justify: Literal["left", "right"] = "right" if index else "left"
            table.add_column(column, justify=justify, overflow="ellipsis" if index else "fold")
        for row in self.rows:
            table.add_row(*row, style="bold" if row[0] in (MEAN, SPEEDUP) else None)
        return table


def tables(result: EvaluationResult) -> tuple[Table, ...]:
    """The tables of a result: quality by kind of example, bytes and, if measured, timings.

    If the model has a caption, it stands in every title.
    """
    tables = [_quality(result)] if result.tasks else []
    if result.choices:
        tables.append(_accuracy(result.choices, result.choice_mean))
    if result.texts:
        tables.append(_perplexity(result.texts, result.text_mean))
    tables.append(_bytes(result))
    if result.latency:
        tables.append(_timings(result.latency))
    of = f" ({result.model_caption})" if result.model_caption else ""
    return tuple(replace(table, title=table.title + of) for table in tables)


def markdown(result: EvaluationResult) -> str:
    """All tables of ``result``, and the reasons why they are no claims, as Markdown."""
    parts = [table.markdown() for table in tables(result)]
    notes = [f"- not for quotation: {caveat}" for caveat in result.caveats]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts) + "\n"


def _lines(result: EvaluationResult) -> Iterable[TaskResult]:
    return (*result.tasks, result.mean) if result.mean else result.tasks


def _all_lines(result: EvaluationResult) -> Iterable[MeasuredRow]:
    """Rows of all kinds of example; a kind's mean comes below its tasks."""
    kinds: tuple[tuple[Iterable[MeasuredRow], MeasuredRow | None], ...] = (
        (result.tasks, result.mean),
        (result.choices, result.choice_mean),
        (result.texts, result.text_mean),
    )
    for tasks, mean in kinds:
        yield from tasks
        if mean:
            yield mean


def _quality(result: EvaluationResult) -> Table:
    columns = (
        "task",
        "n",
        "NLL dense",
        "NLL plan",
        "KL",
        "exact dense",
        "exact plan",
        "points lost",
        "at most (95 %)",
    )
    rows = tuple(
        (
            line.task or NAMELESS,
            f"{line.num_examples:,}",
            f"{line.dense_nll:.4f}",
            f"{line.plan_nll:.4f}",
            f"{line.kl.mean:.4f}",
            f"{line.dense_exact_match:.1%}",
            f"{line.plan_exact_match:.1%}",
            _signed(line.points_lost.mean),
            _signed(line.points_lost.upper),
        )
        for line in _lines(result)
    )
    return Table("Quality: dense beside plan", columns, rows)


def _accuracy(tasks: tuple[ChoiceResult, ...], mean: ChoiceResult | None) -> Table:
    columns = (
        "task",
        "n",
        "acc dense",
        "acc plan",
        "points lost",
        "at most (95 %)",
        "acc_norm dense",
        "acc_norm plan",
        "points lost",
        "at most (95 %)",
    )
    rows = tuple(
        (
            line.task or NAMELESS,
            f"{line.num_examples:,}",
            f"{line.dense_acc:.1%}",
            f"{line.plan_acc:.1%}",
            _signed(line.acc_lost.mean),
            _signed(line.acc_lost.upper),
            f"{line.dense_acc_norm:.1%}",
            f"{line.plan_acc_norm:.1%}",
            _signed(line.acc_norm_lost.mean),
            _signed(line.acc_norm_lost.upper),
        )
        for line in ((*tasks, mean) if mean else tasks)
    )
    return Table("Multiple choice: dense beside plan", columns, rows)


def _perplexity(tasks: tuple[TextResult, ...], mean: TextResult | None) -> Table:
    columns = (
        "task",
        "windows",
        "tokens scored",
        "window (prompt)",
        "perplexity dense",
        "perplexity plan",
        "NLL lost",
        "at most (95 %)",
        "KL",
    )
    rows = tuple(
        (
            line.task or NAMELESS,
            f"{line.num_examples:,}",
            f"{line.num_tokens:,}",
            f"{line.num_window_tokens:,} ({line.max_prompt_tokens:,})",
            f"{line.dense_perplexity:.4f}",
            f"{line.plan_perplexity:.4f}",
            f"{line.nll_lost.mean:.4f}",
            f"{line.nll_lost.upper:.4f}",
            f"{line.kl.mean:.4f}",
        )
        for line in ((*tasks, mean) if mean else tasks)
    )
    return Table("Perplexity: dense beside plan", columns, rows)


def _bytes(result: EvaluationResult) -> Table:
    """The table of bytes; savings by visual pruning have a column if there are any."""
    lines = list(_all_lines(result))
    prunes = any(line.saved_by_visual_tokens_bytes for line in lines)
    columns = (
        *("task", "prompt tokens", "bytes full", "bytes sent", "of it overhead"),
        *(["saved by visual pruning"] * prunes),
        "reduction",
    )
    rows = tuple(
        (
            line.task or NAMELESS,
            f"{line.min_prompt_tokens}-{line.max_prompt_tokens}",
            f"{line.bytes_full / line.num_examples:,.0f}",
            f"{line.bytes_sent / line.num_examples:,.0f}",
            f"{line.overhead_bytes / line.num_examples:,.0f}",
            *([f"{line.saved_by_visual_tokens_bytes / line.num_examples:,.0f}"] * prunes),
            f"{line.reduction:.2f}x",
        )
        for line in lines
    )
    return Table(f"KV per request ({result.dtype})", columns, rows)


def visual_table(quality: VisualQuality) -> Table:
    """Every method at every budget; tasks count alike."""
    budgets = sorted(quality.budgets, reverse=True)
    kept = {(row.method, row.num_keep): row for row in quality.rows}
    dense = f"{mean_over_tasks(quality.dense):.1%}"
    rows = [("dense", *[dense] * len(budgets))]
    for method in quality.methods:
        cells = (kept[method, budget] for budget in budgets)
        rows.append((method, *(f"{c.mean:.1%} ({c.mean_lost.upper:.1f})" for c in cells)))
    columns = ("method", *(f"{budget} kept" for budget in budgets))
    return Table("Exact match, mean over tasks (points lost at most, 95 %)", columns, tuple(rows))


def _timings(latency: Iterable[LatencyResult]) -> Table:
    """Three rows per batch size: dense, plan, and dense over plan."""
    columns = ("batch, tokens, runs", "", "prefill ms", "decode ms/token", "answer ms")
    rows: list[tuple[str, ...]] = []
    for timing in latency:
        of_image = f" ({timing.num_image_tokens} of an image)" if timing.num_image_tokens else ""
        tokens = f"{timing.num_prompt_tokens} in{of_image}, {timing.num_answer_tokens} out"
        what = f"{timing.batch_size}, {tokens}, {timing.num_runs}"
        rows += [(what, "dense", *_times(timing.dense)), (what, "plan", *_times(timing.plan))]
        ratios = (timing.ttft_speedup, timing.tpot_speedup, timing.speedup)
        rows.append((SPEEDUP, "", *(f"{ratio:.2f}x" for ratio in ratios)))
    return Table("Speed, without transfer: median of interleaved runs", columns, tuple(rows))


def _times(times: StageTimes) -> tuple[str, str, str]:
    return f"{times.prefill_ms:.2f}", f"{times.tpot_ms:.3f}", f"{times.answer_ms:.1f}"


def _signed(points: float) -> str:
    """Percentage points with their sign; zero has none."""
    return f"{points:+.2f}" if round(points, 2) else "0.00"
