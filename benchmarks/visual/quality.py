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
    """All methods at all budgets, by question type too; what the paper's two stages add."""
    found = VisualQuality.model_validate(record["comparison"])
    every = visual_table(found)
    blocks: list[Block] = [
        _heading(found, record["configuration"]["model"]),
        *(f"Not for quotation: {caveat}." for caveat in found.caveats),
        _chart(found),
        f"**{every.title}**",
        Table(every.columns, every.rows),
        "**By question type (points lost at most, 95 %)**",
        _by_type(found),
    ]
    if found.stages:
        blocks += ["**Points gained by both stages over one alone (at least, 95 %)**"]
        blocks += [_stages(found)]
    if found.sweep:
        blocks += [
            "**TrimTokenator by the share of tokens that its first stage lets through** "
            "(0.8 is the default; 1.0 is diversity alone)",
            _sweep(found),
        ]
    return blocks


def _heading(found: VisualQuality, name: str) -> str:
    least, most = found.num_visual_tokens
    tokens = f"{least}" if least == most else f"{least} to {most}"
    total = sum(found.num_examples.values())
    split = f" of the {found.split} split" if found.split else ""
    return (
        f"Which visual tokens are kept: {name}, {found.dtype}, {tokens} visual tokens per "
        f"question, {total:,} questions{split} of {len(found.num_examples)} types; all blocks "
        "run, all KV kept."
    )


def _mean(row: VisualRow) -> str:
    return f"{row.mean:.1%} ({row.mean_lost.upper:.1f})"


def _by_type(found: VisualQuality) -> Table:
    rows = [["dense", "", *(f"{share:.1%}" for share in found.dense.values())]]
    rows += [
        [
            row.method,
            str(row.num_keep),
            *(f"{row.exact_match[t]:.1%} ({row.lost[t].upper:.1f})" for t in found.dense),
        ]
        for row in found.rows
    ]
    counts = (f"{task} (n = {found.num_examples[task]:,})" for task in found.dense)
    return Table(("method", "kept", *counts), rows)


def _stages(found: VisualQuality) -> Table:
    budgets = sorted({each.num_keep for each in found.stages}, reverse=True)
    cells = {(s.alone, s.num_keep): f"{s.gain:+.1f} ({s.at_least:+.1f})" for s in found.stages}
    names = dict.fromkeys(stage.alone for stage in found.stages)
    rows = [[f"{name} alone", *(cells[name, k] for k in budgets)] for name in names]
    return Table(("over", *(f"{k} kept" for k in budgets)), rows)


def _sweep(found: VisualQuality) -> Table:
    shares = dict.fromkeys(row.num_aligned for row in found.sweep)
    budgets = dict.fromkeys(row.num_keep for row in found.sweep)
    cells = {(row.num_keep, row.num_aligned): _mean(row) for row in found.sweep}
    rows = [[f"{keep} kept", *(cells.get((keep, s), "-") for s in shares)] for keep in budgets]
    return Table(("share", *(f"{share:g}" for share in shares)), rows)


def _chart(found: VisualQuality) -> Chart:
    """Exact match against kept tokens, one line per method."""
    lines = []
    for method in found.methods:
        rows = sorted((r for r in found.rows if r.method == method), key=lambda row: row.num_keep)
        kept, means = [row.num_keep for row in rows], [100 * row.mean for row in rows]
        lines.append(Line(method, kept, means, is_main=method == PAPER))
    dense = 100 * mean_over_tasks(found.dense)
    return Chart(
        "Exact match against visual tokens kept",
        x="visual tokens kept per image",
        y="exact match, mean over question types (%)",
        lines=lines,
        level=(f"dense: {dense:.1f} %", dense),
    )
