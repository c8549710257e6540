"""Claim: 64 instead of 576 visual tokens answer at least 1.567 times faster at batch 32 on a GPU.

LLaVA-1.5-7B's shapes with random weights (speed does not depend on what was learned), the vision
tower included, dense against TrimTokenator's selection, through our own engines. No Ray. Beside
every figure stands the device's bound. On a CPU the same code runs scaled down.

    python benchmarks/visual_speed.py                                      # needs a GPU
    python benchmarks/visual_speed.py --shape small --device cpu --dtype float32 \\
        --clock cpu --batch 1 8 --runs 30 6
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from hardware.rates import Rates, measured_rates
from hardware.turns import in_turns
from recorder.options import (
    add_device,
    add_dtype,
    add_seed,
    add_shape,
    benchmark_parser,
    speed_label,
)
from recorder.run import Recorder, run
from shapes.llava import IMAGE_TOKENS, IMAGES, SHAPES, random_llava
from visual.bounds import Work, work_of
from visual.runs import Bench, Times
from visual.speed import report
from visual.summary import summarise

from rayapp.errors import InputError
from rayapp.models.architecture import DTYPES
from rayapp.plan import VisualTokens

ENOUGH_RUNS = 30
METHODS = ("trimtokenator", "diversity", "divprune", "cdpruner", "dart", "random", "grid")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_shape(options, SHAPES, "llava-7b")
    add_device(options, "cuda")
    add_dtype(options, "bfloat16")
    add_seed(options, "the weights")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument(
        "--runs", type=int, nargs="+", default=[30], help="timed: one, or per batch"
    )
    options.add_argument("--keep", type=int, default=64, help="of 576 visual tokens")
    options.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="bounds count the first one's work"
    )
    options.add_argument("--text-tokens", type=int, default=48)
    options.add_argument("--answer-tokens", type=int, default=32)
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    runs = runs_of(arguments)
    model = random_llava(arguments.shape, DTYPES[arguments.dtype], arguments.device)
    best = measured_rates(model.device, model.dtype, arguments.clock)
    bench = Bench(
        model,
        VisualTokens(method=arguments.method, num_keep=arguments.keep),
        text_tokens=arguments.text_tokens,
        num_answer=arguments.answer_tokens,
        clock=arguments.clock,
    )
    rows: list[dict[str, Any]] = []
    for batch, num_runs in zip(arguments.batch, runs, strict=True):
        rows.append(measured_or_skipped(bench, best, batch, num_runs))
        print(f"batch {batch}: {rows[-1].get('speedups', rows[-1])}", flush=True)
    (request,) = bench.requests(1)
    transfers: dict[str, Any] = {
        side: asdict(bench.transfer(side, request)) for side in bench.plans
    }
    heavy = [bench.requests(1, images)[0] for images in IMAGES]
    transfers["by_images"] = [asdict(bench.transfer("pruned", each)) for each in heavy]
    recorder.write(
        image_tokens=IMAGE_TOKENS,
        shapes=asdict(SHAPES[arguments.shape]),
        **asdict(best),
        caveats=caveats(arguments, runs),
        transfers=transfers,
        results=rows,
    )


def runs_of(arguments: Namespace) -> list[int]:
    """The number of runs for every batch size."""
    asked: list[int] = arguments.runs
    runs = asked * len(arguments.batch) if len(asked) == 1 else asked
    if len(runs) != len(arguments.batch):
        raise InputError(
            f"--runs {asked} does not fit --batch {arguments.batch}; give one number, or one each"
        )
    if arguments.clock == "cpu" and (arguments.device != "cpu" or arguments.threads != 1):
        raise InputError(
            f"--clock cpu cannot time --device {arguments.device} with {arguments.threads} "
            "threads; give --device cpu --threads 1, or --clock wall"
        )
    return runs


def measured_batch(bench: Bench, rates: Rates, batch: int, num_runs: int) -> dict[str, Any]:
    """One batch size; a warm-up run of each side, then both in turns, either first."""
    requests, decode = bench.requests(batch), bench.decode_engine(batch)
    runs: dict[str, list[Times]] = {"dense": [], "pruned": []}
    for side, counts in in_turns(list(runs), num_runs):
        times = bench.run(side, requests, decode)
        if counts:
            runs[side].append(times)
    works = {side: work(bench, batch, rule) for side, rule in bench.rules.items()}
    return {
        "batch": batch,
        "runs": num_runs,
        **summarise(runs, works, rates, bench.num_answer),
        "answers_repeat": {side: len({t.tokens for t in runs[side]}) == 1 for side in runs},
    }


def work(bench: Bench, batch: int, rule: VisualTokens | None) -> Work:
    num_keep = None if rule is None else int(rule.num_keep)
    return work_of(
        bench.model,
        bench.stack,
        batch=batch,
        num_run=bench.num_text + (IMAGE_TOKENS if num_keep is None else num_keep),
        num_answer=bench.num_answer,
        num_keep=num_keep,
    )


def measured_or_skipped(bench: Bench, rates: Rates, batch: int, num_runs: int) -> dict[str, Any]:
    try:
        return measured_batch(bench, rates, batch, num_runs)
    except torch.OutOfMemoryError:
        pass  # what the failed run held is let go of with the exception
    torch.cuda.empty_cache()
    return {"batch": batch, "skipped": "it does not fit into the device's memory"}


def caveats(arguments: Namespace, runs: Sequence[int]) -> list[str]:
    reasons = []
    if arguments.shape != "llava-7b":
        reasons.append(f"the model is scaled down ({arguments.shape}), so shares of stages differ")
    few = [n for n in runs if n < ENOUGH_RUNS]
    if few:
        reasons.append(f"runs are {few} where {ENOUGH_RUNS} are asked for")
    if arguments.clock == "cpu":
        reasons.append("CPU time of one process, because other programs shared the machine")
    return reasons


if __name__ == "__main__":
    run(parser(), measure, report, label=speed_label)
