"""The page of ``visual_speed.py``."""

from __future__ import annotations

from typing import Any

from recorder.page import Block
from recorder.record import Record
from recorder.table import Table, interval
from shapes.llava import IMAGES

from visual.bounds import FORMULAS


def report(record: Record) -> list[Block]:
    """The page: speed-ups, shares of stages and bounds, bytes, and why it may be no claim."""
    rows = [row for row in record["results"] if "skipped" not in row]
    skipped = [row for row in record["results"] if "skipped" in row]
    return [
        _heading(record),
        _speedups(rows),
        _shares(rows),
        *_bytes(record["transfers"]),
        *(f"Batch {row['batch']} was left out: {row['skipped']}." for row in skipped),
        *(f"Not for quotation: {caveat}." for caveat in record["caveats"]),
        FORMULAS,
    ]


def _heading(record: Record) -> str:
    asked = record["configuration"]
    return (
        f"Visual token pruning, {asked['shape']} shapes with random weights, {asked['dtype']}: "
        f"{record['image_tokens']} visual tokens against {asked['keep']} ({asked['method']}), "
        f"{asked['text_tokens']} text tokens, {asked['answer_tokens']} answer tokens. Time to "
        "first token is vision tower, selection and prefill of the whole batch in one pass (the "
        "service prefills one prompt after another); scaling images on the CPU and copying KV "
        f"into slots are apart. Medians of interleaved runs in {asked['clock']} time, "
        "95 % bootstrap intervals over pairs of runs. "
        f"The device reaches {record['flops_per_s'] / 1e12:.3g} TFLOP/s and "
        f"{record['bytes_per_s'] / 1e9:.0f} GB/s."
    )


def _speedups(rows: list[dict[str, Any]]) -> Table:
    columns = (
        *("batch", "runs", "TTFT dense, pruned (ms)", "speed-up", "bound"),
        *("TPOT (ms)", "speed-up", "bound"),
        *("answer (ms)", "speed-up", "at least", "bound"),
    )
    return Table(columns, [_speedup_cells(row) for row in rows])


def _speedup_cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row["batch"]), str(row["runs"])]
    for name in ("ttft", "tpot", "answer"):
        found = row["speedups"][name]
        dense, pruned = (row["sides"][side][f"{name}_ms"] for side in ("dense", "pruned"))
        cells += [f"{dense:.4g}, {pruned:.4g}"]
        cells += [interval(found["speedup"], found["interval_95"], ".2f")]
        cells += [f"{found['at_least']:.2f}"] if name == "answer" else []
        cells += [f"{found['bound']:.2f}"]
    return cells


def _shares(rows: list[dict[str, Any]]) -> Table:
    columns = (
        *("batch", "tower (ms)", "selection (ms)", "selection / dense TTFT", "scaling images (ms)"),
        *("answer's speed-up, scaling included", "operations to first token, ratio"),
        *("bytes per decode step, ratio", "share of the bound reached: TTFT dense, pruned", "TPOT"),
    )
    return Table(columns, [_share_cells(row) for row in rows])


def _share_cells(row: dict[str, Any]) -> list[str]:
    dense, pruned = row["sides"]["dense"], row["sides"]["pruned"]
    shares = [
        f"{dense['share_of_bound'][name]:.0%}, {pruned['share_of_bound'][name]:.0%}"
        for name in ("ttft", "tpot")
    ]
    return [
        str(row["batch"]),
        f"{pruned['tower_ms']:.4g}",
        f"{row['selection_ms']:.4g}",
        f"{row['selection_share_of_dense_ttft']:.1%}",
        f"{pruned['prepare_ms']:.4g}",
        f"{row['speedups']['answer_with_preparation']['speedup']:.2f}",
        f"{row['ttft_operations_ratio']:.2f}",
        f"{row['decode_bytes_ratio']:.2f}",
        *shares,
    ]


def _bytes(transfers: dict[str, Any]) -> list[Block]:
    dense, pruned = transfers["dense"], transfers["pruned"]
    rows = [
        (
            *(str(images), f"{each['num_prompt_tokens']:,}"),
            *(f"{each['bytes_full']:,}", f"{each['bytes_sent']:,}"),
            f"{each['bytes_full'] / each['bytes_sent']:.2f}",
        )
        for images, each in zip(IMAGES, transfers["by_images"], strict=True)
    ]
    return [
        f"KV of one prompt of {pruned['num_prompt_tokens']} tokens: {pruned['bytes_full']:,} bytes "
        f"dense, {pruned['bytes_sent']:,} sent ({pruned['num_visual_tokens_removed']} visual "
        f"tokens removed): {pruned['bytes_full'] / pruned['bytes_sent']:.2f} times fewer; dense "
        f"sends {dense['bytes_sent']:,}. Of the bytes sent, {pruned['overhead_bytes']:,} are "
        "header and padding.",
        Table(("images in the prompt", "tokens", "bytes dense", "bytes sent", "times fewer"), rows),
    ]
