"""The comparison of visual pruning as Markdown and as a drawing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from rayapp.evaluation.table import visual_table
from rayapp.evaluation.visual.result import VisualQuality, VisualRow, mean_over_tasks

MARKERS = "os^Dv"
PAPER = "trimtokenator"


def markdown(found: VisualQuality, name: str, drawing: str) -> str:
    parts = [_heading(found, name), f"![Exact match against visual tokens kept]({drawing})"]
    parts += [visual_table(found).markdown()]
    parts += ["**By question type (points lost at most, 95 %)**", _by_type(found)]
    if found.stages:
        parts += ["**Points gained by both stages over one alone (at least, 95 %)**"]
        parts += [_stages(found)]
    if found.sweep:
        parts += [
            "**TrimTokenator by the share of tokens that its first stage lets through** "
            "(0.8 is the default; 1.0 is diversity alone)",
            _sweep(found),
        ]
    return "\n\n".join(parts) + "\n"


def _heading(found: VisualQuality, name: str) -> str:
    least, most = found.num_visual_tokens
    tokens = f"{least}" if least == most else f"{least} to {most}"
    total = sum(found.num_examples.values())
    split = f" of the {found.split} split" if found.split else ""
    machine = found.machine
    caveats = "".join(f" Not for quotation: {caveat}." for caveat in found.caveats)
    return (
        f"Which visual tokens are kept: {name}, {found.dtype}, {tokens} visual tokens per "
        f"question, {total:,} questions{split} of {len(found.num_examples)} types; all blocks "
        f"run, all KV kept. {machine.processor}, torch {machine.versions['torch']}, commit "
        f"{machine.commit}, {found.cpu_s:.0f} s of CPU.{caveats}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _mean(row: VisualRow) -> str:
    return f"{row.mean:.1%} ({row.mean_lost.upper:.1f})"


def _by_type(found: VisualQuality) -> str:
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
    return _table(["method", "kept", *counts], rows)


def _stages(found: VisualQuality) -> str:
    budgets = sorted({each.num_keep for each in found.stages}, reverse=True)
    cells = {(s.alone, s.num_keep): f"{s.gain:+.1f} ({s.at_least:+.1f})" for s in found.stages}
    names = dict.fromkeys(stage.alone for stage in found.stages)
    rows = [[f"{name} alone", *(cells[name, k] for k in budgets)] for name in names]
    return _table(["over", *(f"{k} kept" for k in budgets)], rows)


def _sweep(found: VisualQuality) -> str:
    shares = dict.fromkeys(row.num_aligned for row in found.sweep)
    budgets = dict.fromkeys(row.num_keep for row in found.sweep)
    cells = {(row.num_keep, row.num_aligned): _mean(row) for row in found.sweep}
    rows = [[f"{keep} kept", *(cells.get((keep, s), "-") for s in shares)] for keep in budgets]
    return _table(["share", *(f"{share:g}" for share in shares)], rows)


def draw(found: VisualQuality, path: Path) -> None:
    """Exact match against kept tokens, one line per method, named at its right end and in order."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes, colours = figure.subplots(), matplotlib.colormaps["tab20"]
    for number, method in enumerate(found.methods):
        rows = sorted((r for r in found.rows if r.method == method), key=lambda row: row.num_keep)
        axes.plot(
            [row.num_keep for row in rows],
            [100 * row.mean for row in rows],
            marker=MARKERS[number % len(MARKERS)],
            color=colours(number * 2 % 20 + number // 10),
            linewidth=2.4 if method == PAPER else 1.1,
            markersize=5,
            label=method,
        )
    dense = 100 * mean_over_tasks(found.dense)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label=f"dense: {dense:.1f} %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.budgets, [str(budget) for budget in found.budgets])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("visual tokens kept per image")
    axes.set_ylabel("exact match, mean over question types (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": found.model.weights_fingerprint}):
        figure.savefig(path, metadata={"Date": None})
