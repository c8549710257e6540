"""Claim: prefill costs what its products cost, for long prompts and for many short ones.

Two tables, all sides alternated in one process, medians over runs. Long prompts: one prompt of a
length, prefilled whole and in chunks of ``--chunk`` tokens, beside a forward pass of transformers
that fills a cache and makes the last token's logits. Short prompts: a batch of them in one pass of
the engine, and one by one, beside one batched forward pass of transformers. The engine computes on
weights that it has packed, transformers on plain ones. CPU seconds stand beside wall seconds,
because they hold on a machine that others use too.

    python benchmarks/prefill_engine.py --shape llama-150m --dtype bfloat16
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hardware.clock import Moment
from hardware.turns import in_turns
from recorder.options import (
    add_device,
    add_dtype,
    add_model,
    add_shape,
    benchmark_parser,
    speed_label,
)
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from shapes.chosen import model_of
from shapes.llama import SHAPES
from transformers import PreTrainedModel

from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.products.stages import pack_stages
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGES, PruningPlan

Prompts = Sequence[tuple[int, ...]]
Side = Callable[[Prompts], list[int]]
"""Reads prompts; returns the first answer token of each."""

PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_shape(options, SHAPES)
    add_dtype(options, "bfloat16")
    add_device(options, "cpu")
    options.add_argument("--lengths", type=int, nargs="+", default=[1000, 3000, 6000])
    options.add_argument("--chunk", type=int, default=512)
    options.add_argument("--short", type=int, nargs=2, default=[32, 128], metavar=("N", "TOKENS"))
    options.add_argument("--runs", type=int, default=3, help="timed, of each side")
    return options


def measure(recorder: Recorder) -> None:
    asked = recorder.arguments
    plain, own = model_of(asked), model_of(asked)
    pack_stages(own, PruningPlan(), STAGES)
    limit = max(*asked.lengths, asked.short[1]) + 2
    stack = BlockStack(own, PruningPlan(), "prefill")
    engine = PrefillEngine(stack, PruningPlan(), max_model_len=limit)
    rows: list[dict[str, Any]] = []
    for length in asked.lengths:
        sides: dict[str, Side] = {
            "engine, whole": lambda prompts: prefilled(engine, prompts, None),
            "engine, chunks": lambda prompts: prefilled(engine, prompts, asked.chunk),
            "transformers": lambda prompts: forward(plain, prompts),
        }
        rows += timed(sides, random_prompts(plain, 1, length), asked.runs)
        recorder.write(results=rows)
    count, length = asked.short
    sides = {
        "engine, one pass": lambda prompts: prefilled(engine, prompts, None),
        "engine, one by one": lambda prompts: [
            token for prompt in prompts for token in prefilled(engine, [prompt], None)
        ],
        "transformers": lambda prompts: forward(plain, prompts),
    }
    rows += timed(sides, random_prompts(plain, count, length), asked.runs)
    recorder.write(results=rows)


def random_prompts(model: PreTrainedModel, count: int, length: int) -> Prompts:
    generator = torch.Generator().manual_seed(count * length)
    vocab = min(250, model.config.vocab_size)
    ids = torch.randint(0, vocab, (count, length), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def prefilled(engine: PrefillEngine, prompts: Prompts, chunk: int | None) -> list[int]:
    """Run prompts together, whole or a chunk of each at a time."""
    runs = [
        engine.begin(GenerationRequest(str(number), prompt, PARAMS))
        for number, prompt in enumerate(prompts)
    ]
    tokens = []
    while any(run.num_left for run in runs):
        parts = [(run, min(run.num_left, chunk or run.num_left)) for run in runs if run.num_left]
        for output in engine.advance(parts):
            assert output.first is not None
            tokens += output.first.token_ids
    return tokens


@torch.inference_mode()
def forward(model: PreTrainedModel, prompts: Prompts) -> list[int]:
    """One batched forward pass that fills a cache, and the logits of the last tokens."""
    ids = torch.tensor(prompts, device=model.device)
    output: Any = model(ids, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].argmax(-1).tolist()


def timed(sides: dict[str, Side], prompts: Prompts, num_runs: int) -> list[dict[str, Any]]:
    """A row per side: medians of wall and CPU seconds, and whether its tokens are the first's."""
    spans: dict[str, list[Moment]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {}
    device = torch.device("cpu")
    for name, counts in in_turns(list(sides), num_runs):
        began = Moment.now(device)
        tokens[name] = sides[name](prompts)
        if counts:
            spans[name].append(Moment.now(device).since(began))
    expected = tokens["transformers"]
    rows = []
    for name, every in spans.items():
        walls, cpus = ([getattr(span, f"{kind}_s") for span in every] for kind in ("wall", "cpu"))
        equal = sum(a == b for a, b in zip(tokens[name], expected, strict=True))
        row = {"prompts": len(prompts), "tokens": len(prompts[0]), "side": name, "equal": equal}
        rows.append({**row, "wall_s": walls, "cpu_s": cpus})
        print(f"{len(prompts)} x {len(prompts[0])}, {name}: {min(cpus):.2f} s of CPU", flush=True)
    return rows


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    columns = (
        *("prompts", "tokens each", "side", "seconds", "CPU seconds", "tokens per CPU second"),
        *("time of transformers over this (CPU)", "equal first tokens"),
    )
    base = {
        (row["prompts"], row["tokens"]): statistics.median(row["cpu_s"])
        for row in record["results"]
        if row["side"] == "transformers"
    }
    rows = []
    for row in record["results"]:
        wall, cpu = (statistics.median(row[f"{kind}_s"]) for kind in ("wall", "cpu"))
        size = row["prompts"] * row["tokens"]
        ratio = base[row["prompts"], row["tokens"]] / cpu
        rows.append(
            (
                *(str(row["prompts"]), f"{row['tokens']:,}", row["side"]),
                *(f"{wall:.2f}", f"{cpu:.2f}", f"{size / cpu:,.0f}", f"{ratio:.2f}"),
                f"{row['equal']} of {row['prompts']}",
            )
        )
    name = asked.get("shape") or asked["model"]
    return [
        f"Prefill: {name}, {asked['dtype']}, medians of {asked['runs']}; chunks are of "
        f"{asked['chunk']} tokens.",
        Table(columns, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report, label=speed_label)
