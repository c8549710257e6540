"""The studies: one piece is taken away or put in, at two blocks removed from each stage."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from ablations.bench import Bench
from ablations.channels import without_channels
from ablations.text import text_calibration
from rayapp.models.loading import load_model
from rayapp.plan import KVTransfer, PruningPlan
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.preparation import open_evaluator, prepare_scoring
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.workflows.kv_select import kv_select

REMOVE = 2
METHOD = "surrogate"
REDUCTION = 4.95
LINKS_GBIT = (1.0, 10.0, 100.0)
BATCHES = (1, 8, 32)

Row = dict[str, Any]
Cell = tuple[str, Callable[[], Row]]
"""A row's name, and the function that measures it."""

SPACES: dict[str, dict[str, Any]] = {
    "one shared set": {"shared": True},
    "subset rule (PDTrim)": {"kv_modes": False},
    "kv modes": {},
    "kv modes, parts": {"unit": "part"},
}


def sizes(**others: Any) -> dict[str, Any]:
    return {"prefill_remove": REMOVE, "decode_remove": REMOVE, "method": METHOD} | others


def spaces(bench: Bench) -> Iterator[Cell]:
    """The coupling of the stages, from one shared set to parts."""
    for name, changed in SPACES.items():
        yield name, lambda n=name, c=changed: searched(bench, f"space-{n}", **sizes(**c))


def searched(bench: Bench, name: str, **settings: Any) -> Row:
    plan, took = bench.search(name.replace(" ", "-"), **settings)
    return bench.plan_row(plan) | took


def methods(bench: Bench) -> Iterator[Cell]:
    """Search methods over calibration sets and seeds, with their own default budgets."""
    for method in ("random", "similarity", "window", "one_shot", "greedy", "evolution",
                   "annealing", "surrogate"):  # fmt: skip
        yield method, lambda m=method: over_seeds(bench, m)


def over_seeds(bench: Bench, method: str) -> Row:
    """Mean, and spread over seeds of the search and of its calibration set."""
    rows = []
    for seed in range(bench.sizes.seeds):
        calibration = bench.data("calibration", bench.sizes.calibration_per_task, seed, "short")
        plan, took = bench.search(
            f"method-{method}-{seed}",
            **sizes(method=method, seed=seed, calibration=str(calibration)),
        )
        side = bench.side(plan)
        rows.append(bench.quality(side) | took)
    kls = [row["kl"] for row in rows]
    return {
        "kl": statistics.mean(kls),
        "kl_lowest": min(kls),
        "kl_highest": max(kls),
        "mean_lost": statistics.mean(row["mean_lost"] for row in rows),
        "worst_lost": max(row["worst_lost"] for row in rows),
        "evaluations": statistics.mean(row["evaluations"] for row in rows),
        "search_s": statistics.mean(row["search_s"] for row in rows),
        "seeds": len(rows),
    }


def healing(bench: Bench) -> Iterator[Cell]:
    """No healing, PDTrim's sets at several thresholds, every removed block."""
    heal_data = str(bench.heal_data())
    yield "none", lambda: searched(bench, "space-kv-modes", **sizes())
    for name in ("0.95", "0.97", "0.99", "median"):
        yield (
            f"pair, d_T {name}",
            lambda n=name: searched(
                bench,
                f"heal-pair-{n}",
                **sizes(heal="pair", heal_data=heal_data, distillation_threshold=d_t(bench, n)),
            ),
        )
    yield "all", lambda: searched(bench, "heal-all", **sizes(heal="all", heal_data=heal_data))
    yield (
        "pruning set only, d_T median",
        lambda: searched(
            bench,
            "pruning-set",
            **sizes(pruning_set=True, distillation_threshold=d_t(bench, "median")),
        ),
    )


def d_t(bench: Bench, name: str) -> float:
    """A threshold d_T as a number; the median is over the blocks of both stages."""
    if name != "median":
        return float(name)
    score = ScoreSettings(
        model=str(bench.path), calibration=str(bench.calibration()), dtype="float32"
    )
    here = ComputeSettings()
    evaluator = open_evaluator(score, here, prepare_scoring(score, here).calibration)
    influence = measure_influence(evaluator)
    return 1.0 - statistics.median([*influence.prefill_blocks, *influence.decode_blocks])


def domains(bench: Bench) -> Iterator[Cell]:
    """Calibration sets of several domains, judged on all tasks."""
    yield "all tasks", lambda: searched(bench, "space-kv-modes", **sizes())
    for task in ("retrieval", "copy", "sort", "add"):
        yield (
            f"{task} only",
            lambda t=task: searched(
                bench, f"domain-{t}", **sizes(calibration=str(bench.calibration(only=t)))
            ),
        )
    yield (
        "program text",
        lambda: searched(bench, "domain-text", **sizes(calibration=str(text_calibration(bench)))),
    )


