"""The page of ``search_cost.py``: every measured part, with its origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from recorder.origin import measured_on
from recorder.page import Block
from recorder.record import Record
from recorder.table import Table


def report(record: Record) -> list[Block]:
    """The measured parts in a fixed order, whatever the order in which they were measured."""
    blocks: list[Block] = []
    for name, write in WRITERS.items():
        if name in record["parts"]:
            part = record["parts"][name]
            blocks += [*write(part["result"], part["configuration"]), f"({measured_on(part)})"]
    return blocks


def _search(result: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Block]:
    fresh, seeds = result["held_out"], result["seeds"]
    rows = [
        (
            *(str(row["seed"]), str(row["evaluations"])),
            *(
                " / ".join(f"{value:.2f}" for value in row[key].values())
                for key in ("naive/search", "naive/racing")
            ),
            *(f"{score:.5f}" for score in scores),
        )
        for row, scores in zip(seeds, fresh["scores"], strict=True)
    ]
    same = sum(whole == raced for whole, raced in fresh["plans"])
    columns = (
        *("seed", "candidates", "search", "with racing"),
        *("score on fresh lines, search", "with racing"),
    )
    return [
        f"## Cost of a search: {asked['method']}, {asked['remove']} blocks per stage",
        f"{result['num_lines']} lines of {asked['prompt_tokens']} prompt and "
        f"{asked['continuation_tokens']} continuation tokens in {result['num_chunks']} chunks; "
        f"plans on {fresh['num_lines']} fresh lines. Times cheaper than naive scoring of the same "
        "candidates (forwards / wall / CPU):",
        Table(columns, rows),
        f"{same} of {len(seeds)} races end with the same plan. Their plans lose "
        f"{100 * fresh['loss']:.1f} % on fresh lines, at most "
        f"{100 * fresh['loss_upper_bound']:.1f} % (one-sided 95 % bootstrap, paired over seeds and "
        "lines).",
    ]


def _decode_only(result: Mapping[str, Any], _: Mapping[str, Any]) -> list[Block]:
    reached, shares = result["reached"], result["shares_of_bound"]
    words = {"forwards": "in forwards", "wall_s": "in wall time", "cpu_s": "in CPU time"}
    ratios = ", ".join(
        f"{reached[key]:.1f} {word} ({100 * shares[key]:.0f} %)" for key, word in words.items()
    )
    return [
        "## Decode-only candidates",
        f"One block each, all blocks together, {result['num_lines']} lines in one chunk, median of "
        f"{result['num_repeats']}: bound (P + C)/C x L/(L - f) {result['bound']:.1f}, reached "
        f"{ratios}; worst block {100 * result['least_share_of_bound']:.0f} % in forwards. Above "
        "100 %: prefill makes the first token, so decode runs C - 1 tokens, and a removed block "
        "runs none.",
    ]


def _workers(result: Mapping[str, Any], _: Mapping[str, Any]) -> list[Block]:
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    return [
        "## Two Ray evaluators against one with the cache bytes of both",
        f"{result['speed_up']:.2f}x (median of {ratios}).",
    ]


def _simulation(result: list[Mapping[str, float]], _: Mapping[str, Any]) -> list[Block]:
    rows = [(str(row["workers"]), f"{row['speed_up']:.2f}") for row in result]
    return [
        "## More evaluators, simulated from a trace",
        Table(("evaluators", "speed-up"), rows),
    ]


WRITERS: dict[str, Callable[[Any, Mapping[str, Any]], list[Block]]] = {
    "search": _search,
    "decode_only": _decode_only,
    "workers": _workers,
    "simulation": _simulation,
}
