"""Claim: KV in pages costs a decode step nothing, and no row pays for another's length.

Three questions about one engine, with prompts of noise in place of real KV:

1. Rows of equal length: a step over pages beside a step over slots of one length.
2. Many short rows beside a long one: a step of all beside the steps of both kinds measured apart.
3. How many short sequences run in the memory of eight slots of the longest, and what keeping
   them in place costs once memory is nearly full and sequences come and go.

    python benchmarks/paged_decode.py --model out/models/smollm2-135m
    python benchmarks/paged_decode.py --shape llama-150m --rows 1 8 --long 2000
"""

from __future__ import annotations

import random
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hardware.clock import Moment
from hardware.turns import in_turns
from recorder.options import (
    add_dtype,
    add_model,
    add_shape,
    benchmark_parser,
    speed_label,
)
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table, interval
from shapes.chosen import model_of
from shapes.llama import SHAPES
from speed.slots import SlotKV
from transformers import PreTrainedModel

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.engine.sequences.memory import BLOCK_SIZE, KVMemory
from rayapp.errors import OverloadedError
from rayapp.kv.segment import BlockKV, KVSegment
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

Step = Callable[[], object]


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_shape(options, SHAPES)
    add_dtype(options, "float32")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    options.add_argument("--tokens", type=int, default=200, help="of a short sequence")
    options.add_argument("--long", type=int, default=8000, help="tokens of the long sequence")
    options.add_argument("--short-rows", type=int, default=63, help="beside the long sequence")
    options.add_argument("--slots", type=int, default=8, help="whose memory is filled")
    options.add_argument("--max-model-len", type=int, default=8192, help="tokens of such a slot")
    options.add_argument("--block-size", type=int, default=BLOCK_SIZE)
    options.add_argument("--steps", type=int, default=8, help="of every timed turn")
    options.add_argument("--runs", type=int, default=5, help="timed, of each side")
    options.add_argument("--churn-steps", type=int, default=150)
    return options


def measure(recorder: Recorder) -> None:
    asked = recorder.arguments
    bench = Bench(model_of(asked), asked.block_size, asked.steps, asked.runs)
    found: dict[str, Any] = {"equal": []}
    for rows in asked.rows:
        found["equal"].append(bench.equal_rows(rows, asked.tokens))
        recorder.write(**found)
        print(found["equal"][-1], flush=True)
    found["ragged"] = bench.ragged_rows(max(asked.rows), asked.tokens)
    recorder.write(**found)
    found["mixed"] = bench.mixed_rows(asked.short_rows, asked.tokens, asked.long)
    recorder.write(**found)
    print(found["mixed"], flush=True)
    found["full"] = bench.full_memory(
        asked.slots, asked.max_model_len, asked.tokens, asked.churn_steps
    )
    recorder.write(**found)


