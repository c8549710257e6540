"""Claim: a search costs a fraction of what scoring its candidates one by one would cost.

One search over both stages; then every candidate that it scored on all lines is scored again from
scratch, in the same batches and against the same dense reference, but nothing shared between
candidates. Compared are block x token forwards, wall and CPU seconds; everything that the search
did is on its side (the dense model, the influence, races). Further:

- decode-only candidates against the bound (P + C) / C x L / (L - f) that the lengths and the first
  changed block f allow;
- the same search with racing, and what its plan is worth on fresh lines, seed by seed;
- one and two Ray evaluators on the same work, alternated;
- a simulation of more evaluators from the recorded trace.

    python benchmarks/search_cost.py                                   # the shipped test-bed model
    python benchmarks/search_cost.py --lines 16 --evaluations 32 --seeds 1 --repeats 0   # a look
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.evaluation.machine import this_machine
from rayapp.models.loading import LoadedModel, load_model
from rayapp.pruning.calibration import Calibration, TokenizedLine, cut
from rayapp.pruning.candidates import DENSE, Candidate
from rayapp.pruning.evaluator import Evaluator
from rayapp.pruning.objective import Objective
from rayapp.pruning.run import SearchResult, run_search
from rayapp.pruning.scoring import Done, LocalCompute, Scorer, Work, split_work
from rayapp.pruning.settings import PruneSettings
from rayapp.pruning.similarity import Influence
from rayapp.pruning.spaces import Space
from rayapp.testbed import text_model_path
from rayapp.testbed.tasks import TASKS, generate

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PIECE_OVERHEAD_S = 0.003  # a bare actor call with a small answer


@dataclass
class Cost:
    """What something took."""

    forwards: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Cost(*(mine + its for mine, its in pairs))

    def over(self, other: Cost) -> dict[str, float]:
        """How many times ``other`` this is."""
        return {key: value / getattr(other, key) for key, value in asdict(self).items()}


class Meter:
    """Adds up what an evaluator does within the context."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.cost = Cost()

    def __enter__(self) -> Meter:
        self._marks = (self._evaluator.forwards, time.perf_counter(), time.process_time())
        return self

    def __exit__(self, *_: object) -> None:
        now = (self._evaluator.forwards, time.perf_counter(), time.process_time())
        self.cost += Cost(*(new - old for new, old in zip(now, self._marks, strict=True)))


