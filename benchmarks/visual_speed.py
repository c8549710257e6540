"""Claim: 64 instead of 576 visual tokens answer at least 1.567 times faster at batch 32 on a GPU.

LLaVA-1.5-7B's shapes with random weights (speed does not depend on what was learned), the vision
tower included, dense against TrimTokenator's selection, through our own engines. No Ray. Beside
every figure stands the device's bound. On a CPU the same code runs scaled down.

    python benchmarks/visual_speed.py                                      # needs a GPU
    python benchmarks/visual_speed.py --scale small --device cpu --dtype float32 \\
        --clock cpu --batch 1 8 --runs 30 6
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from visual.bounds import Rates, Work, measured_rates, work_of
from visual.runs import Bench, Times
from visual.scales import IMAGE_TOKENS, IMAGES, SCALES, random_llava
from visual.summary import summarise
from visual.table import markdown

from rayapp.evaluation.machine import this_machine
from rayapp.models.loading import DTYPES
from rayapp.plan import VisualTokens

ENOUGH_RUNS = 30
METHODS = ("trimtokenator", "diversity", "divprune", "cdpruner", "dart", "random", "grid")


def measure(bench: Bench, rates: Rates, batch: int, num_runs: int) -> dict[str, Any]:
    """One batch size; a warm-up run of each side, then both in turns, either first."""
    requests, decode = bench.requests(batch), bench.decode_engine(batch)
    runs: dict[str, list[Times]] = {"dense": [], "pruned": []}
    for repeat in range(num_runs + 1):
        for side in list(runs) if repeat % 2 else list(reversed(runs)):
            times = bench.run(side, requests, decode)
            if repeat:
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
        return measure(bench, rates, batch, num_runs)
    except torch.OutOfMemoryError:
        pass  # what the failed run held is let go of with the exception
    torch.cuda.empty_cache()
    return {"batch": batch, "skipped": "it does not fit into the device's memory"}


def caveats(arguments: argparse.Namespace) -> list[str]:
    found = []
    if arguments.scale != "llava-7b":
        found.append(f"the model is scaled down ({arguments.scale}), so shares of stages differ")
    few = [n for n in arguments.runs if n < ENOUGH_RUNS]
    if few:
        found.append(f"runs are {few} where {ENOUGH_RUNS} are asked for")
    if arguments.clock == "cpu":
        found.append("CPU time of one process, because other programs shared the machine")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=sorted(SCALES), default="llava-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--runs", type=int, nargs="+", default=[30], help="one, or per batch")
    parser.add_argument("--keep", type=int, default=64, help="of 576 visual tokens")
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="bounds count the first one's work"
    )
    parser.add_argument("--text-tokens", type=int, default=48)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if len(arguments.runs) == 1:
        arguments.runs *= len(arguments.batch)
    if len(arguments.runs) != len(arguments.batch):
        parser.error("--runs takes one number, or one for each of --batch")
    if arguments.clock == "cpu" and (arguments.device != "cpu" or arguments.threads != 1):
        parser.error("--clock cpu needs --device cpu and one thread")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here; --scale small --device cpu runs it small")
        return
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    load = os.getloadavg()[0]
    model = random_llava(arguments.scale, DTYPES[arguments.dtype], arguments.device)
    rates = measured_rates(model.device, model.dtype, arguments.clock)
    bench = Bench(
        model,
        VisualTokens(method=arguments.method, num_keep=arguments.keep),
        text_tokens=arguments.text_tokens,
        num_answer=arguments.answer_tokens,
        clock=arguments.clock,
    )
    results = []
    for batch, num_runs in zip(arguments.batch, arguments.runs, strict=True):
        results.append(measured_or_skipped(bench, rates, batch, num_runs))
        print(f"batch {batch}: {results[-1].get('speedups', results[-1])}", flush=True)
    (request,) = bench.requests(1)
    transfers: dict[str, Any] = {
        side: asdict(bench.transfer(side, request)) for side in bench.plans
    }
    heavy = [bench.requests(1, images)[0] for images in IMAGES]
    transfers["by_images"] = [asdict(bench.transfer("pruned", each)) for each in heavy]
    write(arguments, rates, results, transfers, (load, os.getloadavg()[0]))


def write(
    arguments: argparse.Namespace,
    rates: Rates,
    results: list[dict[str, Any]],
    transfers: dict[str, dict[str, Any]],
    load: tuple[float, float],
) -> None:
    on_gpu = arguments.device != "cpu"
    hardware = torch.cuda.get_device_name() if on_gpu else "cpu"
    machine = this_machine(device=hardware, num_threads=arguments.threads)
    given = {key: value for key, value in vars(arguments).items() if key != "out"}
    record = {
        "arguments": {**given, "image_tokens": IMAGE_TOKENS},
        "shapes": asdict(SCALES[arguments.scale]),
        "machine": machine.model_dump(),
        "load_average": load,
        **asdict(rates),
        "caveats": caveats(arguments),
        "transfers": transfers,
        "results": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"visual_speed-{arguments.scale}-{arguments.dtype}" + ("-gpu" if on_gpu else "")
    (arguments.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    (arguments.out / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
