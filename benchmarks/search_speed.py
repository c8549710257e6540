"""Claim: on a model of real size, a search is three times as fast as it was.

Two parts (`--only` runs one of them):

- `search`: candidates that remove blocks from one stage, scored by the version of this checkout and
  by an earlier one (`--before`, the root of another checkout), each in a process of its own, in
  turns, on the same lines. Scores must agree to the rounding of the element type.
- `choices`: multiple-choice questions (`--questions`) beside transformers' own batched forward
  passes over the same questions: a row for every choice, as harnesses run them, and a row for every
  question with each token once.

    python benchmarks/search_speed.py --model out/models/smollm2-135m --lines lines.jsonl \\
        --before ../earlier --questions arc_easy.jsonl hellaswag.jsonl
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from hardware.turns import in_turns
from recorder.options import add_model, add_seed, benchmark_parser, model_name
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from speed.checkouts import scored_by
from speed.choices import choices_part

from rayapp.testbed import text_model_path

ROOT = Path(__file__).parents[1]
STAGES = ("prefill", "decode")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_seed(options, "the candidates")
    options.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--lines", type=Path, help="calibration lines")
    options.add_argument("--before", type=Path, help="root of the checkout to compare with")
    options.add_argument("--candidates", type=int, default=4)
    options.add_argument("--remove", type=int, default=4, help="blocks that a candidate removes")
    options.add_argument("--questions", type=Path, nargs="+", help="files of choices")
    options.add_argument("--limit", type=int, default=100, help="questions of each file")
    options.add_argument("--runs", type=int, default=1, help="timed, of each side")
    return options


def search_part(arguments: Namespace) -> list[dict[str, Any]]:
    """A row per element type and stage."""
    checkouts = {"before": arguments.before or ROOT, "now": ROOT}
    rows = []
    for dtype in arguments.dtype:
        for stage in STAGES:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
            for name, counts in in_turns(list(checkouts), arguments.runs):
                if counts:
                    found[name].append(_scored(checkouts[name], arguments, dtype, stage))
            rows.append({"dtype": dtype, "stage": stage, "runs": found})
            print(f"{dtype}, {stage}: {_ratio(found, 'cpu_s'):.2f}x", flush=True)
    return rows


def _scored(checkout: Path, arguments: Namespace, dtype: str, stage: str) -> dict[str, Any]:
    """One run of :mod:`speed.candidates` over the package of a checkout."""
    wanted = {
        "model": str(arguments.model.resolve()),
        "lines": str(arguments.lines.resolve()),
        "dtype": dtype,
        "stage": stage,
        **{name: getattr(arguments, name) for name in ("threads", "candidates", "remove", "seed")},
    }
    return scored_by(checkout, wanted)


def _ratio(found: dict[str, list[dict[str, Any]]], clock: str) -> float:
    before, now = (statistics.median(r[clock] for r in found[k]) for k in ("before", "now"))
    return before / now


PARTS = {"search": search_part, "choices": choices_part}


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    if arguments.lines is None:
        arguments.only = [name for name in arguments.only if name != "search"]
    if arguments.questions is None:
        arguments.only = [name for name in arguments.only if name != "choices"]
    for name in arguments.only:
        recorder.write_part(name, result=PARTS[name](arguments))


def report(record: Record) -> list[Block]:
    parts = record["parts"]
    blocks: list[Block] = []
    if "search" in parts:
        blocks += _search_page(parts["search"])
    if "choices" in parts:
        blocks += _choices_page(parts["choices"])
    return blocks


def _search_page(part: dict[str, Any]) -> list[Block]:
    asked = part["configuration"]
    columns = (
        *("element type", "stage", "before, candidates/CPU s", "now", "faster (CPU)"),
        *("faster (wall)", "largest relative change of a KL", "peak before, MB", "now"),
    )
    rows = []
    for row in part["result"]:
        found = row["runs"]
        rate = {
            name: asked["candidates"] / statistics.median(r["cpu_s"] for r in runs)
            for name, runs in found.items()
        }
        pairs = zip(found["before"][0]["kl"], found["now"][0]["kl"], strict=True)
        change = max(abs(now - before) / before for before, now in pairs)
        peak = {name: max(r["peak_bytes"] for r in runs) / 1e6 for name, runs in found.items()}
        rows.append(
            (
                *(row["dtype"], row["stage"], f"{rate['before']:.3f}", f"{rate['now']:.3f}"),
                *(f"{_ratio(found, 'cpu_s'):.2f}x", f"{_ratio(found, 'wall_s'):.2f}x"),
                *(f"{change:.1e}", f"{peak['before']:.0f}", f"{peak['now']:.0f}"),
            )
        )
    return [
        f"{asked['candidates']} candidates that remove {asked['remove']} blocks from one stage, "
        f"scored on the lines of {asked['lines']} by `{asked['model']}` after the dense model, one "
        "thread, each version in a process of its own. CPU seconds hold where others use the "
        "machine too.",
        Table(columns, rows),
    ]


def _choices_page(part: dict[str, Any]) -> list[Block]:
    found = part["result"]
    clocks = ("wall_s", "cpu_s")
    middle = {
        name: {clock: statistics.median(run[clock] for run in runs) for clock in clocks}
        for name, runs in found["seconds"].items()
    }
    rows = [
        (
            name,
            str(found["tokens"].get(name, "")),
            *(f"{times[clock]:.1f}" for clock in clocks),
            *(f"{middle['ours'][clock] / times[clock]:.2f}x" for clock in clocks),
        )
        for name, times in middle.items()
    ]
    columns = ("side", "tokens", "wall s", "CPU s", "ours in its time (wall)", "(CPU)")
    return [
        f"{found['num_questions']} questions with {found['num_choices']} choices, one side, "
        f"{found['dtype']}, beside the forward passes of transformers over them, alternated.",
        Table(columns, rows),
    ]


def label(arguments: Namespace) -> str:
    return model_name(arguments.model or text_model_path())


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
