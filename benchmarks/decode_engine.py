"""Claim: slot-based decode with continuous batching is not slower than ``model.generate``.

Equal batches (equal prompts, a fixed number of new tokens, end of sequence ignored), both sides
alternated in one process, medians over repeats. Timed is decoding only: from the moment when every
sequence has its first token until every sequence has its last. CPU seconds stand beside wall
seconds, because they hold on a machine that others use too.

    python benchmarks/decode_engine.py                       # the shipped test-bed model
    python benchmarks/decode_engine.py --shapes llama-150m   # random weights of a size
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.evaluation.machine import this_machine
from rayapp.models.loading import DTYPES, load_model
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.testbed import text_model_path

# hidden size, blocks, query heads, KV heads, MLP size, vocabulary
SHAPES = {
    "tiny": (64, 4, 4, 2, 160, 300),
    "llama-1m": (128, 8, 4, 2, 320, 384),
    "llama-150m": (768, 12, 12, 4, 2048, 32_000),
    "llama-8b": (4096, 32, 32, 8, 14_336, 128_256),
}


def random_model(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    hidden, blocks, heads, kv_heads, mlp, vocab = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocab,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Clock:
    """Wall and CPU seconds between two moments of this process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def spans(self) -> tuple[float, float]:
        first, last = self.marks[0], self.marks[-1]
        return last[0] - first[0], last[1] - first[1]


