"""Claim: what a plan gains end to end is known from the link's speed over the prefill's speed.

The horizontal axis of the map is the time that the dense KV takes on the link over the time of the
dense prefill; the vertical one is how many times faster than dense a request ends. Prefill, decode
steps, and packing with unpacking are measured here, bytes are those of whole messages, and the link
is computed: it moves its bits and does nothing else. A GPU is put on the same map by assumptions
that are options (`--gpu-*`) and stand on the page.

    python benchmarks/break_even.py --model MODEL --prefill-blocks 18 19 20 21 22 23 24 25 26 27 \
        --decode-blocks 12 13 14 15
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from handoff.gains import Comparison, Costs, dense_ratio
from handoff.timed import Sizes, timed_costs
from recorder.curves import Curve, CurvePanel, Curves
from recorder.options import add_dtype, add_model, add_seed, benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table
from shapes.llama import SHAPES

from rayapp.errors import InputError
from rayapp.models.blocks import signature_of
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import KVTransfer, PruningPlan
from rayapp.pruning.kv_choice.bytes import KVBytes
from rayapp.pruning.kv_choice.settings import FIRST

DENSE = "dense"
NUM_POINTS = 61
"""Points of a curve (project default)."""


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "auto", auto=True)
    add_seed(options, "the prompt")
    options.add_argument("--caption", help="the model's name and origin, as the page tells it")
    options.add_argument("--prompt-tokens", type=int, default=1020)
    options.add_argument("--answer-tokens", type=int, default=129)
    options.add_argument("--runs", type=int, default=5, help="timed, of every plan")
    options.add_argument("--steps", type=int, default=16, help="decode steps that are timed")
    options.add_argument("--clock", choices=("wall", "cpu"), default="cpu")
    options.add_argument("--prefill-blocks", type=int, nargs="+", default=[8, 9, 10])
    options.add_argument("--decode-blocks", type=int, nargs="+", default=[6, 7])
    options.add_argument("--reduction", type=float, default=4.95, help="by fewer entries")
    options.add_argument("--links", type=float, nargs="+", default=[1, 25, 400], help="Gbit/s")
    options.add_argument("--gpu", default="H200-like", help="name of the assumed GPU")
    options.add_argument("--gpu-shape", choices=sorted(SHAPES), default="llama-8b")
    options.add_argument("--gpu-tflops", type=float, default=989, help="bf16, without sparsity")
    options.add_argument("--gpu-tflops-used", type=float, default=0.5, help="share, in prefill")
    options.add_argument("--gpu-tb-per-s", type=float, default=4.8, help="of its memory")
    options.add_argument("--gpu-memory-used", type=float, default=0.6, help="share, in decode")
    return options


def plans_of(loaded: LoadedModel, arguments: Namespace) -> dict[str, PruningPlan]:
    """The techniques by name, dense first."""
    blocks = range(loaded.signature.num_blocks)
    prefill = {"blocks": dict.fromkeys(arguments.prefill_blocks, "kv_only")}
    decode = {"blocks": dict.fromkeys(arguments.decode_blocks, "removed")}
    cut = cut_to(loaded, arguments)
    attended = [block for block in blocks if block not in arguments.decode_blocks]
    made: dict[str, dict[str, Any]] = {
        DENSE: {},
        f"{len(arguments.prefill_blocks)} blocks out of prefill": {"prefill": prefill},
        f"{len(arguments.decode_blocks)} blocks out of decode": {"decode": decode},
        f"{arguments.reduction:g}x by fewer entries": {"kv_transfer": dict.fromkeys(blocks, cut)},
        "int8": {"kv_transfer": dict.fromkeys(blocks, KVTransfer(encoding="int8"))},
        "int4": {"kv_transfer": dict.fromkeys(blocks, KVTransfer(encoding="int4"))},
        "all together (int4)": {
            "prefill": prefill,
            "decode": decode,
            "kv_transfer": dict.fromkeys(attended, cut.model_copy(update={"encoding": "int4"})),
        },
    }
    signature = signature_of(loaded.model)
    return {
        name: PruningPlan.model_validate({"model": signature, **rules})
        for name, rules in made.items()
    }


def cut_to(loaded: LoadedModel, arguments: Namespace) -> KVTransfer:
    """The cut with most last entries that reaches the reduction in all blocks."""
    blocks = range(loaded.signature.num_blocks)
    plan = PruningPlan(model=loaded.signature)
    weighed = KVBytes(loaded.model.config, plan, [arguments.prompt_tokens])
    for last in range(arguments.prompt_tokens - FIRST, 0, -1):
        cut = KVTransfer(first=FIRST, last=last)
        if weighed.full / weighed.sent(dict.fromkeys(blocks, cut)) >= arguments.reduction:
            return cut
    raise InputError(
        f"--reduction {arguments.reduction:g} cannot be met by fewer entries of "
        f"{arguments.prompt_tokens} tokens; lower it, or give longer prompts"
    )


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    sizes = Sizes(arguments.prompt_tokens, arguments.steps, arguments.runs, arguments.seed)
    plans = plans_of(loaded, arguments)
    costs = timed_costs(loaded.model, plans, sizes, arguments.clock)
    shape = KVBytes(loaded.model.config, PruningPlan(), [arguments.prompt_tokens])
    recorder.write(
        results={name: asdict(each) for name, each in costs.items()},
        dense_kv_bytes=shape.full,
        decode_share={
            name: 1 - plan.removed("decode") / loaded.signature.num_blocks
            for name, plan in plans.items()
        },
        gpu_dense=asdict(gpu_dense(arguments)),
    )


def gpu_dense(arguments: Namespace) -> Costs:
    """The assumed GPU: prefill bound by its operations, decode by the weights that it reads.

    Attention's own operations and the KV that decode reads are left out: at 1,000 tokens they are
    a few percent of either. Packing is taken as free.
    """
    shape, tokens = SHAPES[arguments.gpu_shape], arguments.prompt_tokens
    head_dim = shape.hidden // shape.heads
    attention = 2 * shape.hidden**2 + 2 * shape.hidden * shape.kv_heads * head_dim
    weights = shape.blocks * (attention + 3 * shape.hidden * shape.mlp)
    flops_per_s = 1e12 * arguments.gpu_tflops * arguments.gpu_tflops_used
    bytes_per_s = 1e12 * arguments.gpu_tb_per_s * arguments.gpu_memory_used
    return Costs(
        prefill_s=2 * weights * tokens / flops_per_s,
        tpot_s=2 * (weights + shape.hidden * shape.vocab) / bytes_per_s,
        codec_s=0.0,
        num_bytes=2 * shape.blocks * 2 * shape.kv_heads * head_dim * tokens,
    )


def on_gpu(dense: Costs, plan: Costs, gpu: Costs, decode_share: float) -> Costs:
    """A plan's costs on the assumed GPU.

    Prefill and bytes have the ratios to dense that were measured here. Decode reads the weights of
    the share of blocks that it runs; fewer entries to attend to are worth nothing there.
    """
    return replace(
        gpu,
        prefill_s=gpu.prefill_s * plan.prefill_s / dense.prefill_s,
        tpot_s=gpu.tpot_s * decode_share,
        num_bytes=gpu.num_bytes * plan.num_bytes / dense.num_bytes,
    )


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    costs = {name: Costs(**row) for name, row in record["results"].items()}
    gpu = Costs(**record["gpu_dense"])
    dense = costs.pop(DENSE)
    here = [(name, dense, plan) for name, plan in costs.items()]
    there = [
        (name, gpu, on_gpu(dense, plan, gpu, record["decode_share"][name]))
        for name, plan in costs.items()
    ]
    places = {"this CPU": here, asked["gpu"]: there}
    model = asked["caption"] or asked["model"]
    return [
        f"{model}; one request of {asked['prompt_tokens']:,} prompt tokens and "
        f"{asked['answer_tokens']} answer tokens, batch 1; {asked['clock']} seconds, medians of "
        f"{asked['runs']} runs in turns. Dense prefill {dense.prefill_s:.2f} s, decode "
        f"{1e3 * dense.tpot_s:.1f} ms a token, message {dense.num_bytes / 1e6:.1f} MB "
        f"({dense.num_bytes / record['dense_kv_bytes'] - 1:.2%} over the dense cache).",
        f"The {asked['gpu']} GPU is assumed, not measured: the shape {asked['gpu_shape']} in bf16, "
        f"prefill at {asked['gpu_tflops_used']:.0%} of {asked['gpu_tflops']:g} TFLOP/s "
        f"({1e3 * gpu.prefill_s:.0f} ms, {asked['prompt_tokens'] / gpu.prefill_s:,.0f} tokens/s), "
        f"decode at {asked['gpu_memory_used']:.0%} of {asked['gpu_tb_per_s']:g} TB/s "
        f"({1e3 * gpu.tpot_s:.1f} ms a token), KV of {gpu.num_bytes / 1e6:.0f} MB, encoding free; "
        "what a plan does to prefill and bytes is what was measured on this CPU, and decode reads "
        "the weights of the blocks that it runs. Blocks "
        f"{words(asked['prefill_blocks'])} leave prefill (their KV is still written), blocks "
        f"{words(asked['decode_blocks'])} leave decode. What a technique costs in quality is "
        "another page's matter.",
        picture(places, asked),
        "## Measured",
        measured_table(dense, costs),
        "## Times as fast as dense, on three links",
        "An answer's first token comes from prefill, so the handoff is part of the answer only; "
        "the time to a first token (TTFT) is that of plans whose decode makes it, after the "
        "handoff. Nothing of the transfer is hidden behind computation.",
        gains_table(places, asked),
        "## From where a technique pays",
        "The fastest link on which the request still ends sooner than dense, in Gbit/s.",
        break_even_table(places, asked["answer_tokens"]),
    ]


Rows = Sequence[tuple[str, Costs, Costs]]


def picture(places: Mapping[str, Rows], asked: Mapping[str, Any]) -> Curves:
    """The map: a column for every place, whole answers above first tokens."""
    kinds = {
        f"whole answer of {asked['answer_tokens']} tokens": asked["answer_tokens"],
        "first token, from decode": 1,
    }
    denses = [rows[0][1] for rows in places.values()]
    ends = [dense_ratio(dense, link) for dense in denses for link in asked["links"]]
    low, high = min(ends) / 2, max(ends) * 2
    r = [low * (high / low) ** (n / (NUM_POINTS - 1)) for n in range(NUM_POINTS)]
    panels = []
    for kind, num_answer in kinds.items():
        for place, rows in places.items():
            marks = {f"{link:g} Gbit/s": dense_ratio(rows[0][1], link) for link in asked["links"]}
            curves = [
                Curve(name, r, [Comparison(dense, plan, num_answer).gain(x) for x in r])
                for name, dense, plan in rows
            ]
            panels.append(
                CurvePanel(
                    f"{place}: {kind}",
                    x="dense transfer time / dense prefill time",
                    y="times as fast as dense",
                    curves=curves,
                    marks=marks,
                )
            )
    return Curves("Gain of every technique by the link's speed", panels, num_columns=len(places))


def measured_table(dense: Costs, costs: Mapping[str, Costs]) -> Table:
    columns = ("plan", "prefill", "decode step", "packing and unpacking", "fewer bytes")
    cells = [(DENSE, "1x", "1x", f"{1e3 * dense.codec_s:.0f} ms", "1x")]
    for name, each in costs.items():
        cells.append(
            (
                name,
                f"{dense.prefill_s / each.prefill_s:.2f}x",
                f"{dense.tpot_s / each.tpot_s:.2f}x",
                f"{1e3 * each.codec_s:.0f} ms",
                f"{dense.num_bytes / each.num_bytes:.2f}x",
            )
        )
    return Table(columns, cells)


def gains_table(places: Mapping[str, Rows], asked: Mapping[str, Any]) -> Table:
    links = asked["links"]
    cells = []
    for place, rows in places.items():
        shares = [f"{dense_ratio(rows[0][1], link):.2g}" for link in links]
        cells.append((place, "dense transfer / prefill", *shares, *shares))
        for name, dense, plan in rows:
            gains = [
                f"{Comparison(dense, plan, num).gain(dense_ratio(dense, link)):.2f}x"
                for num in (asked["answer_tokens"], 1)
                for link in links
            ]
            cells.append((place, name, *gains))
    names = [f"{kind}, {link:g} Gbit/s" for kind in ("answer", "TTFT") for link in links]
    return Table(("on", "plan", *names), cells)


def break_even_table(places: Mapping[str, Rows], num_answer_tokens: int) -> Table:
    cells = []
    for place, rows in places.items():
        for name, dense, plan in rows:
            ends = [
                link_words(dense, Comparison(dense, plan, num).break_even())
                for num in (num_answer_tokens, 1)
            ]
            cells.append((place, name, *ends))
    return Table(("on", "plan", "answer", "TTFT"), cells)


def link_words(dense: Costs, r: float | None) -> str:
    """The link at which the dense transfer takes ``r`` prefills, in words."""
    if not r:
        return "none" if r is None else "any"
    return f"{8 * dense.num_bytes / (r * dense.prefill_s) / 1e9:.2g}"


def words(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))


if __name__ == "__main__":
    run(parser(), measure, report)
