"""A result as tables of text: the same cells for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from rayapp.evaluation.cells import (
    NAMELESS,
    SPEEDUP,
    Table,
    signed,
)
from rayapp.evaluation.quality_table import quality_tables, rollout_tables
from rayapp.evaluation.result import (
    SIDES,
    ChoiceResult,
    EvaluationResult,
    LatencyResult,
    MeasuredRow,
    StageTimes,
    TaskResult,
    TextResult,
)
from rayapp.evaluation.visual.result import VisualQuality, mean_over_tasks


def tables(result: EvaluationResult) -> tuple[Table, ...]:
    """The tables of a result: quality by kind of example, bytes and, if measured, timings.

    If the model has a caption, it stands in every title.
    """
    tables = quality_tables(result.quality) if result.quality else []
    for seen in (False, True):
        tables += _of_kinds(result, seen=seen)
    tables += _shares(result)
    if result.rollouts:
        tables += rollout_tables(result.rollouts)
    tables.append(_bytes(result))
    if result.latency:
        tables.append(_timings(result.latency))
        linked = [timing for timing in result.latency if timing.link_gbps]
        tables += [_with_handoff(linked)] if linked else []
    of = f" ({result.model_caption})" if result.model_caption else ""
    return tuple(replace(table, title=table.title + of) for table in tables)


def _of_kinds(result: EvaluationResult, *, seen: bool) -> Iterable[Table]:
    """Tables of every kind, of the tasks that the plan has seen or of those that it has not.

    The means stand where most readers look: with what the plan has not seen, if there is any.
    """
    kinds: tuple[tuple[Sequence[Any], Any, Callable[..., Table]], ...] = (
        (result.tasks, result.mean, _quality),
        (result.choices, result.choice_mean, _accuracy),
        (result.texts, result.text_mean, _perplexity),
    )
    for tasks, mean, table in kinds:
        rows = [task for task in tasks if bool(task.seen) == seen]
        if rows:
            with_mean = mean is not None and seen == all(task.seen for task in tasks)
            made = table([*rows, mean] if with_mean else rows)
            title = f"{made.title}, on tasks that chose or trained the plan" if seen else made.title
            yield replace(made, title=title)


def _shares(result: EvaluationResult) -> Iterable[Table]:
    """The share of every task's scored tokens by stage, where that is known."""
    rows = [
        (row.task or NAMELESS, f"{row.num_examples:,}", f"{1 - row.decode_share:.0%}",
         f"{row.decode_share:.0%}")
        for row in (*result.tasks, *result.choices, *result.texts)
        if row.decode_share is not None
    ]  # fmt: skip
    if rows:
        columns = ("task", "n", "by prefill", "by decode")
        yield Table("Scored tokens, by the plan's stage that computed them", columns, tuple(rows))


def markdown(result: EvaluationResult) -> str:
    """All tables of ``result``, and the reasons why they are no claims, as Markdown."""
    parts = [table.markdown() for table in tables(result)]
    notes = [f"- not for quotation: {caveat}" for caveat in result.caveats]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts) + "\n"


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


def _quality(lines: Sequence[TaskResult]) -> Table:
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
            signed(line.points_lost.mean),
            signed(line.points_lost.upper),
        )
        for line in lines
    )
    return Table("Quality: dense beside plan", columns, rows)


def _accuracy(lines: Sequence[ChoiceResult]) -> Table:
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
            signed(line.acc_lost.mean),
            signed(line.acc_lost.upper),
            f"{line.dense_acc_norm:.1%}",
            f"{line.plan_acc_norm:.1%}",
            signed(line.acc_norm_lost.mean),
            signed(line.acc_norm_lost.upper),
        )
        for line in lines
    )
    return Table("Multiple choice: dense beside plan", columns, rows)


def _perplexity(lines: Sequence[TextResult]) -> Table:
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
        for line in lines
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


def _timings(latency: Sequence[LatencyResult]) -> Table:
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
    clock = ", CPU seconds" if any(timing.clock == "cpu" for timing in latency) else ""
    title = f"Speed, without transfer: median of interleaved runs{clock}"
    return Table(title, columns, tuple(rows))


def _with_handoff(latency: Sequence[LatencyResult]) -> Table:
    """Times to the first token and of whole answers, with the KV's way over the named link."""
    columns = ("batch, tokens", "", "KV bytes", "handoff ms", "TTFT ms", "answer ms")
    rows: list[tuple[str, ...]] = []
    for timing in latency:
        what = f"{timing.batch_size}, {timing.num_prompt_tokens}/{timing.num_answer_tokens}"
        for side in SIDES:
            times: StageTimes = getattr(timing, side)
            moments = (timing.handoff_ms(side), timing.ttft_ms(side), timing.whole_ms(side))
            cells = (f"{times.bytes_sent or 0:,}", *(f"{moment:.2f}" for moment in moments))
            rows.append((what, side, *cells))
        ttft, whole = (of("dense") / of("plan") for of in (timing.ttft_ms, timing.whole_ms))
        rows.append((SPEEDUP, "", "", "", f"{ttft:.2f}x", f"{whole:.2f}x"))
    link = latency[0].link_gbps
    return Table(f"Speed with the handoff over {link:g} Gbit/s", columns, tuple(rows))


def _times(times: StageTimes) -> tuple[str, str, str]:
    return f"{times.prefill_ms:.2f}", f"{times.tpot_ms:.3f}", f"{times.answer_ms:.1f}"