class Recording(LocalCompute):
    """In-process compute that keeps its cost, and every piece with its seconds."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator)
        self.meter = Meter(evaluator)
        self.rounds: list[list[Done]] = []

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        self.rounds.append([])
        with self.meter:
            done = list(super().run(work))
        self.rounds[-1] += done
        yield from done

    def influence(self) -> Influence:
        with self.meter:
            return super().influence()


def lines_of(
    tokenizer: PreTrainedTokenizerBase, split: str, args: argparse.Namespace, seed: int
) -> Calibration:
    """The last tokens of real questions with their answers: every line equally long."""
    total, wanted = args.prompt_tokens + args.continuation_tokens, args.lines // len(TASKS)
    lines = []
    for task in TASKS:
        examples = generate(task, split, 4 * wanted, seed, length="mixed")
        rows = [
            (*tokenizer(e.prompt + e.completion)["input_ids"], tokenizer.eos_token_id)
            for e in examples
        ]
        rows = [row[-total:] for row in rows if len(row) >= total][:wanted]
        at = args.prompt_tokens
        lines += [TokenizedLine(row[:at], row[at:], task) for row in rows]
    random.Random(seed).shuffle(lines)
    return cut(lines, chunk_tokens=args.chunk_tokens)


def settings_of(args: argparse.Namespace, out: Path, seed: int, racing: bool) -> PruneSettings:
    return PruneSettings.checked(
        model=str(args.model),
        calibration="benchmark",
        out=str(out),
        prefill_remove=args.remove,
        decode_remove=args.remove,
        method=args.method,
        evaluations=args.evaluations,
        seed=seed,
        racing=racing,
        dtype="float32",
    )


def search(
    args: argparse.Namespace, model: LoadedModel, lines: Calibration, seed: int, racing: bool
) -> tuple[SearchResult, Recording]:
    """One search, alone on a fresh evaluator."""
    compute = Recording(Evaluator(model.model, lines, Objective()))
    scorer = Scorer(lines, Objective(), compute, weights="benchmark")
    with tempfile.TemporaryDirectory() as out:
        settings = settings_of(args, Path(out), seed, racing)
        return run_search(settings, scorer, model.signature), compute


def naive(
    model: PreTrainedModel, lines: Calibration, candidates: Sequence[Candidate]
) -> tuple[Cost, list[list[float]]]:
    """Every candidate from scratch; the dense reference, once per chunk, is not counted."""
    evaluator = Evaluator(model, lines, Objective(), cache_bytes=0)
    meter, reference = Meter(evaluator), Meter(evaluator)
    sums: list[list[float]] = [[] for _ in candidates]
    for chunk in range(len(lines.chunks)):
        with reference:
            evaluator.line_sums([], chunk)
        with meter:
            found = evaluator.line_sums(candidates, chunk)
        for row, values in zip(sums, found, strict=True):
            row += values
    cost = asdict(reference.cost)
    return meter.cost + Cost(*(-value for value in cost.values())), sums


def decode_only(
    model: PreTrainedModel, lines: Calibration, args: argparse.Namespace
) -> dict[str, Any]:
    """Single blocks removed from decode, each scored after the dense model and nothing else."""
    evaluator = Evaluator(model, lines, Objective())
    num_blocks, first_chunk = evaluator.runner.num_blocks, 0
    rows, ours_all, naive_all, bound_cost = [], Cost(), Cost(), 0.0
    batch = len(lines.chunks[first_chunk].lines)
    prompt, answer = args.prompt_tokens, args.continuation_tokens
    evaluator.line_sums([DENSE], first_chunk)
    one = Calibration(lines.lines, lines.chunks[:1])
    for block in range(num_blocks):
        candidate = Candidate((), (2 * block, 2 * block + 1))
        with Meter(evaluator) as ours:
            evaluator.line_sums([candidate], first_chunk)
        theirs, _ = naive(model, one, [candidate])
        bound = (prompt + answer) / answer * num_blocks / (num_blocks - block)
        reached = theirs.forwards / ours.cost.forwards if ours.cost.forwards else math.inf
        rows.append({"block": block, "bound": bound, "reached": reached})
        ours_all, naive_all = ours_all + ours.cost, naive_all + theirs
        bound_cost += batch * answer * (num_blocks - block)
    bound_all = batch * num_blocks * (prompt + answer) * num_blocks / bound_cost
    reached_all = naive_all.over(ours_all)
    return {
        "blocks": [row for row in rows if math.isfinite(row["reached"])],
        "bound": bound_all,
        "reached": reached_all,
        "share_of_bound": reached_all["forwards"] / bound_all,
        "least_share_of_bound": min(row["reached"] / row["bound"] for row in rows),
    }


def held_out(
    model: PreTrainedModel, lines: Calibration, plans: Sequence[SearchResult]
) -> list[float]:
    """Scores of the plans on fresh lines."""
    evaluator = Evaluator(model, lines, Objective())
    scorer = Scorer(lines, Objective(), LocalCompute(evaluator), weights="benchmark")
    found = [Candidate.from_plan(result.plan) for result in plans]
    return [score.value for score in scorer.score_many(found)]


def seed_row(
    args: argparse.Namespace, model: LoadedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[dict[str, Any], Recording]:
    """One search without and one with racing, and the naive cost of the first."""
    lines = lines_of(tokenizer, "calibration", args, seed)
    whole, compute = search(args, model, lines, seed, racing=False)
    raced, racing = search(args, model, lines, seed, racing=True)
    candidates = sorted({trial.candidate for trial in whole.trials})
    cost, sums = naive(model.model, lines, candidates)
    totals = {c: math.fsum(values) for c, values in zip(candidates, sums, strict=True)}
    for trial in whole.trials:
        ours, theirs = math.fsum(trial.score.lines), totals[trial.candidate]
        assert abs(ours - theirs) <= 1e-5 * abs(theirs) + 1e-7 * len(lines.lines), trial
    fresh = lines_of(tokenizer, "validation", replace_lines(args, args.held_out), seed)
    values = held_out(model.model, fresh, [whole, raced])
    row = {
        "seed": seed,
        "evaluations": whole.evaluations,
        "naive": asdict(cost),
        "search": asdict(compute.meter.cost),
        "racing": asdict(racing.meter.cost),
        "naive/search": cost.over(compute.meter.cost),
        "naive/racing": cost.over(racing.meter.cost),
        "held_out": {"search": values[0], "racing": values[1]},
    }
    return row, compute


def replace_lines(args: argparse.Namespace, count: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "lines": count})


def paired_upper_bound(rows: Sequence[dict[str, Any]]) -> float:
    """One-sided 95 % bootstrap bound over seeds of the racing plan's loss, relative."""
    pairs = [(row["held_out"]["racing"], row["held_out"]["search"]) for row in rows]
    rng = random.Random(0)
    losses = []
    for _ in range(2000):
        drawn = rng.choices(pairs, k=len(pairs))
        losses.append(sum(raced for raced, _ in drawn) / sum(whole for _, whole in drawn) - 1)
    return sorted(losses)[int(0.95 * len(losses))]


