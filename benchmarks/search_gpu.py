"""Claim: a search over Llama-3.1-8B fits one GPU, and reuse saves most of its work there too.

The weights are random and made on the device: speed and memory do not depend on training, and
scores mean nothing. Ray is not used. Two generations of a search (a random start and its
neighbours) are scored, one that changes decode alone and one that changes both stages, on fresh
evaluators after an uncounted run that warms up. A few of the candidates are scored again with
nothing reused.

Beside the seconds stands the bound of the device: the floating-point operations that were counted,
at the rate that one big product reaches, or the weights of every block that ran, at the rate of one
big copy, whichever takes longer.

    python benchmarks/search_gpu.py
    python benchmarks/search_gpu.py --shape tiny --device cpu --dtype float32   # the same, small
"""

from __future__ import annotations

import random
import resource
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from hardware.clock import Clock
from hardware.rates import Rates, measured_rates
from recorder.options import (
    add_device,
    add_dtype,
    add_seed,
    add_shape,
    benchmark_parser,
    speed_label,
)
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from shapes.llama import SHAPES, random_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from rayapp.data.lines import TokenizedLine
from rayapp.models.architecture import DTYPES
from rayapp.models.blocks import decoder_blocks
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.settings.objective import Objective


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_shape(options, SHAPES, "llama-8b")
    add_device(options, "cuda")
    add_dtype(options, "bfloat16")
    add_seed(options, "the weights, the lines and the candidates")
    options.add_argument("--lines", type=int, default=16)
    options.add_argument("--chunk-lines", type=int, default=8)
    options.add_argument("--prompt-tokens", type=int, default=512)
    options.add_argument("--continuation-tokens", type=int, default=64)
    options.add_argument("--candidates", type=int, default=16, help="of a generation")
    options.add_argument("--naive", type=int, default=4, help="of them, scored without reuse too")
    options.add_argument("--share", type=float, default=0.25, help="of the blocks, removed")
    options.add_argument("--kl-top-k", type=int, default=256)
    options.add_argument("--cache-gb", type=float, default=24.0)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    model = random_llama(arguments.shape, DTYPES[arguments.dtype], arguments.device)
    lines = random_lines(arguments, model.config.vocab_size)
    blocks = model.config.num_hidden_layers
    removed = max(1, int(arguments.share * blocks))
    spaces = {
        "decode only": Space(blocks, 0, removed),
        "both stages": Space(blocks, removed, removed),
    }
    best = measured_rates(model.device, model.dtype)
    results = {
        name: bounded(measured_generation(model, lines, space, arguments), best)
        for name, space in spaces.items()
    }
    recorder.write(
        product_flops_per_s=best.flops_per_s,
        copy_gb_per_s=best.bytes_per_s / 1e9,
        results=results,
    )


def random_lines(arguments: Namespace, vocab: int) -> Calibration:
    rng = random.Random(arguments.seed)
    prompt, answer = arguments.prompt_tokens, arguments.continuation_tokens
    rows = [rng.choices(range(vocab), k=prompt + answer) for _ in range(arguments.lines)]
    lines = [TokenizedLine(tuple(row[:prompt]), tuple(row[prompt:]), "random") for row in rows]
    return cut(lines, chunk_tokens=arguments.chunk_lines * (prompt + answer))


def generation(space: Space, arguments: Namespace) -> list[Candidate]:
    """A random candidate and some of its neighbours, ascending, as a search asks for them."""
    rng = random.Random(arguments.seed)
    start = space.draw(rng)
    neighbours = space.swaps(start)
    count = min(arguments.candidates - 1, len(neighbours))
    return sorted([start, *rng.sample(neighbours, count)])


class Pass:
    """Scores candidates on a fresh evaluator, and measures its cost."""

    def __init__(
        self, model: PreTrainedModel, lines: Calibration, arguments: Namespace, gb: float
    ) -> None:
        self._device = model.device
        self._objective = Objective(kl_top_k=arguments.kl_top_k)
        self._evaluator = Evaluator(model, lines, self._objective, cache_bytes=int(gb * 2**30))
        self._chunks = range(len(lines.chunks))

    def run(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Make the references first, uncounted in forwards and seconds, as a search makes them
        once.
        """
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        forwards, blocks, seconds = 0.0, 0, 0.0
        sums: list[list[float]] = [[] for _ in candidates]
        for chunk in self._chunks:
            self._evaluator.line_sums([], chunk)
            before = self._evaluator.forwards, self._evaluator.blocks_run
            clock = Clock(self._device)
            line_sums = self._evaluator.line_sums(candidates, chunk)
            seconds += clock.lap()
            forwards += self._evaluator.forwards - before[0]
            blocks += self._evaluator.blocks_run - before[1]
            for row, values in zip(sums, line_sums, strict=True):
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

    def _peak_bytes(self) -> int:
        """Peak bytes of the device; on a CPU, of the whole process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def counted_flops(warming: Pass, candidates: Sequence[Candidate]) -> int:
    """Operations of scoring the candidates, without those of the references."""
    warming.run([])
    counter = FlopCounterMode(display=False)
    with counter:
        warming.run(candidates)
    return int(counter.get_total_flops())


def measured_generation(
    model: PreTrainedModel, lines: Calibration, space: Space, arguments: Namespace
) -> dict[str, Any]:
    """One generation with reuse, a part of it without, and its distance from the device's bound."""
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


def bounded(result: dict[str, Any], best: Rates) -> dict[str, Any]:
    """A row with the least seconds that the device needs, and the share reached."""
    bound_s = best.seconds(result["flops"], result["block_bytes_read"])
    return {
        **result,
        "compute_s": result["flops"] / best.flops_per_s,
        "memory_s": result["block_bytes_read"] / best.bytes_per_s,
        "bound_s": bound_s,
        "share_of_bound": bound_s / result["ours"]["seconds"],
    }


def report(record: Record) -> list[Block]:
    asked, device = record["configuration"], record["machine"]["device"]
    columns = (
        *("generation", "candidates", "candidates/s", "peak GB", "forwards saved"),
        *("times faster than naive", "TFLOP", "GB of weights", "bound s", "s"),
        "share of the bound",
    )
    rows = [
        (
            *(name, str(r["ours"]["candidates"]), f"{r['ours']['candidates_per_s']:.2f}"),
            *(f"{r['ours']['peak_gb']:.1f}", f"{r['forwards_saved']:.1%}"),
            *(f"{r['times_faster']:.1f}", f"{r['flops'] / 1e12:.3g}"),
            *(f"{r['block_bytes_read'] / 1e9:.3g}", f"{r['bound_s']:.3g}"),
            *(f"{r['ours']['seconds']:.3g}", f"{r['share_of_bound']:.0%}"),
        )
        for name, r in record["results"].items()
    ]
    return [
        f"Search on {asked['shape']} shapes, random weights, {asked['dtype']}, "
        f"{asked['lines']} lines of {asked['prompt_tokens']} + {asked['continuation_tokens']} "
        f"tokens, KL over the {asked['kl_top_k']} likeliest tokens, cache {asked['cache_gb']:g} "
        f"GB. The device reaches {record['product_flops_per_s'] / 1e12:.3g} TFLOP/s and "
        f"{record['copy_gb_per_s']:.0f} GB/s. Peak memory is the device's"
        f"{' (here: of the process)' if device == 'cpu' else ''}, weights included.",
        Table(columns, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report, label=speed_label)
