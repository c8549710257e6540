"""Claim: the default search method meets the exhaustive optimum for a small share of its cost.

Per trial a fresh calibration set is drawn and every candidate of every space is scored on it: that
set's best score is the trial's truth. Every method is then replayed on this table (no score is
computed twice), with the budget that the claim allows and with its own. Reported apart:

- search error: a method's best score over the trial's optimum, minus one; mean over the trials
  with a 95 % bootstrap interval over trials;
- generalisation regret: the score of the method's plan on fresh examples of another split, minus
  that of the best set known there (over all methods and trials of the space); mean over the trials
  with a 95 % bootstrap interval over trials and, paired, over examples within each task.

Cost is counted in candidate scores on the whole calibration set: units alone and unfinished sets
included, the measured influence as one, gradients as three.

    python benchmarks/search_quality.py
    python benchmarks/search_quality.py --trials 3 --lines-per-task 8 --spaces decode4 prefill4
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.evaluation.machine import this_machine
from rayapp.models.blocks import signature_of
from rayapp.models.loading import load_model
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration, load_calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.gate_hessian import GateHessian, measure_gate_hessian, measuring_cost
from rayapp.pruning.measures.influence import Influence, measure_influence
from rayapp.pruning.methods.method import SearchMethod, Setup
from rayapp.pruning.methods.table import GRADIENT_METHODS, METHODS
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.testbed import tasks, text_model_path

SIZES = {
    "decode2": (0, 2),
    "decode3": (0, 3),
    "decode4": (0, 4),
    "prefill2": (2, 0),
    "prefill3": (3, 0),
    "prefill4": (4, 0),
    "coupled2": (2, 2),
}
SHARES = {66: 0.4, 220: 0.2, 495: 0.15, 4356: 0.05}
"""Share of the exhaustive cost that the claim allows, by size of the space (12 blocks)."""

GENERATION_SIZE = 8
LIMIT = 0.01
FRESH_SEED = 1_000_003


@dataclass
class Table:
    """Scores of one calibration set, each computed once."""

    scorer: Scorer
    influence: Influence
    gate_hessian: GateHessian
    scores: dict[Candidate, float]

    def lookup(self, candidates: Sequence[Candidate]) -> list[float]:
        new = [candidate for candidate in candidates if candidate not in self.scores]
        if new:
            values = self.scorer.score_many(new)
            self.scores.update(zip(new, (score.value for score in values), strict=True))
        return [self.scores[candidate] for candidate in candidates]


@dataclass(frozen=True)
class Found:
    """What one method found in one trial."""

    best: Candidate
    error: float
    evaluations: int


def scorer_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    per_task: int,
    seed: int,
    length: str,
) -> tuple[Scorer, Evaluator]:
    examples = [
        e for t in tasks.TASKS for e in tasks.generate(t, split, per_task, seed, length=length)
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "lines.jsonl"
        tasks.write_jsonl(path, examples)
        lines = load_calibration(path, tokenizer)
    evaluator = Evaluator(model, lines, Objective())
    return Scorer(lines, Objective(), LocalCompute(evaluator), weights="dense"), evaluator


def told_to(search: SearchMethod, table: Table) -> dict[Candidate, float]:
    """Everything that a search asks for until it ends, with its scores."""
    told: dict[Candidate, float] = {}
    while (asked := search.ask()) is not None:
        scores = table.lookup(asked.candidates)
        told.update(zip(asked.candidates, scores, strict=True))
        search.tell(scores)
    return told


def replay(table: Table, space: Space, method: str, evaluations: int | None, seed: int) -> Found:
    kind = METHODS[method]
    measuring = kind.uses_influence + (measuring_cost() if method in GRADIENT_METHODS else 0)
    if evaluations is not None:
        evaluations -= measuring
    search = kind(
        Setup(space, evaluations, GENERATION_SIZE, seed, table.influence, table.gate_hessian)
    )
    told = told_to(search, table)
    score, best = min((score, candidate) for candidate, score in told.items() if candidate in space)
    optimum = min(table.scores[candidate] for candidate in space)
    return Found(best, score / optimum - 1, len(told) + measuring)


def run_trial(
    table: Table, spaces: dict[str, Space], methods: Sequence[str], trial: int
) -> dict[tuple[str, str, str], Found]:
    """By space, method and budget."""
    found = {}
    for name, space in spaces.items():
        allowed = budget_of(space)
        for method in methods:
            if method != "exhaustive":
                found[name, method, "share"] = replay(table, space, method, allowed, trial)
            found[name, method, "own"] = replay(table, space, method, None, trial)
    return found


def budget_of(space: Space) -> int:
    return math.floor(SHARES.get(space.size, 0.15) * space.size)


def intervals(means_R: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.quantile(means_R, [0.025, 0.975])]


def trial_interval(values: Sequence[float], resamples: int) -> list[float]:
    rng = np.random.default_rng(0)
    array = np.array(values)
    return intervals(array[rng.integers(len(array), size=(resamples, len(array)))].mean(axis=1))


def told_errors(errors: Sequence[float], resamples: int) -> dict[str, Any]:
    """What a row says of the search errors of all trials."""
    return {
        "within_1_percent": sum(error <= LIMIT for error in errors),
        "trials": len(errors),
        "search_error_mean": statistics.mean(errors),
        "search_error_interval": trial_interval(errors, resamples),
        "search_error_median": statistics.median(errors),
        "search_errors": errors,
    }


class FreshScores:
    """Plans on fresh examples: scores, and paired resamples of them."""

    def __init__(self, lines: Calibration, sums_PE: NDArray[np.float64], resamples: int) -> None:
        groups = [
            np.array([i for i, line in enumerate(lines.lines) if line.task == task])
            for task in lines.tasks
        ]
        tokens_E = np.array([len(line.continuation) for line in lines.lines], float)
        rng = np.random.default_rng(1)
        self.value_P = np.zeros(len(sums_PE))
        self.resampled_RP = np.zeros((resamples, len(sums_PE)))
        for group in groups:
            self.value_P += sums_PE[:, group].sum(axis=1) / tokens_E[group].sum() / len(groups)
            counts_RE = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), resamples)
            total_R = counts_RE @ tokens_E[group]
            self.resampled_RP += counts_RE @ sums_PE[:, group].T / total_R[:, None] / len(groups)

    def regret(self, plans: Sequence[int]) -> tuple[float, list[float]]:
        """Mean over trials of plan minus the best set, and its interval."""
        best = int(self.value_P.argmin())
        rng = np.random.default_rng(2)
        drawn_RT = rng.choice(np.array(plans), size=(len(self.resampled_RP), len(plans)))
        rows = np.arange(len(self.resampled_RP))[:, None]
        means_R = self.resampled_RP[rows, drawn_RT].mean(axis=1) - self.resampled_RP[:, best]
        mean = float(self.value_P[list(plans)].mean() - self.value_P[best])
        return mean, intervals(means_R)


def fresh_scores(scorer: Scorer, plans: Sequence[Candidate], resamples: int) -> FreshScores:
    sums_PE = np.array([score.lines for score in scorer.score_many(plans)])
    return FreshScores(scorer.calibration, sums_PE, resamples)


def summarise(
    space: Space,
    trials: Sequence[dict[tuple[str, str, str], Found]],
    name: str,
    fresh: Scorer,
    resamples: int,
) -> list[dict[str, Any]]:
    keys = [key for key in trials[0] if key[0] == name]
    plans = sorted({trial[key].best for trial in trials for key in keys})
    scores = fresh_scores(fresh, plans, resamples)
    rows = []
    for _, method, budget in keys:
        found = [trial[name, method, budget] for trial in trials]
        errors = [each.error for each in found]
        regret, regret_interval = scores.regret([plans.index(each.best) for each in found])
        evaluations = statistics.mean(each.evaluations for each in found)
        rows.append(
            {
                "space": name,
                "size": space.size,
                "method": method,
                "budget": budget,
                "evaluations": evaluations,
                "share": evaluations / space.size,
                **told_errors(errors, resamples),
                "best_fresh_score": float(scores.value_P.min()),
                "regret": regret,
                "regret_interval": regret_interval,
                "plans": [str(each.best) for each in found],
            }
        )
    return rows


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| space | method | budget | evaluations | of exhaustive | within 1 % | search error, mean "
        "(95 %) | median | regret on fresh examples (95 %) | best there |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, high = r["search_error_interval"]
        bottom, top = r["regret_interval"]
        lines.append(
            f"| {r['space']} | {r['method']} | {r['budget']} | {r['evaluations']:.0f} "
            f"| {r['share']:.1%} | {r['within_1_percent']} of {r['trials']} "
            f"| {r['search_error_mean']:.3g} ({low:.3g} to {high:.3g}) "
            f"| {r['search_error_median']:.3g} "
            f"| {r['regret']:.4f} ({bottom:.4f} to {top:.4f}) | {r['best_fresh_score']:.4f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory; default: the test-bed model")
    parser.add_argument("--spaces", nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--coupled-trials", type=int, default=3)
    parser.add_argument("--lines-per-task", type=int, default=64)
    parser.add_argument("--fresh-per-task", type=int, default=1000)
    parser.add_argument("--length", choices=sorted(tasks.LENGTHS), default="short")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter(), time.process_time()
    loaded = load_model(arguments.model or text_model_path(), dtype="float32")
    blocks = signature_of(loaded.model).num_blocks
    spaces = {name: Space(blocks, *SIZES[name]) for name in arguments.spaces}
    trials: dict[str, list[dict[tuple[str, str, str], Found]]] = {name: [] for name in spaces}
    for trial in range(arguments.trials):
        used = {n: s for n, s in spaces.items() if trial < trials_of(n, arguments)}
        if not used:
            break
        seed = arguments.seed + trial
        scorer, evaluator = scorer_for(
            loaded.model,
            loaded.tokenizer,
            "calibration",
            arguments.lines_per_task,
            seed,
            arguments.length,
        )
        table = Table(scorer, measure_influence(evaluator), measure_gate_hessian(evaluator), {})
        for space in used.values():
            table.lookup(list(space))
        found = run_trial(table, used, arguments.methods, seed)
        for name in used:
            trials[name].append(found)
        seconds = time.perf_counter() - started[0]
        print(f"trial {trial}: {len(table.scores)} scores, {seconds:.0f} s", flush=True)
    fresh, _ = scorer_for(
        loaded.model,
        loaded.tokenizer,
        "validation",
        arguments.fresh_per_task,
        FRESH_SEED,
        arguments.length,
    )
    rows = [
        row
        for name, space in spaces.items()
        for row in summarise(space, trials[name], name, fresh, arguments.resamples)
    ]
    write(arguments, rows, (time.perf_counter() - started[0], time.process_time() - started[1]))


def trials_of(space: str, arguments: argparse.Namespace) -> int:
    if space.startswith("coupled"):
        return min(arguments.trials, arguments.coupled_trials)
    return int(arguments.trials)


def write(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], seconds: tuple[float, float]
) -> None:
    machine = this_machine(device="cpu", num_threads=arguments.threads)
    name = arguments.model.name if arguments.model else "testbed-text"
    configuration = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("out", "model", "threads")
    } | {"model": name, "generation_size": GENERATION_SIZE, "dtype": "float32"}
    record = {
        "configuration": configuration,
        "machine": machine.model_dump(),
        "wall_s": seconds[0],
        "cpu_s": seconds[1],
        "results": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"search_quality-{name}"
    (arguments.out / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n")
    heading = (
        f"Search methods against the exhaustive optimum: {name}, float32, "
        f"{arguments.trials} trials ({arguments.coupled_trials} in coupled spaces) with fresh "
        f"calibration sets of {arguments.lines_per_task} lines per task ({arguments.length}), "
        f"regret on {arguments.fresh_per_task} fresh examples per task; budget `share` is what the "
        "claim allows (40 % of the exhaustive cost for 2 blocks, 20 % for 3, 15 % for 4, 5 % in "
        f"the coupled space), `own` is the method's default. {machine.processor}, torch "
        f"{machine.versions['torch']}, commit {machine.commit}.\n\n"
    )
    text = heading + table_of(rows) + "\n"
    (arguments.out / f"{stem}.md").write_text(text)
    print(table_of(rows))


if __name__ == "__main__":
    main()