def two_workers(args: argparse.Namespace, lines: Calibration, num_blocks: int) -> dict[str, Any]:
    """The same fresh candidates on one and on two evaluators, in turns."""
    os.environ.update({"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"})
    import ray

    from rayapp.distributed.scoring import EvaluatorPool

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="warning")
    settings = settings_of(args, Path("unused"), args.seed, racing=False)
    space, seconds = Space(num_blocks, args.remove, args.remove), {1: [], 2: []}
    pools = {
        count: EvaluatorPool(settings.model_copy(update={"workers": count}), lines)
        for count in seconds
    }
    for pool in pools.values():
        ray.wait(list(pool._starting), num_returns=len(pool._starting))
    for repeat in range(-1, args.repeats):  # the first, uncounted, warms both up
        rng = random.Random(repeat)
        candidates = sorted({space.draw(rng) for _ in range(args.worker_candidates)})
        for count, pool in pools.items():
            work = split_work(dict.fromkeys(range(len(lines.chunks)), candidates), count)
            started = time.perf_counter()
            assert len(list(pool.run(work))) == len(work)
            if repeat >= 0:
                seconds[count].append(time.perf_counter() - started)
    for pool in pools.values():
        pool.close()
    ray.shutdown()
    ratios = [one / two for one, two in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "speed_up": statistics.median(ratios), "ratios": ratios}


def simulated(compute: Recording) -> list[dict[str, float]]:
    """How long the recorded search would take on more evaluators, work split as it would be.

    Every piece goes to the evaluator that is free first. What pieces share when they follow one
    another on one evaluator is not added where they are apart, so this is an upper bound.
    """
    rows = [
        {"workers": count, "seconds": sum(_round(done, count) for done in compute.rounds)}
        for count in WORKERS
    ]
    return [{**row, "speed_up": rows[0]["seconds"] / row["seconds"]} for row in rows]