class MarkEachStep(StoppingCriteria):
    """Marks when each step of ``generate`` has its token; never stops it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.clock.mark()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run_engine(
    stacks: tuple[BlockStack, BlockStack], prompts: list[tuple[int, ...]], num_new: int
) -> tuple[tuple[float, float], list[list[int]]]:
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
    clock = Clock(decode_stack.device)
    clock.mark()
    while decode.num_running:
        for batch in decode.step():
            answers[batch.request_id].extend(batch.token_ids)
    clock.mark()
    return clock.spans(), list(answers.values())


def run_generate(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], num_new: int
) -> tuple[tuple[float, float], list[list[int]]]:
    settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id, settings.pad_token_id = None, 0
    settings.do_sample, settings.max_new_tokens = False, num_new
    clock = Clock(model.device)
    token_ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        found = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([MarkEachStep(clock)]),
        )
    return clock.spans(), found[:, token_ids.shape[1] :].tolist()


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written per second by one big copy: the bound of everything memory-bound."""
    size = 1 << 28 if device.type == "cuda" else 1 << 26
    source = torch.ones(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    spans = []
    for _ in range(5):
        clock = Clock(device)
        clock.mark()
        target.copy_(source)
        clock.mark()
        spans.append(clock.spans()[0])
    return 2 * source.nbytes / min(spans) / 1e9


def step_bytes(stack: BlockStack, batch: int, num_entries: float) -> int:
    """Bytes that one step must read: every weight once (of the embedding only rows), all KV."""
    weights = {p.data_ptr(): p.nbytes for p in stack.model.parameters()}
    embedding = stack.model.get_input_embeddings().weight
    if stack.model.get_output_embeddings().weight.data_ptr() != embedding.data_ptr():
        del weights[embedding.data_ptr()]
    entry_bytes = 2 * stack.num_kv_heads * stack.head_dim * stack.dtype.itemsize
    return sum(weights.values()) + int(batch * num_entries * stack.num_blocks * entry_bytes)


def measure(model: PreTrainedModel, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    num_new, length = arguments.new_tokens, arguments.prompt_tokens
    generator = torch.Generator().manual_seed(batch)
    vocab = min(250, model.config.vocab_size)
    prompts = [
        tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())
        for _ in range(batch)
    ]
    plan = PruningPlan()
    stacks = BlockStack(model, plan, "prefill"), BlockStack(model, plan, "decode")
    sides: dict[str, Callable[[], Any]] = {
        "engine": lambda: run_engine(stacks, prompts, num_new),
        "generate": lambda: run_generate(model, prompts, num_new),
    }
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    answers: dict[str, list[list[int]]] = {}
    for repeat in range(arguments.repeats + 1):  # the first one warms up
        order = list(sides) if repeat % 2 else list(reversed(sides))
        for name in order:
            span, answers[name] = sides[name]()
            if repeat:
                spans[name].append(span)
    pairs = [zip(*answers.values(), strict=True)]
    return summarise(stacks[1], batch, arguments, spans) | {
        "equal_answers": sum(ours == theirs for pair in pairs for ours, theirs in pair)
    }


def summarise(
    stack: BlockStack,
    batch: int,
    arguments: argparse.Namespace,
    spans: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    num_steps = arguments.new_tokens - 1
    result: dict[str, Any] = {"batch": batch}
    for name, seconds in spans.items():
        for kind, index in (("wall", 0), ("cpu", 1)):
            rates = [batch * num_steps / span[index] for span in seconds]
            result[f"{name}_tokens_per_{kind}_s"] = statistics.median(rates)
            result[f"{name}_tokens_per_{kind}_s_all"] = rates
    for kind in ("wall", "cpu"):
        ratios = [
            ours / theirs
            for ours, theirs in zip(
                result[f"engine_tokens_per_{kind}_s_all"],
                result[f"generate_tokens_per_{kind}_s_all"],
                strict=True,
            )
        ]
        result[f"ratio_{kind}"] = statistics.median(ratios)
        result[f"ratio_{kind}_range"] = [min(ratios), max(ratios)]
    moved = step_bytes(stack, batch, arguments.prompt_tokens + num_steps / 2)
    result["bytes_per_step"] = moved
    result["gb_per_s"] = moved * result["engine_tokens_per_wall_s"] / batch / 1e9
    return result


def table(results: list[dict[str, Any]], bound_gb_per_s: float) -> str:
    lines = [
        "| batch | engine, tokens/s | generate, tokens/s | ratio (wall) | ratio (CPU) "
        "| MB per step | GB/s | share of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        wall, cpu = r["ratio_wall_range"], r["ratio_cpu_range"]
        lines.append(
            f"| {r['batch']} | {r['engine_tokens_per_wall_s']:.0f} "
            f"| {r['generate_tokens_per_wall_s']:.0f} "
            f"| {r['ratio_wall']:.2f} ({wall[0]:.2f}-{wall[1]:.2f}) "
            f"| {r['ratio_cpu']:.2f} ({cpu[0]:.2f}-{cpu[1]:.2f}) "
            f"| {r['bytes_per_step'] / 1e6:.1f} | {r['gb_per_s']:.1f} "
            f"| {r['gb_per_s'] / bound_gb_per_s:.2f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory; default: the test-bed model")
    parser.add_argument("--shapes", choices=sorted(SHAPES), help="random weights instead")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.shapes:
        model = random_model(arguments.shapes, DTYPES[arguments.dtype], arguments.device)
        name = arguments.shapes
    else:
        path = arguments.model or text_model_path()
        model = load_model(path, dtype=arguments.dtype, device=arguments.device).model
        name = path.name if arguments.model else "testbed-text"
    bound = copy_gb_per_s(model.device)
    results = []
    for batch in arguments.batch:
        results.append(measure(model, batch, arguments))
        r = results[-1]
        print(
            f"batch {batch}: {r['engine_tokens_per_wall_s']:.0f} against "
            f"{r['generate_tokens_per_wall_s']:.0f} tokens/s, ratio {r['ratio_wall']:.2f} wall, "
            f"{r['ratio_cpu']:.2f} CPU; {r['gb_per_s']:.1f} of {bound:.1f} GB/s; "
            f"{r['equal_answers']} of {batch} answers equal"
        )
    write(arguments, name, results, bound)


def write(
    arguments: argparse.Namespace, name: str, results: list[dict[str, Any]], bound: float
) -> None:
    on_gpu = arguments.device != "cpu"
    hardware = torch.cuda.get_device_name() if on_gpu else "cpu"
    machine = this_machine(device=hardware, num_threads=arguments.threads)
    configuration = {
        "model": name,
        "dtype": arguments.dtype,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
    }
    stem = f"decode_engine-{name}-{arguments.dtype}" + ("-gpu" if on_gpu else "")
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {
        "configuration": configuration,
        "machine": machine.model_dump(),
        "copy_gb_per_s": bound,
        "results": results,
    }
    (arguments.out / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n")
    heading = (
        f"Decode engine against `model.generate`: {name}, {arguments.dtype}, "
        f"{arguments.prompt_tokens} prompt and {arguments.new_tokens} new tokens, "
        f"{arguments.threads} thread(s), medians of {arguments.repeats} "
        f"(ranges in brackets); {machine.processor}, {hardware}, torch "
        f"{machine.versions['torch']}, transformers {machine.versions['transformers']}, "
        f"commit {machine.commit}.\n\n"
    )
    text = heading + table(results, bound) + "\n"
    (arguments.out / f"{stem}.md").write_text(text)
    print(table(results, bound))


if __name__ == "__main__":
    main()
