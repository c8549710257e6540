"""The result as Markdown."""

from __future__ import annotations

from typing import Any

from visual.bounds import FORMULAS
from visual.scales import IMAGES


def markdown(record: dict[str, Any]) -> str:
    rows = [row for row in record["results"] if "skipped" not in row]
    skipped = [row for row in record["results"] if "skipped" in row]
    parts = [_heading(record), _speedups(rows), _shares(rows), _bytes(record["transfers"])]
    parts += [f"Batch {row['batch']} was left out: {row['skipped']}." for row in skipped]
    parts += [f"Not for quotation: {caveat}." for caveat in record["caveats"]]
    return "\n\n".join([*parts, FORMULAS]) + "\n"


def _heading(record: dict[str, Any]) -> str:
    given, machine = record["arguments"], record["machine"]
    load = " to ".join(f"{value:.1f}" for value in record["load_average"])
    return (
        f"Visual token pruning, {given['scale']} shapes with random weights, {given['dtype']}: "
        f"{given['image_tokens']} visual tokens against {given['keep']} ({given['method']}), "
        f"{given['text_tokens']} text tokens, {given['answer_tokens']} answer tokens. Time to "
        "first token is vision tower, selection and prefill of the whole batch in one pass (the "
        "service prefills one prompt after another); scaling images on the CPU and copying KV "
        f"into slots are apart. Medians of interleaved runs in {given['clock']} time, "
        "95 % bootstrap intervals over pairs of runs. "
        f"{machine['processor']}, {machine['device']}, {machine['num_threads']} thread(s), load "
        f"average {load}, {record['flops_per_s'] / 1e12:.3g} TFLOP/s and "
        f"{record['bytes_per_s'] / 1e9:.0f} GB/s measured, torch {machine['versions']['torch']}, "
        f"commit {machine['commit']}."
    )


def _speedups(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| batch | runs | TTFT dense, pruned (ms) | speed-up | bound | TPOT (ms) | speed-up "
        "| bound | answer (ms) | speed-up | at least | bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["batch"]), str(row["runs"])]
        for name in ("ttft", "tpot", "answer"):
            found = row["speedups"][name]
            dense, pruned = (row["sides"][side][f"{name}_ms"] for side in ("dense", "pruned"))
            low, high = found["interval_95"]
            cells += [
                f"{dense:.4g}, {pruned:.4g}",
                f"{found['speedup']:.2f} ({low:.2f}-{high:.2f})",
            ]
            cells += [f"{found['at_least']:.2f}"] if name == "answer" else []
            cells.append(f"{found['bound']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shares(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| batch | tower (ms) | selection (ms) | selection / dense TTFT | scaling images (ms) "
        "| answer's speed-up, scaling included | operations to first token, ratio "
        "| bytes per decode step, ratio | share of the bound reached: TTFT dense, pruned | TPOT |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, pruned = row["sides"]["dense"], row["sides"]["pruned"]
        shares = [
            f"{dense['share_of_bound'][name]:.0%}, {pruned['share_of_bound'][name]:.0%}"
            for name in ("ttft", "tpot")
        ]
        with_scaling = row["speedups"]["answer_with_preparation"]["speedup"]
        lines.append(
            f"| {row['batch']} | {pruned['tower_ms']:.4g} | {row['selection_ms']:.4g} "
            f"| {row['selection_share_of_dense_ttft']:.1%} | {pruned['prepare_ms']:.4g} "
            f"| {with_scaling:.2f} | {row['ttft_operations_ratio']:.2f} "
            f"| {row['decode_bytes_ratio']:.2f} | {shares[0]} | {shares[1]} |"
        )
    return "\n".join(lines)


def _bytes(transfers: dict[str, dict[str, Any]]) -> str:
    dense, pruned = transfers["dense"], transfers["pruned"]
    return (
        f"KV of one prompt of {pruned['num_prompt_tokens']} tokens: {pruned['bytes_full']:,} bytes "
        f"dense, {pruned['bytes_sent']:,} sent ({pruned['num_visual_tokens_removed']} visual "
        f"tokens removed): {pruned['bytes_full'] / pruned['bytes_sent']:.2f} times fewer; dense "
        f"sends {dense['bytes_sent']:,}. Of the bytes sent, {pruned['overhead_bytes']:,} are "
        "header and padding.\n\n"
        "| images in the prompt | tokens | bytes dense | bytes sent | times fewer |\n"
        "|---|---|---|---|---|\n"
        + "\n".join(
            f"| {images} | {each['num_prompt_tokens']:,} | {each['bytes_full']:,} | "
            f"{each['bytes_sent']:,} | {each['bytes_full'] / each['bytes_sent']:.2f} |"
            for images, each in zip(IMAGES, transfers["by_images"], strict=True)
        )
    )
