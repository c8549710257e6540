"""Claim: slot-based decode with continuous batching is not slower than ``model.generate``.

Equal batches (equal prompts, a fixed number of new tokens, end of sequence ignored), both sides
alternated in one process, medians over repeats. Timed is decoding only: from the moment when every
sequence has its first token until every sequence has its last. CPU seconds stand beside wall
seconds, because they hold on a machine that others use too.

    python benchmarks/decode_engine.py                       # the shipped test-bed model
    python benchmarks/decode_engine.py --shape llama-150m   # random weights of a size
"""

from __future__ import annotations

import copy
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch
from hardware.clock import Moment
from hardware.rates import copy_bytes_per_s
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
from recorder.table import Table, interval
from shapes.chosen import model_of
from shapes.llama import SHAPES
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.models.blocks import find_decoder
from rayapp.models.products.joined import named_weights
from rayapp.models.products.packed import weight_of
from rayapp.models.products.stages import pack_stages
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGES, PruningPlan

Prompts = list[tuple[int, ...]]
Timed = tuple[Moment, list[list[int]]]
"""Seconds of decoding, and all answers."""


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_shape(options, SHAPES)
    add_dtype(options, "float32")
    add_device(options, "cpu")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--answer-tokens", type=int, default=64)
    options.add_argument("--runs", type=int, default=7, help="timed, of each side")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    model, own = model_of(arguments), model_of(arguments)
    pack_stages(own, PruningPlan(), STAGES)
    bound = copy_bytes_per_s(model.device) / 1e9
    rows = []
    for batch in arguments.batch:
        rows.append(measured_batch(model, own, batch, arguments))
        print(f"batch {batch}: {rows[-1]['equal_answers']} of {batch} answers equal", flush=True)
        recorder.write(copy_gb_per_s=bound, results=rows)


def measured_batch(
    model: PreTrainedModel, own: PreTrainedModel, batch: int, arguments: Namespace
) -> dict[str, Any]:
    """Time one batch: the engine on ``own``, whose products it has packed, and ``generate``."""
    num_new, length = arguments.answer_tokens, arguments.prompt_tokens
    generator = torch.Generator().manual_seed(batch)
    vocab = min(250, model.config.vocab_size)
    prompts = [
        tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())
        for _ in range(batch)
    ]
    plan = PruningPlan()
    stacks = BlockStack(own, plan, "prefill"), BlockStack(own, plan, "decode")
    sides: dict[str, Callable[[], Timed]] = {
        "engine": lambda: run_engine(stacks, prompts, num_new),
        "generate": lambda: run_generate(model, prompts, num_new),
    }
    spans: dict[str, list[Moment]] = {name: [] for name in sides}
    answers: dict[str, list[list[int]]] = {}
    for name, counts in in_turns(list(sides), arguments.runs):
        span, answers[name] = sides[name]()
        if counts:
            spans[name].append(span)
    pairs = zip(*answers.values(), strict=True)
    found = rates(batch * (num_new - 1), spans)
    moved = step_bytes(stacks[1], batch, length + (num_new - 1) / 2)
    return {
        "batch": batch,
        **found,
        "bytes_per_step": moved,
        "gb_per_s": moved * found["engine_tokens_per_wall_s"] / batch / 1e9,
        "equal_answers": sum(ours == theirs for ours, theirs in pairs),
    }


def run_engine(stacks: tuple[BlockStack, BlockStack], prompts: Prompts, num_new: int) -> Timed:
    prefill_stack, decode_stack = stacks
    plan, limit = PruningPlan(), len(prompts[0]) + num_new
    prefill = PrefillEngine(prefill_stack, plan, max_model_len=limit)
    decode = DecodeEngine(decode_stack, plan, max_num_seqs=len(prompts), max_model_len=limit)
    params = SamplingParams(max_tokens=num_new, ignore_eos=True)
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        request = GenerationRequest(str(number), prompt, params)
        output = prefill.run(request)
        assert output.segment is not None
        assert output.first is not None
        answers[request.request_id] = list(output.first.token_ids)
        decode.admit(request, output.segment, output.first)
    began = Moment.now(decode_stack.device)
    while decode.num_running:
        for batch in decode.step():
            answers[batch.request_id].extend(batch.token_ids)
    return Moment.now(decode_stack.device).since(began), list(answers.values())