def _round(done: Sequence[Done], num_workers: int) -> float:
    """One generation (or rung): nothing of the next begins before its last piece ends."""
    seconds: dict[int, dict[Candidate, float]] = {}
    for piece in done:
        share = piece.seconds / len(piece.work.candidates)
        seconds.setdefault(piece.work.chunk, {}).update(dict.fromkeys(piece.work.candidates, share))
    free = [0.0] * num_workers
    for work in split_work({k: sorted(shares) for k, shares in seconds.items()}, num_workers):
        takes = PIECE_OVERHEAD_S + sum(seconds[work.chunk][c] for c in work.candidates)
        heapq.heappush(free, heapq.heappop(free) + takes)
    return max(free)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(args.model, dtype="float32")
    lines = lines_of(model.tokenizer, "calibration", args, args.seed)
    start_load = os.getloadavg()[0]
    rows, traces = [], []
    for seed in range(args.seed, args.seed + args.seeds):
        row, compute = seed_row(args, model, model.tokenizer, seed)
        rows.append(row)
        traces.append(compute)
    result = {
        "arguments": {
            **{key: value for key, value in vars(args).items() if key != "out"},
            "model": args.model.name,
        },
        "machine": this_machine(device="cpu", num_threads=args.threads).model_dump(),
        "load_average": [start_load, os.getloadavg()[0]],
        "num_chunks": len(lines.chunks),
        "num_lines": len(lines.lines),
        "seeds": rows,
        "racing_loss_upper_bound": paired_upper_bound(rows),
        "decode_only": decode_only(model.model, lines, args),
        "simulated": simulated(traces[0]),
    }
    if args.repeats:
        result["two_workers"] = two_workers(args, lines, model.signature.num_blocks)
    return result


def markdown(result: dict[str, Any]) -> str:
    arguments, machine, decode = result["arguments"], result["machine"], result["decode_only"]
    load = " to ".join(f"{value:.1f}" for value in result["load_average"])
    lines = [
        f"Cost of a search: {arguments['method']}, {arguments['remove']} blocks per stage, "
        f"{arguments['evaluations']} evaluations, {result['num_lines']} lines of "
        f"{arguments['prompt_tokens']} prompt and {arguments['continuation_tokens']} continuation "
        f"tokens in {result['num_chunks']} chunks, 1 thread, load average {load}; "
        f"{machine['processor']}, torch {machine['versions']['torch']}, commit "
        f"{machine['commit']}.",
        "",
        "Times cheaper than naive scoring of the same candidates (forwards / wall / CPU):",
        "",
        "| seed | candidates | search | with racing | held-out score, search | with racing |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["seeds"]:
        ratios = [
            " / ".join(f"{value:.2f}" for value in row[key].values())
            for key in ("naive/search", "naive/racing")
        ]
        held = row["held_out"]
        lines.append(
            f"| {row['seed']} | {row['evaluations']} | {ratios[0]} | {ratios[1]} | "
            f"{held['search']:.5f} | {held['racing']:.5f} |"
        )
    reached = decode["reached"]
    lines += [
        "",
        f"Plans of races lose at most {100 * result['racing_loss_upper_bound']:.1f} % on fresh "
        f"lines (one-sided 95 % paired bootstrap over {len(result['seeds'])} seeds).",
        "",
        "Decode-only candidates (one block each, all blocks together): bound (P + C)/C x "
        f"L/(L - f) {decode['bound']:.1f}, reached {reached['forwards']:.1f} in forwards "
        f"({100 * decode['share_of_bound']:.0f} % of the bound; worst block "
        f"{100 * decode['least_share_of_bound']:.0f} %), {reached['wall_s']:.1f} in wall time, "
        f"{reached['cpu_s']:.1f} in CPU time. Above 100 %: prefill makes the first token, so "
        "decode runs C - 1 tokens, and a removed block runs none.",
        "",
    ]
    if "two_workers" in result:
        ratios = ", ".join(f"{ratio:.2f}" for ratio in result["two_workers"]["ratios"])
        lines += [
            f"Two Ray evaluators against one: {result['two_workers']['speed_up']:.2f}x "
            f"(median of {ratios}).",
            "",
        ]
    lines += ["Simulated from the trace:", "", "| evaluators | speed-up |", "|---|---|"]
    lines += [f"| {row['workers']} | {row['speed_up']:.2f} |" for row in result["simulated"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=text_model_path())
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--continuation-tokens", type=int, default=14)
    parser.add_argument("--chunk-tokens", type=int, default=8 * 142)
    parser.add_argument("--remove", type=int, default=2, help="blocks per stage")
    parser.add_argument("--method", default="annealing")
    parser.add_argument("--evaluations", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--repeats", type=int, default=5, help="of the comparison of 1 and 2 workers"
    )
    parser.add_argument("--worker-candidates", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"search_cost-{args.model.name}-{args.method}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