class Bench:
    """Measurements of one model's decode stage."""

    def __init__(self, model: PreTrainedModel, block_size: int, steps: int, runs: int) -> None:
        self._stack = BlockStack(model, PruningPlan(), "decode")
        self._block_size, self._steps, self._runs = block_size, steps, runs
        self._segments: dict[int, KVSegment] = {}
        self._names = 0

    def equal_rows(self, rows: int, tokens: int) -> dict[str, Any]:
        """A step over pages beside a step over slots, with ``rows`` rows of ``tokens`` tokens."""
        spans = self._in_turns(
            {
                "pages": lambda: self._paged([tokens] * rows),
                "slots": lambda: self._in_slots([tokens] * rows),
            }
        )
        return {"rows": rows, **_medians(spans), **_ratios(spans, ["pages"], ["slots"])}

    def ragged_rows(self, rows: int, tokens: int) -> dict[str, Any]:
        """The same with lengths between a quarter of ``tokens`` and twice as many."""
        rng = random.Random(rows)
        lengths = [rng.randint(tokens // 4, 2 * tokens) for _ in range(rows)]
        spans = self._in_turns(
            {"pages": lambda: self._paged(lengths), "slots": lambda: self._in_slots(lengths)}
        )
        return {"rows": rows, **_medians(spans), **_ratios(spans, ["pages"], ["slots"])}

    def mixed_rows(self, short_rows: int, tokens: int, long: int) -> dict[str, Any]:
        """A step of short rows and a long one, beside a step of each kind alone."""
        lengths = [tokens] * short_rows
        spans = self._in_turns(
            {
                "all": lambda: self._paged([*lengths, long]),
                "short": lambda: self._paged(lengths),
                "long": lambda: self._paged([long]),
            }
        )
        return {**_medians(spans), **_ratios(spans, ["all"], ["short", "long"])}

    def _in_turns(self, sides: dict[str, Callable[[], Step]]) -> dict[str, list[Moment]]:
        spans: dict[str, list[Moment]] = {name: [] for name in sides}
        steps = {name: side() for name, side in sides.items()}
        for name, counts in in_turns(list(sides), self._runs):
            began = Moment.now(torch.device("cpu"))
            for _ in range(self._steps):
                steps[name]()
            if counts:
                spans[name].append(Moment.now(torch.device("cpu")).since(began))
        return spans

    @property
    def _num_steps(self) -> int:
        return self._steps * (self._runs + 1)

    def _paged(self, lengths: Sequence[int]) -> Step:
        """The step of an engine with sequences of ``lengths`` tokens before the first step."""
        limit = max(lengths) + self._num_steps + 2
        room = 2 * (sum(lengths) + len(lengths) * (self._num_steps + self._block_size))
        num_bytes = self._entry_bytes * max(room, limit + self._block_size)
        engine = self._engine(len(lengths), limit, num_bytes)
        for length in lengths:
            self._admit(engine, length, self._num_steps)
        return engine.step

    def _engine(
        self, max_num_seqs: int, max_model_len: int, num_bytes: int | None = None
    ) -> DecodeEngine:
        return DecodeEngine(
            self._stack,
            PruningPlan(),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            memory=KVMemory(num_bytes, self._block_size),
        )

    def _admit(self, engine: DecodeEngine, length: int, num_tokens: int) -> None:
        """Admit a sequence that is fed tokens as if they were known, so that none is sampled."""
        self._names += 1
        sampling = SamplingParams(max_tokens=num_tokens + 2, ignore_eos=True)
        request = GenerationRequest(str(self._names), (1,) * length, sampling)
        engine.admit(request, self._segment(length), replay=(1,) * (num_tokens + 1))

    def _segment(self, length: int) -> KVSegment:
        """A prompt's KV of noise."""
        if length not in self._segments:
            shape_HND = (self._stack.num_kv_heads, length, self._stack.head_dim)
            positions_N = torch.arange(length)
            noise = [torch.randn(shape_HND).to(self._stack.dtype) for _ in range(2)]
            blocks = [BlockKV(b, *noise, positions_N) for b in range(self._stack.num_blocks)]
            self._segments[length] = KVSegment(tuple(blocks), length, length)
        return self._segments[length]

    def _in_slots(self, lengths: Sequence[int]) -> Step:
        """The same step over slots."""
        longest = max(lengths) + self._num_steps + 1
        cache = SlotKV(self._stack, lengths, longest)
        blocks, positions = SingleTokenStack(self._stack), torch.tensor(lengths)[:, None]

        @torch.inference_mode()
        def step() -> object:
            cache.begin_step()
            positions.add_(1)
            hidden_B1E = self._stack.embed(torch.ones_like(positions))
            hidden_B1E = blocks.run(hidden_B1E, positions, cache, {})
            return self._stack.logits(hidden_B1E)[:, 0]

        return step

    def full_memory(
        self, slots: int, max_model_len: int, tokens: int, num_steps: int
    ) -> dict[str, Any]:
        """Fill the memory of slots with short sequences, then let sequences come and go."""
        num_bytes = self._engine(slots, max_model_len).kv_bytes
        engine, count = self._engine(100_000, max_model_len, num_bytes), 0
        try:
            while True:
                self._admit(engine, tokens - 8, 8)
                count += 1
        except OverloadedError:
            pass
        engine.check_integrity()
        churned = self._churn(self._engine(100_000, max_model_len, num_bytes), tokens, num_steps)
        return {"sequences": count, "num_bytes": num_bytes, **churned}

    def _churn(self, engine: DecodeEngine, tokens: int, num_steps: int) -> dict[str, Any]:
        """Let random sequences come while there is room; time only what pages cost, no model."""
        rng = random.Random(0)
        seconds, entries, aside, usage = 0.0, 0, 0, []
        for _ in range(num_steps):
            try:
                while True:
                    long = rng.random() < 0.05
                    length = tokens * 8 if long else rng.randint(tokens // 4, tokens)
                    self._admit(engine, length, rng.choice((8, 32, 64)))
            except OverloadedError:
                pass
            began = time.process_time()
            engine.make_room()
            seconds += time.process_time() - began
            usage.append(engine.usage)
            aside += engine.num_aside
            sequences = engine.running
            entries += sum(sequence.kv[0].sheet.used for sequence in sequences)
            engine.pages.begin_step([s.kv for s in sequences], [s.position for s in sequences])
            for sequence in sequences:
                sequence.position += 1
                sequence.pending.popleft()
                if not sequence.pending:
                    engine.cancel(sequence.request.request_id)
        read_s = entries * self._entry_bytes / self._rate()
        return {
            "churn_room_s": seconds,
            "churn_read_s": read_s,
            "churn_usage": statistics.mean(usage),
            "churn_aside": aside / num_steps,
        }

    @property
    def _entry_bytes(self) -> int:
        stack = self._stack
        return 2 * stack.num_blocks * stack.num_kv_heads * stack.head_dim * stack.dtype.itemsize

    def _rate(self) -> float:
        """Bytes per CPU second at which this machine attends over long rows."""
        shape_1HLD = (1, self._stack.num_kv_heads, 20_000, self._stack.head_dim)
        keys, values = (torch.randn(shape_1HLD).to(self._stack.dtype) for _ in range(2))
        groups = self._stack.num_query_heads // self._stack.num_kv_heads
        query = keys[:, :, :groups].contiguous()
        began = time.process_time()
        for _ in range(10):
            torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        return 10 * 2 * keys.nbytes / (time.process_time() - began)


def _medians(spans: dict[str, list[Moment]]) -> dict[str, Any]:
    return {
        f"{name}_{kind}_s": statistics.median(getattr(span, f"{kind}_s") for span in runs)
        for name, runs in spans.items()
        for kind in ("wall", "cpu")
    }


def _ratios(
    spans: dict[str, list[Moment]], upper: Sequence[str], lower: Sequence[str]
) -> dict[str, Any]:
    """CPU seconds of the sides in ``upper`` over those in ``lower``, run by run."""
    ratios = []
    for run_number in range(len(spans[upper[0]])):
        above, below = (
            sum(spans[name][run_number].cpu_s for name in names) for names in (upper, lower)
        )
        ratios.append(above / below)
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    name = asked.get("shape") or asked["model"]
    steps, ragged = asked["steps"], record.get("ragged")
    blocks: list[Block] = [
        f"Decode over pages of {asked['block_size']} tokens: {name}, {asked['dtype']}, "
        f"{asked['tokens']} tokens per row, CPU time, medians of {asked['runs']} (ranges in "
        "brackets); ragged rows have between a quarter of these tokens and twice as many.",
        Table(
            ("rows", "ms per step, pages", "ms per step, slots", "ratio"),
            [
                (
                    f"{r['rows']}{', ragged' if r is ragged else ''}",
                    *(f"{r[f'{side}_cpu_s'] / steps * 1e3:.1f}" for side in ("pages", "slots")),
                    interval(r["ratio"], r["ratio_range"], ".2f"),
                )
                for r in (*record["equal"], *([ragged] if ragged else []))
            ],
        ),
    ]
    mixed, full = record.get("mixed"), record.get("full")
    if mixed:
        ms = {k: mixed[f"{k}_cpu_s"] / steps * 1e3 for k in ("all", "short", "long")}
        ratio = interval(mixed["ratio"], mixed["ratio_range"], ".2f")
        blocks.append(
            f"{asked['short_rows']} rows of {asked['tokens']} tokens beside one of "
            f"{asked['long']}: {ms['all']:.0f} ms per step; apart {ms['short']:.0f} and "
            f"{ms['long']:.0f} ms, so {ratio} times their sum."
        )
    if full:
        share = full["churn_room_s"] / full["churn_read_s"]
        blocks.append(
            f"In the memory of {asked['slots']} slots of {asked['max_model_len']} tokens, "
            f"{full['sequences']} sequences of {asked['tokens']} tokens run. With sequences that "
            f"come and go, {full['churn_usage']:.0%} of the pages are filled, and making room "
            f"takes {share:.1%} of the time in which attention reads the KV; "
            f"{full['churn_aside']:.1f} sequences are set aside on average."
        )
    return blocks


if __name__ == "__main__":
    run(parser(), measure, report, label=speed_label)
