"""The measured parts as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def markdown(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Every part that was measured, in order, with what it was measured on."""
    lines: list[str] = []
    for name, write in WRITERS.items():
        if name in parts:
            lines += [*write(parts[name]["result"], parts[name]["arguments"]), ""]
            lines += [_measured_on(parts[name]), ""]
    return "\n".join(lines)


def _measured_on(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    load = " to ".join(f"{value:.1f}" for value in part["load_average"])
    return (
        f"({machine['processor']}, {machine['num_threads']} thread, load average {load}, torch "
        f"{machine['versions']['torch']}, commit {machine['commit']})"
    )


def _search(result: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    held, seeds = result["held_out"], result["seeds"]
    lines = [
        f"## Cost of a search: {arguments['method']}, {arguments['remove']} blocks per stage",
        "",
        f"{result['num_lines']} lines of {arguments['prompt_tokens']} prompt and "
        f"{arguments['continuation_tokens']} continuation tokens in {result['num_chunks']} chunks; "
        f"plans on {held['num_lines']} fresh lines. Times cheaper than naive scoring of the same "
        "candidates (forwards / wall / CPU):",
        "",
        "| seed | candidates | search | with racing | score on fresh lines, search | with racing |",
        "|---|---|---|---|---|---|",
    ]
    for row, (whole, raced) in zip(seeds, held["scores"], strict=True):
        ratios = [
            " / ".join(f"{value:.2f}" for value in row[key].values())
            for key in ("naive/search", "naive/racing")
        ]
        lines.append(
            f"| {row['seed']} | {row['evaluations']} | {ratios[0]} | {ratios[1]} | {whole:.5f} "
            f"| {raced:.5f} |"
        )
    same = sum(whole == raced for whole, raced in held["plans"])
    return [
        *lines,
        "",
        f"{same} of {len(seeds)} races end with the same plan. Their plans lose "
        f"{100 * held['loss']:.1f} % on fresh lines, at most "
        f"{100 * held['loss_upper_bound']:.1f} % (one-sided 95 % bootstrap, paired over seeds and "
        "lines).",
    ]


def _decode_only(result: Mapping[str, Any], _: Mapping[str, Any]) -> list[str]:
    reached, shares = result["reached"], result["shares_of_bound"]
    words = {"forwards": "in forwards", "wall_s": "in wall time", "cpu_s": "in CPU time"}
    found = ", ".join(
        f"{reached[key]:.1f} {word} ({100 * shares[key]:.0f} %)" for key, word in words.items()
    )
    return [
        "## Decode-only candidates",
        "",
        f"One block each, all blocks together, {result['num_lines']} lines in one chunk, median of "
        f"{result['num_repeats']}: bound (P + C)/C x L/(L - f) {result['bound']:.1f}, reached "
        f"{found}; worst block {100 * result['least_share_of_bound']:.0f} % in forwards. Above "
        "100 %: prefill makes the first token, so decode runs C - 1 tokens, and a removed block "
        "runs none.",
    ]


def _workers(result: Mapping[str, Any], _: Mapping[str, Any]) -> list[str]:
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    return [
        "## Two Ray evaluators against one with the cache bytes of both",
        "",
        f"{result['speed_up']:.2f}x (median of {ratios}).",
    ]


def _simulation(result: list[Mapping[str, float]], _: Mapping[str, Any]) -> list[str]:
    head = ["## More evaluators, simulated from a trace", "", "| evaluators | speed-up |"]
    rows = [f"| {row['workers']} | {row['speed_up']:.2f} |" for row in result]
    return [*head, "|---|---|", *rows]


WRITERS: dict[str, Callable[[Any, Mapping[str, Any]], list[str]]] = {
    "search": _search,
    "decode_only": _decode_only,
    "workers": _workers,
    "simulation": _simulation,
}
