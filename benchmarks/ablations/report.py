"""The page of ``ablation.py``: rows of all models, and the pieces that help in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recorder.dots import Dots, Marks, Panel
from recorder.origin import threads
from recorder.page import Block
from recorder.record import Record
from recorder.table import Table

Row = Mapping[str, Any]
SIZES = ("calibration_per_task", "heal_per_task", "fresh_per_task", "runs", "seeds")
"""Options that say how many examples were measured."""

COLUMNS: dict[str, tuple[str, str]] = {
    "kl": ("KL", "{:.4f}"),
    "kl_lowest": ("lowest", "{:.4f}"),
    "kl_highest": ("highest", "{:.4f}"),
    "mean_lost": ("points lost, mean of tasks", "{:.1f}"),
    "worst_lost": ("in the worst task", "{:.1f}"),
    "worst_lost_upper": ("upper bound", "{:.1f}"),
    "speedup": ("speed-up", "{:.2f}x"),
    "tpot_speedup": ("decode", "{:.2f}x"),
    "ttft_speedup": ("prefill", "{:.2f}x"),
    "reduction": ("fewer bytes", "{:.2f}x"),
    "evaluations": ("evaluations", "{:.0f}"),
    "search_s": ("search s", "{:.0f}"),
    "unified_speedup": ("no transfer (unified)", "{:.2f}x"),
    "speedup_1_gbit": ("1 Gbit/s", "{:.2f}x"),
    "speedup_10_gbit": ("10 Gbit/s", "{:.2f}x"),
    "speedup_100_gbit": ("100 Gbit/s", "{:.2f}x"),
    "codec_dense_ms": ("packing dense KV, ms", "{:.2f}"),
    "codec_plan_ms": ("packing the plan's, ms", "{:.2f}"),
    "transfer_share_1_gbit": ("dense transfer's share at 1 Gbit/s", "{:.1%}"),
    "dense": ("dense", "{:,.0f}"),
    "prefill": ("prefill replica", "{:,.0f}"),
    "decode": ("decode replica", "{:,.0f}"),
    "unified": ("unified replica", "{:,.0f}"),
}
"""Headings and formats of the columns, in their order; a row need not have all of them."""

DRAWN = {
    "methods": "Search methods",
    "spaces": "What may be removed together",
    "healing": "Healing",
    "transfer": "Which KV travels",
}
"""Studies of the picture: in each of them a table would have more rows than an eye takes in."""

KL_TICKS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)

TITLES = {
    "spaces": "What may be removed together",
    "healing": "Healing",
    "transfer": "Which KV travels (same block plan, prompts of 128 to 400 tokens)",
    "end_to_end": "End to end: prompt to last token with the transfer, over dense",
    "domains": "What the search is calibrated on",
    "channels": "Blocks or MLP channels, as many parameters",
    "memory": "Parameter bytes of a replica",
    "methods": "Search methods, each with its own budget, mean over calibration sets and seeds",
}


def report(record: Record) -> list[Block]:
    """The page, study by study, with the models below each other."""
    models, asked = record["models"], record["configuration"]
    sizes = ", ".join(f"{key.replace('_', ' ')} {asked[key]}" for key in SIZES)
    num_threads = threads(record["machine"]["num_threads"])
    blocks: list[Block] = [
        f"Two of twelve blocks removed from each stage, {len(models)} models "
        f"({', '.join(models)}); {sizes}. float32 (bytes: bf16), {num_threads}. KL in nats per "
        "token and points of exact match lost are on fresh examples, tasks weighing alike; "
        "speed-ups are 128 tokens in, 64 out, batch 1 where nothing else is said.",
        *picture(models),
    ]
    for study, title in TITLES.items():
        present = {model: studies[study] for model, studies in models.items() if study in studies}
        if present:
            blocks += [f"## {title}", table(present), *ordering(present)]
    return blocks


def picture(models: Mapping[str, Mapping[str, Sequence[Row]]]) -> list[Block]:
    """KL of every row of the studies that many rows belong to, a mark per model."""
    panels = []
    for study, title in DRAWN.items():
        present = {model: studies[study] for model, studies in models.items() if study in studies}
        if present:
            marks = [
                Marks(model, [row["kl"] for row in rows], [row["name"] for row in rows])
                for model, rows in present.items()
            ]
            names = dict.fromkeys(row["name"] for rows in present.values() for row in rows)
            x = "KL to the dense model, nats per token; further left is better"
            panels.append(Panel(title, x, marks, tuple(names), x_ticks=KL_TICKS, is_log=True))
    return [Dots("KL to the dense model, row by row and model by model", panels)] if panels else []


def table(present: Mapping[str, Sequence[Row]]) -> Table:
    """One table for all models of a study."""
    used = [c for c in COLUMNS if any(c in row for rows in present.values() for row in rows)]
    rows = [
        (model, row["name"], *(COLUMNS[c][1].format(row[c]) if c in row else "" for c in used))
        for model, rows in present.items()
        for row in rows
    ]
    return Table(("model", "", *(COLUMNS[c][0] for c in used)), rows)


def ordering(present: Mapping[str, Sequence[Row]]) -> list[str]:
    """The rows that rank alike by KL in every model, as sentences."""
    named = [{row["name"]: row["kl"] for row in rows if "kl" in row} for rows in present.values()]
    if len(named) < 2 or not all(named):
        return []
    common = [name for name in named[0] if all(name in each for each in named)]
    facts = [
        f"`{a}` below `{b}`"
        for a in common
        for b in common
        if a != b and all(each[a] < each[b] * 0.99 for each in named)
    ]
    listed = "; ".join(facts) or "none"
    return [f"KL lower by more than 1 % in all {len(named)}: {listed}."]
