"""The rows of all models as Markdown, and in how many of them a piece helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayapp.evaluation.machine import Machine

Row = Mapping[str, Any]

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
"""What a row may hold, in the order of the columns: heading and format."""

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


def markdown(
    models: Mapping[str, Mapping[str, Sequence[Row]]],
    configuration: Mapping[str, Any],
    machine: Machine,
) -> str:
    """Study by study, the models below each other."""
    commits = {row["commit"] for each in models.values() for rows in each.values() for row in rows}
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in configuration.items())
    parts = [
        f"Two of twelve blocks removed from each stage, {len(models)} models "
        f"({', '.join(models)}); {told}. float32 (bytes: bf16), one thread, {machine.processor}, "
        f"torch {machine.versions['torch']}, rows measured at {', '.join(sorted(commits))}. "
        "KL in nats per token and points of exact match lost are on fresh examples, tasks weighing "
        "alike; speed-ups are 128 tokens in, 64 out, batch 1 where nothing else is said."
    ]
    for study, title in TITLES.items():
        present = {model: studies[study] for model, studies in models.items() if study in studies}
        if present:
            parts.append(f"## {title}\n\n{table(present)}")
            order = ordering(present)
            if order:
                parts.append(order)
    return "\n\n".join(parts) + "\n"


def table(present: Mapping[str, Sequence[Row]]) -> str:
    """One table for all models of a study."""
    used = [c for c in COLUMNS if any(c in row for rows in present.values() for row in rows)]
    lines = [
        "| model | | " + " | ".join(COLUMNS[c][0] for c in used) + " |",
        "|---|---|" + "---|" * len(used),
    ]
    for model, rows in present.items():
        for row in rows:
            cells = [COLUMNS[c][1].format(row[c]) if c in row else "" for c in used]
            lines.append(f"| {model} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ordering(present: Mapping[str, Sequence[Row]]) -> str:
    """Which rows rank alike by KL in every model: what may be said of all of them."""
    named = [{row["name"]: row["kl"] for row in rows if "kl" in row} for rows in present.values()]
    if len(named) < 2 or not all(named):
        return ""
    common = [name for name in named[0] if all(name in each for each in named)]
    facts = [
        f"`{a}` below `{b}`"
        for a in common
        for b in common
        if a != b and all(each[a] < each[b] * 0.99 for each in named)
    ]
    return f"KL lower by more than 1 % in all {len(named)}: " + ("; ".join(facts) or "none") + "."
