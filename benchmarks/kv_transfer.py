"""Claim: the handoff of KV takes little longer than Ray takes to move bare bytes.

Two Ray nodes on this machine, an actor on each: one has the KV of a prompt, the other the pages of
a decode stage; there is no model. In turns: bare (an array of as many bytes is put and fetched,
nothing else), whole (the KV is cut, packed, stored, fetched, checked and copied into pages) and
parts (the same, a chunk of the prompt at a time). With --links, what goes to the receiver's node is
slowed down to so many Gbit/s; that takes root, and an otherwise idle machine.

    python benchmarks/kv_transfer.py --shape smollm2-135m --tokens 256 1000 6000
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser, Namespace
from typing import Any

import handoff
import ray
from handoff import ends, link
from handoff.ends import Receiver, Sender, Stack
from ray import cloudpickle
from recorder.options import benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table

from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.kv.ledger import KVShape, payload_bytes
from rayapp.plan import KVTransfer, ModelSignature, PruningPlan, StagePlan

SHAPES = {"smollm2-135m": (30, 3, 64), "llama-8b": (32, 8, 128), "tiny": (4, 2, 16)}
WAYS = ("bare", "whole", "parts")
_DECODE = 1  # The receiver's node, by number.


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    options.add_argument("--tokens", type=int, nargs="+", default=[256, 1000, 3000, 6000])
    options.add_argument("--plans", nargs="+", default=["dense", "blocks", "ends", "int8", "all"])
    options.add_argument("--part-tokens", type=int, default=512)
    options.add_argument("--links", type=float, nargs="*", default=[], help="Gbit/s")
    options.add_argument("--runs", type=int, default=7)
    return options


def plan_of(name: str, shape: KVShape) -> PruningPlan:
    """A plan by name: decode without every fourth block, the ends of prompts, int8, or all."""
    blocks = range(shape.num_blocks)
    skipped = {b: "removed" for b in blocks if b % 4 == 3 and name in ("blocks", "all")}
    ends_of = {"first": 0.1, "last": 0.1} if name in ("ends", "all") else {}
    encoded = {"encoding": "int8"} if name in ("int8", "all") else {}
    rules = {b: KVTransfer(**ends_of, **encoded) for b in blocks if b not in skipped}
    signature = ModelSignature(
        model_type="llama", num_blocks=shape.num_blocks, hidden_size=shape.head_dim,
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, vocab_size=9,
        weights_fingerprint="none",
    )  # fmt: skip
    return PruningPlan(
        model=signature,
        decode=StagePlan(blocks=skipped),
        kv_transfer=rules if ends_of or encoded else {},
    )


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    for module in (handoff, ends):
        cloudpickle.register_pickle_by_value(module)
    blocks, heads, dim = SHAPES[arguments.shape]
    shape = KVShape(blocks, heads, dim, 2, (None,) * blocks)
    most = shape.dense_bytes(max(arguments.tokens))
    spec = NodeSpec(num_cpus=2, object_store_bytes=max(400 << 20, 4 * most))
    rows: list[dict[str, Any]] = []
    with local_cluster([spec, spec]) as cluster:
        ray.init(cluster.address, log_to_driver=False)
        nodes = [node.node_id for node in cluster.nodes]
        sender, receiver = _actor(Sender, nodes[0]), _actor(Receiver, nodes[_DECODE])
        address = cluster.nodes[_DECODE].node_ip_address
        for gbit in (None, *arguments.links):
            with link.shaped(address, gbit):
                for tokens in arguments.tokens:
                    for name in arguments.plans:
                        stack = Stack(shape, plan_of(name, shape))
                        case = {"gbit_per_s": gbit, "tokens": tokens, "plan": name}
                        found = timed(sender, receiver, stack, tokens, arguments)
                        rows.append({**case, **found})
                        print(rows[-1], flush=True)
                        recorder.write(results=rows)
        ray.shutdown()


def _actor(kind: Any, node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(kind).options(num_cpus=1, scheduling_strategy=there).remote()


def timed(
    sender: Any, receiver: Any, stack: Stack, num_tokens: int, arguments: Namespace
) -> dict[str, Any]:
    """Medians of all ways, in turns."""
    num_parts = ray.get(sender.prepare.remote(stack, num_tokens, arguments.part_tokens))
    ray.get(receiver.prepare.remote(stack, num_tokens))
    payload, overhead = ray.get(receiver.load.remote([sender.whole.remote()]))
    if payload != payload_bytes(stack.shape, stack.plan, num_tokens):
        raise SystemExit(f"{payload} bytes of KV travelled, the plan sends another number")
    ray.get(sender.keep.remote(payload + overhead))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs + 1):
        for way in WAYS:
            before, began_s = _cpu_s(sender, receiver), time.perf_counter()
            _send(way, sender, receiver, num_parts)
            seconds[way].append(time.perf_counter() - began_s)
            cpu[way].append(_cpu_s(sender, receiver) - before)
    return {
        "payload_bytes": payload,
        "overhead_bytes": overhead,
        "num_parts": num_parts,
        **{f"{way}_s": statistics.median(seconds[way][1:]) for way in WAYS},
        **{f"{way}_cpu_s": statistics.median(cpu[way][1:]) for way in WAYS},
        "seconds": {way: found[1:] for way, found in seconds.items()},
    }


def _send(way: str, sender: Any, receiver: Any, num_parts: int) -> None:
    if way == "bare":
        ray.get(receiver.get.remote([sender.bare.remote()]))
    elif way == "whole":
        ray.get(receiver.load.remote([sender.whole.remote()]))
    else:
        parts = [sender.part.remote(number) for number in range(num_parts)]
        for number, part in enumerate(parts):
            ray.get(receiver.load.remote([part], number, number == num_parts - 1))


def _cpu_s(*actors: Any) -> float:
    return sum(ray.get([actor.cpu_s.remote() for actor in actors]))


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    heads = (
        *("link, Gbit/s", "prompt tokens", "plan", "MB", "overhead", "bare, s", "whole, s"),
        *("parts, s", "bare / whole", "bare / parts", "share of the link", "CPU ms / MB"),
        "dense is as fast at, Gbit/s",
    )
    dense = {r["tokens"]: r["payload_bytes"] for r in record["results"] if r["plan"] == "dense"}
    rows = [_row(row, dense.get(row["tokens"])) for row in record["results"]]
    return [
        f"KV of one prompt of a {asked['shape']} shape in bfloat16 from one Ray node to the pages "
        f"of another, on one machine; medians of {asked['runs']} runs in turns. Bare is put and "
        f"get of as many bytes; whole and parts (of {asked['part_tokens']} tokens) cut, pack, "
        "check and copy too. CPU is that of both actors, for whole. The last column is the rate of "
        "a link that moves the dense KV, and nothing else, in the time that the plan takes here.",
        Table(heads, rows),
    ]


def _row(row: Record, dense_bytes: int | None) -> tuple[str, ...]:
    """The cells of one case, beside the bytes of the dense KV of the same prompt."""
    num_bytes = row["payload_bytes"] + row["overhead_bytes"]
    gbit = row["gbit_per_s"]
    share = "-" if gbit is None else f"{num_bytes * 8e-9 / row['whole_s'] / gbit:.2f}"
    return (
        "none" if gbit is None else f"{gbit:g}",
        f"{row['tokens']:,}",
        row["plan"],
        f"{num_bytes / 1e6:.1f}",
        f"{100 * row['overhead_bytes'] / num_bytes:.2f} %",
        *(f"{row[f'{way}_s']:.4f}" for way in WAYS),
        *(f"{row['bare_s'] / row[f'{way}_s']:.2f}" for way in ("whole", "parts")),
        share,
        f"{1e9 * row['whole_cpu_s'] / num_bytes:.2f}",
        "-" if dense_bytes is None else f"{8e-9 * dense_bytes / row['whole_s']:.1f}",
    )


if __name__ == "__main__":
    run(parser(), measure, report, label=lambda arguments: arguments.shape)