def transfer(bench: Bench) -> Iterator[Cell]:
    """Choices of the KV that travels, with one block plan, at the same bytes."""
    plan, _ = bench.search("space-kv-modes", **sizes())
    attending = [b for b in range(bench.num_blocks) if plan.mode("decode", b).attends]

    def ruled(rule: KVTransfer) -> Row:
        cut = plan.model_copy(update={"kv_transfer": dict.fromkeys(attending, rule)})
        return bench.plan_row(PruningPlan.parse(cut.dumps()), "mixed")

    def selected(method: str, encoding: str) -> Row:
        out = bench.work / "plans" / f"kv-{method}-{encoding}"
        if not (out / "plan.json").is_file():
            lines = str(bench.calibration("mixed"))
            settings = KVSelectSettings.checked(
                plan=str(bench.work / "plans" / "space-kv-modes"),
                out=str(out),
                target_reduction=REDUCTION,
                method=method,
                encoding=encoding,
            )
            score = ScoreSettings(model=str(bench.path), calibration=lines)
            kv_select(score, ComputeSettings(), settings)
        chosen = PruningPlan.load(out)
        rules = {b: r.model_dump(exclude_none=True) for b, r in sorted(chosen.kv_transfer.items())}
        return bench.plan_row(chosen, "mixed") | {"rules": rules}

    yield "all entries", lambda: ruled(KVTransfer())
    yield "all entries, int8", lambda: ruled(KVTransfer(encoding="int8"))
    yield "all entries, int4", lambda: ruled(KVTransfer(encoding="int4"))
    yield (
        f"sink + recent in all blocks, {REDUCTION}x",
        lambda: ruled(KVTransfer(first=4, last=matched_share(plan))),
    )
    yield f"attention mass (PDTrim's rule), {REDUCTION}x", lambda: selected("mass", "model")
    yield f"elimination, {REDUCTION}x", lambda: selected("elimination", "model")
    yield f"elimination, {REDUCTION}x, int8 allowed", lambda: selected("elimination", "int8")


def matched_share(plan: PruningPlan) -> float:
    """The recent share that gives about the reduction in all attending blocks."""
    blocks = plan.model.num_blocks if plan.model else 1
    attending = sum(plan.mode("decode", b).attends for b in range(blocks))
    return round(max(0.01, blocks / attending / REDUCTION - 0.03), 3)


def channels(bench: Bench) -> Iterator[Cell]:
    """The parameters of two blocks per stage, removed from all MLPs as channels instead."""
    yield "blocks, kv modes", lambda: searched(bench, "space-kv-modes", **sizes())
    for name, per_stage in (("one choice for both stages", False), ("chosen per stage", True)):
        yield f"MLP channels, {name}", lambda p=per_stage: channel_row(bench, per_stage=p)


def channel_row(bench: Bench, *, per_stage: bool) -> Row:
    side, share = without_channels(bench, REMOVE, per_stage=per_stage)
    words = {"reduction": 1.0, "plan": f"{share:.1%} of the channels of every MLP"}
    return bench.quality(side) | bench.speedups(side) | words


def end_to_end(bench: Bench) -> Iterator[Cell]:
    """Prompt to last token with the transfer, by batch and link; unified mode sends nothing.

    The time of a transfer is the message's bytes over the link, with cutting, encoding, packing and
    back, prompt by prompt. No part of it is hidden behind other work.
    """
    for batch in BATCHES if bench.sizes.runs else ():
        yield f"batch {batch}", lambda b=batch: end_to_end_row(bench, b)


def end_to_end_row(bench: Bench, batch: int) -> Row:
    plan = PruningPlan.load(bench.work / "plans" / "kv-elimination-int8")
    timing = bench.speed(bench.side(plan), batch)
    tokens, both = timing.num_prompt_tokens, (PruningPlan(), plan)
    codec = [bench.codec_ms(side, tokens) for side in both]
    sizes = [bench.bytes_sent(side, tokens) for side in both]
    row: Row = {"unified_speedup": timing.speedup, "plan_ms": timing.plan.answer_ms}
    row |= {"codec_dense_ms": codec[0], "codec_plan_ms": codec[1], "reduction": sizes[0] / sizes[1]}
    for gbit in LINKS_GBIT:
        dense_ms, plan_ms = (
            batch * (ms + size * 8 / (gbit * 1e6)) for ms, size in zip(codec, sizes, strict=True)
        )
        row[f"speedup_{gbit:g}_gbit"] = (timing.dense.answer_ms + dense_ms) / (
            timing.plan.answer_ms + plan_ms
        )
        row[f"transfer_share_{gbit:g}_gbit"] = dense_ms / (timing.dense.answer_ms + dense_ms)
    return row


def memory(bench: Bench) -> Iterator[Cell]:
    """Bytes of the parameters of a replica."""

    def parameter_bytes() -> Row:
        plan, _ = bench.search("space-kv-modes", **sizes())
        parts = ("prefill", "decode", "unified")
        loaded = {p: load_model(bench.path, plan=plan, stage=p).parameter_bytes for p in parts}
        return {"dense": load_model(bench.path).parameter_bytes} | loaded

    yield "parameter bytes", parameter_bytes


STUDIES: dict[str, Callable[[Bench], Iterator[Cell]]] = {
    "spaces": spaces,
    "healing": healing,
    "transfer": transfer,
    "end_to_end": end_to_end,
    "domains": domains,
    "channels": channels,
    "memory": memory,
    "methods": methods,
}
"""The studies in the order of their runs: later ones use plans of earlier ones."""
