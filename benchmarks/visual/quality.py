"""The page of ``visual_quality.py``."""

from __future__ import annotations

from recorder.chart import Chart, Line
from recorder.page import Block
from recorder.record import Record
from recorder.table import Table

from rayapp.evaluation.table import visual_table
from rayapp.evaluation.visual.result import VisualQuality, VisualRow, mean_over_tasks

PAPER = "trimtokenator"


def report(record: Record) -> list[Block]:
    """The page: all methods at all budgets, by question type too, and the gain of the paper's two
    stages.
    """
    comparison = VisualQuality.model_validate(record["comparison"])
    every = visual_table(comparison)
    blocks: list[Block] = [
        _heading(comparison, record["configuration"]["model"]),
        *(f"Not for quotation: {caveat}." for caveat in comparison.caveats),
        _chart(comparison),
        f"**{every.title}**",
        Table(every.columns, every.rows),
        "**By question type (points lost at most, 95 %)**",
        _by_type(comparison),
    ]
    if comparison.stages:
        blocks += ["**Points gained by both stages over one alone (at least, 95 %)**"]
        blocks += [_stages(comparison)]
    if comparison.sweep:
        blocks += [
            "**TrimTokenator by the share of tokens that its first stage lets through** "
            "(0.8 is the default; 1.0 is diversity alone)",
            _sweep(comparison),
        ]
    return blocks


def _heading(comparison: VisualQuality, name: str) -> str:
    least, most = comparison.num_visual_tokens
    tokens = f"{least}" if least == most else f"{least} to {most}"
    total = sum(comparison.num_examples.values())
    split = f" of the {comparison.split} split" if comparison.split else ""
    return (
        f"Which visual tokens are kept: {name}, {comparison.dtype}, {tokens} visual tokens per "
        f"question, {total:,} questions{split} of {len(comparison.num_examples)} types; all blocks "
        "run, all KV kept."
    )


def _mean(row: VisualRow) -> str:
    return f"{row.mean:.1%} ({row.mean_lost.upper:.1f})"


def _by_type(comparison: VisualQuality) -> Table:
    rows = [["dense", "", *(f"{share:.1%}" for share in comparison.dense.values())]]
    rows += [
        [
            row.method,
            str(row.num_keep),
            *(f"{row.exact_match[t]:.1%} ({row.lost[t].upper:.1f})" for t in comparison.dense),
        ]
        for row in comparison.rows
    ]
    counts = (f"{task} (n = {comparison.num_examples[task]:,})" for task in comparison.dense)
    return Table(("method", "kept", *counts), rows)


def _stages(comparison: VisualQuality) -> Table:
    budgets = sorted({each.num_keep for each in comparison.stages}, reverse=True)
    cells = {(s.alone, s.num_keep): f"{s.gain:+.1f} ({s.at_least:+.1f})" for s in comparison.stages}
    names = dict.fromkeys(stage.alone for stage in comparison.stages)
    rows = [[f"{name} alone", *(cells[name, k] for k in budgets)] for name in names]
    return Table(("over", *(f"{k} kept" for k in budgets)), rows)


def _sweep(comparison: VisualQuality) -> Table:
    shares = dict.fromkeys(row.num_aligned for row in comparison.sweep)
    budgets = dict.fromkeys(row.num_keep for row in comparison.sweep)
    cells = {(row.num_keep, row.num_aligned): _mean(row) for row in comparison.sweep}
    rows = [[f"{keep} kept", *(cells.get((keep, s), "-") for s in shares)] for keep in budgets]
    return Table(("share", *(f"{share:g}" for share in shares)), rows)


def _chart(comparison: VisualQuality) -> Chart:
    """Exact match against kept tokens, one line per method."""
    lines = []
    for method in comparison.methods:
        rows = sorted(
            (r for r in comparison.rows if r.method == method), key=lambda row: row.num_keep
        )
        kept, means = [row.num_keep for row in rows], [100 * row.mean for row in rows]
        lines.append(Line(method, kept, means, is_main=method == PAPER))
    dense = 100 * mean_over_tasks(comparison.dense)
    return Chart(
        "Exact match against visual tokens kept",
        x="visual tokens kept per image",
        y="exact match, mean over question types (%)",
        lines=lines,
        level=(f"dense: {dense:.1f} %", dense),
    )