class MarkEachStep(StoppingCriteria):
    """Marks the time at which each step of ``generate`` has its token; it never stops the model."""

    def __init__(self) -> None:
        self.marks: list[Moment] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.marks.append(Moment.now(input_ids.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_generate(model: PreTrainedModel, prompts: Prompts, num_new: int) -> Timed:
    settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id, settings.pad_token_id = None, 0
    settings.do_sample, settings.max_new_tokens = False, num_new
    steps = MarkEachStep()
    token_ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        found = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([steps]),
        )
    span = steps.marks[-1].since(steps.marks[0])
    return span, found[:, token_ids.shape[1] :].tolist()


def rates(num_tokens: int, spans: dict[str, list[Moment]]) -> dict[str, Any]:
    """Tokens per second of both sides on both clocks, and their ratios run by run."""
    found: dict[str, Any] = {}
    for kind in ("wall", "cpu"):
        every = {
            name: [num_tokens / getattr(span, f"{kind}_s") for span in runs]
            for name, runs in spans.items()
        }
        for name, tokens_per_s in every.items():
            found[f"{name}_tokens_per_{kind}_s"] = statistics.median(tokens_per_s)
            found[f"{name}_tokens_per_{kind}_s_all"] = tokens_per_s
        ratios = [
            ours / theirs for ours, theirs in zip(every["engine"], every["generate"], strict=True)
        ]
        found[f"ratio_{kind}"] = statistics.median(ratios)
        found[f"ratio_{kind}_range"] = [min(ratios), max(ratios)]
    return found


def step_bytes(stack: BlockStack, batch: int, num_entries: float) -> int:
    """Bytes that one step must read: every weight once (only rows of the embedding), and all KV."""
    blocks = sum(weight.nbytes for block in stack.blocks for _, weight in named_weights(block))
    head = weight_of(stack.model.get_output_embeddings())
    norm = find_decoder(stack.model).norm.weight
    entry_bytes = 2 * stack.num_kv_heads * stack.head_dim * stack.dtype.itemsize
    return (
        blocks
        + norm.nbytes
        + head.nbytes
        + int(batch * num_entries * stack.num_blocks * entry_bytes)
    )


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    columns = (
        *("batch", "engine, tokens/s", "generate, tokens/s", "ratio (wall)", "ratio (CPU)"),
        *("MB per step", "GB/s", "share of copy bandwidth"),
    )
    rows = [
        (
            str(r["batch"]),
            *(f"{r[f'{side}_tokens_per_wall_s']:.0f}" for side in ("engine", "generate")),
            *(interval(r[f"ratio_{k}"], r[f"ratio_{k}_range"], ".2f") for k in ("wall", "cpu")),
            *(f"{r['bytes_per_step'] / 1e6:.1f}", f"{r['gb_per_s']:.1f}"),
            f"{r['gb_per_s'] / record['copy_gb_per_s']:.2f}",
        )
        for r in record["results"]
    ]
    return [
        f"Decode engine against `model.generate`: {name_of(asked)}, {asked['dtype']}, "
        f"{asked['prompt_tokens']} prompt and {asked['answer_tokens']} new tokens, medians of "
        f"{asked['runs']} (ranges in brackets).",
        Table(columns, rows),
    ]


def name_of(asked: dict[str, Any]) -> str:
    """The name of the shape if one was chosen, else of the model."""
    return str(asked.get("shape") or asked["model"])


if __name__ == "__main__":
    run(parser(), measure, report, label=speed_label)
