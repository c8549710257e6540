"""Claim: a search over Llama-3.1-8B fits one GPU, and reuse saves most of its work there too.

Random weights, made on the device: speed and memory do not depend on what was learned, scores mean
nothing. No Ray. Two generations of a search (a random start and its neighbours), one that changes
decode alone and one that changes both stages; each is scored on a fresh evaluator after an
uncounted run that warms up. A few of the candidates are scored again with nothing reused.

Beside the seconds stands the bound of the device: the floating-point operations that were counted,
at the rate that one big product reaches, or the weights of every block that ran, at the rate of one
big copy, whichever takes longer.

    python benchmarks/search_gpu.py
    python benchmarks/search_gpu.py --shape tiny --device cpu --dtype float32   # the same, small
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decode_engine import SHAPES, copy_gb_per_s, random_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.machine import this_machine
from rayapp.models.blocks import decoder_blocks
from rayapp.models.loading import DTYPES
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.settings.objective import Objective


def random_lines(arguments: argparse.Namespace, vocab: int) -> Calibration:
    rng = random.Random(arguments.seed)
    prompt, answer = arguments.prompt_tokens, arguments.continuation_tokens
    rows = [rng.choices(range(vocab), k=prompt + answer) for _ in range(arguments.lines)]
    lines = [TokenizedLine(tuple(row[:prompt]), tuple(row[prompt:]), "random") for row in rows]
    return cut(lines, chunk_tokens=arguments.chunk_lines * (prompt + answer))


def generation(space: Space, arguments: argparse.Namespace) -> list[Candidate]:
    """A random candidate and some of its neighbours, as a search asks for them; ascending."""
    rng = random.Random(arguments.seed)
    start = space.draw(rng)
    neighbours = space.swaps(start)
    count = min(arguments.candidates - 1, len(neighbours))
    return sorted([start, *rng.sample(neighbours, count)])


class Pass:
    """Scores candidates on a fresh evaluator, and knows what that took."""

    def __init__(
        self, model: PreTrainedModel, lines: Calibration, arguments: argparse.Namespace, gb: float
    ) -> None:
        self._on_gpu = model.device.type == "cuda"
        self._objective = Objective(kl_top_k=arguments.kl_top_k)
        self._evaluator = Evaluator(model, lines, self._objective, cache_bytes=int(gb * 2**30))
        self._chunks = range(len(lines.chunks))

    def run(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """References first, uncounted in forwards and seconds, as a search makes them once."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        forwards, blocks, seconds = 0.0, 0, 0.0
        sums: list[list[float]] = [[] for _ in candidates]
        for chunk in self._chunks:
            self._evaluator.line_sums([], chunk)
            before = self._evaluator.forwards, self._evaluator.blocks_run, self._now()
            found = self._evaluator.line_sums(candidates, chunk)
            seconds += self._now() - before[2]
            forwards += self._evaluator.forwards - before[0]
            blocks += self._evaluator.blocks_run - before[1]
            for row, values in zip(sums, found, strict=True):
                row += values
        return {
            "candidates": len(candidates),
            "seconds": seconds,
            "candidates_per_s": len(candidates) / seconds if seconds else 0.0,
            "forwards": forwards,
            "blocks_run": blocks,
            "peak_gb": self._peak_bytes() / 1e9,
            "sums": [sum(row) for row in sums],
        }

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak_bytes(self) -> int:
        """On the device; on a CPU, of the whole process."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def product_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one big product: the bound of everything compute-bound."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def counted_flops(warming: Pass, candidates: Sequence[Candidate]) -> int:
    """Operations of scoring the candidates once the references are there."""
    warming.run([])
    counter = FlopCounterMode(display=False)
    with counter:
        warming.run(candidates)
    return int(counter.get_total_flops())


def measure(
    model: PreTrainedModel, lines: Calibration, space: Space, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One generation with reuse, some of it without, and how far from the device's bound."""
    candidates = generation(space, arguments)
    flops = counted_flops(Pass(model, lines, arguments, arguments.cache_gb), candidates)
    ours = Pass(model, lines, arguments, arguments.cache_gb).run(candidates)
    few = candidates[:: max(1, len(candidates) // arguments.naive)][: arguments.naive]
    naive = Pass(model, lines, arguments, 0.0).run(few)
    pairs = zip(naive["sums"], (ours["sums"][candidates.index(c)] for c in few), strict=True)
    block = next(iter(decoder_blocks(model)))
    block_bytes = sum(p.nbytes for p in block.parameters())
    share = len(few) / len(candidates)
    return {
        "ours": ours,
        "naive": naive,
        "largest_difference": max(abs(mine / its - 1) for its, mine in pairs),
        "forwards_saved": 1 - ours["forwards"] * share / naive["forwards"],
        "times_faster": naive["seconds"] / (ours["seconds"] * share),
        "flops": flops,
        "block_bytes_read": block_bytes * ours["blocks_run"],
    }


def bounded(result: dict[str, Any], flops_per_s: float, gb_per_s: float) -> dict[str, Any]:
    """With the seconds that the device needs at least, and the share of them that was reached."""
    compute_s = result["flops"] / flops_per_s
    memory_s = result["block_bytes_read"] / gb_per_s / 1e9
    bound_s = max(compute_s, memory_s)
    return {
        **result,
        "compute_s": compute_s,
        "memory_s": memory_s,
        "bound_s": bound_s,
        "share_of_bound": bound_s / result["ours"]["seconds"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| generation | candidates | candidates/s | peak GB | forwards saved | times faster than "
        "naive | TFLOP | GB of weights | bound s | s | share of the bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        ours = r["ours"]
        lines.append(
            f"| {name} | {ours['candidates']} | {ours['candidates_per_s']:.2f} "
            f"| {ours['peak_gb']:.1f} | {r['forwards_saved']:.1%} | {r['times_faster']:.1f} "
            f"| {r['flops'] / 1e12:.3g} | {r['block_bytes_read'] / 1e9:.3g} | {r['bound_s']:.3g} "
            f"| {ours['seconds']:.3g} | {r['share_of_bound']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--lines", type=int, default=16)
    parser.add_argument("--chunk-lines", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--continuation-tokens", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=16, help="of a generation")
    parser.add_argument("--naive", type=int, default=4, help="of them, scored without reuse too")
    parser.add_argument("--share", type=float, default=0.25, help="of the blocks, removed")
    parser.add_argument("--kl-top-k", type=int, default=256)
    parser.add_argument("--cache-gb", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here; --shape tiny --device cpu runs it small")
        return
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = random_model(arguments.shape, DTYPES[arguments.dtype], arguments.device)
    model.rayapp_fingerprint = "random"  # hashing 16 GB of noise would tell nothing
    lines = random_lines(arguments, model.config.vocab_size)
    blocks = model.config.num_hidden_layers
    removed = max(1, int(arguments.share * blocks))
    spaces = {
        "decode only": Space(blocks, 0, removed),
        "both stages": Space(blocks, removed, removed),
    }
    bounds = product_flops_per_s(model.device, model.dtype), copy_gb_per_s(model.device)
    results = {
        name: bounded(measure(model, lines, space, arguments), *bounds)
        for name, space in spaces.items()
    }
    write(arguments, results, bounds)


def write(
    arguments: argparse.Namespace,
    results: dict[str, dict[str, Any]],
    bounds: tuple[float, float],
) -> None:
    on_gpu = arguments.device != "cpu"
    hardware = torch.cuda.get_device_name() if on_gpu else "cpu"
    machine = this_machine(device=hardware, num_threads=arguments.threads)
    record = {
        "arguments": {key: value for key, value in vars(arguments).items() if key != "out"},
        "machine": machine.model_dump(),
        "product_flops_per_s": bounds[0],
        "copy_gb_per_s": bounds[1],
        "results": results,
    }
    heading = (
        f"Search on {arguments.shape} shapes, random weights, {arguments.dtype}, "
        f"{arguments.lines} lines of {arguments.prompt_tokens} + {arguments.continuation_tokens} "
        f"tokens, KL over the {arguments.kl_top_k} likeliest tokens, cache {arguments.cache_gb:g} "
        f"GB; {hardware} ({bounds[0] / 1e12:.3g} TFLOP/s, {bounds[1]:.0f} GB/s measured), torch "
        f"{machine.versions['torch']}, commit {machine.commit}. Peak memory is the device's"
        f"{'' if on_gpu else ' (here: of the process)'}, weights included.\n\n"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"search_gpu-{arguments.shape}-{arguments.dtype}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / f"{stem}.md").write_text(heading + table(results))
    print(table(results))


if __name__ == "__main__":
    main()
