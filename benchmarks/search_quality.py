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
    python benchmarks/search_quality.py --trials 3 --calibration-per-task 8 \\
        --spaces decode4 prefill4
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

import numpy as np
from exhaustive.errors import ERROR_COLUMNS, error_cells, intervals, told_errors
from exhaustive.replay import GENERATION_SIZE, Found, replay
from exhaustive.scores import ScoreTable, scorer_of, trial_evaluator
from exhaustive.spaces import SIZES, budget_of, spaces_in_trial, spaces_of, trials_parser
from lines.drawn import drawn_lines
from lines.resampled import ResampledScores
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table, interval

from rayapp.models.loading import load_model
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.gate_hessian import measure_gate_hessian
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.methods.table import METHODS
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.settings.objective import Objective

FRESH_SEED = 1_000_003

Trial = dict[tuple[str, str, str], Found]
"""The outcomes of one trial, by space, method and budget."""


def parser() -> ArgumentParser:
    options = trials_parser(__doc__, spaces=list(SIZES), trials=10, coupled_trials=3, lines=64)
    options.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    options.add_argument("--fresh-per-task", type=int, default=1000)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    spaces = spaces_of(arguments, loaded.signature.num_blocks)
    trials: dict[str, list[Trial]] = {name: [] for name in spaces}
    started_s = time.perf_counter()
    for number in range(arguments.trials):
        used = spaces_in_trial(spaces, number, arguments)
        if not used:
            break
        table = score_table(trial_evaluator(loaded, number, arguments))
        for space in used.values():
            table.lookup(list(space))
        outcomes = replayed(table, used, arguments.methods, arguments.seed + number)
        for name in used:
            trials[name].append(outcomes)
        seconds = time.perf_counter() - started_s
        print(f"trial {number}: {len(table.scores)} scores, {seconds:.0f} s", flush=True)
    fresh_lines = drawn_lines(
        loaded.tokenizer,
        "validation",
        arguments.fresh_per_task,
        FRESH_SEED,
        length=arguments.length,
    )
    fresh = scorer_of(Evaluator(loaded.model, fresh_lines, Objective()))
    rows = [
        row
        for name, space in spaces.items()
        for row in rows_of(name, space, trials[name], fresh, arguments.resamples)
    ]
    recorder.write(generation_size=GENERATION_SIZE, results=rows)


def score_table(evaluator: Evaluator) -> ScoreTable:
    return ScoreTable(
        scorer_of(evaluator), measure_influence(evaluator), measure_gate_hessian(evaluator)
    )


def replayed(
    table: ScoreTable, spaces: dict[str, Space], methods: Sequence[str], seed: int
) -> Trial:
    outcomes = {}
    for name, space in spaces.items():
        for method in methods:
            if method != "exhaustive":
                allowed = budget_of(space)
                outcomes[name, method, "share"] = replay(table, space, method, allowed, seed)
            outcomes[name, method, "own"] = replay(table, space, method, None, seed)
    return outcomes


def regret(scores: ResampledScores, plans: Sequence[int]) -> tuple[float, list[float]]:
    """Regret: mean over trials of the plan's score minus the best set's, and its interval."""
    best = int(scores.value_P.argmin())
    rng = np.random.default_rng(2)
    resampled_RP = scores.resampled_RP
    drawn_RT = rng.choice(np.array(plans), size=(len(resampled_RP), len(plans)))
    rows = np.arange(len(resampled_RP))[:, None]
    means_R = resampled_RP[rows, drawn_RT].mean(axis=1) - resampled_RP[:, best]
    mean = float(scores.value_P[list(plans)].mean() - scores.value_P[best])
    return mean, intervals(means_R)


def rows_of(
    name: str, space: Space, trials: Sequence[Trial], fresh: Scorer, resamples: int
) -> list[dict[str, Any]]:
    """The rows of one space, one per method and budget."""
    keys = [key for key in trials[0] if key[0] == name]
    plans = sorted({trial[key].best for trial in trials for key in keys})
    sums_PL = np.array([score.lines for score in fresh.score_many(plans)])
    scores = ResampledScores(fresh.calibration, sums_PL, np.random.default_rng(1), resamples)
    rows = []
    for key in keys:
        outcomes = [trial[key] for trial in trials]
        mean_regret, regret_interval = regret(scores, [plans.index(each.best) for each in outcomes])
        evaluations = statistics.mean(each.evaluations for each in outcomes)
        rows.append(
            {
                "space": name,
                "size": space.size,
                "method": key[1],
                "budget": key[2],
                "evaluations": evaluations,
                "share": evaluations / space.size,
                **told_errors([each.error for each in outcomes], resamples),
                "best_fresh_score": float(scores.value_P.min()),
                "regret": mean_regret,
                "regret_interval": regret_interval,
                "plans": [str(each.best) for each in outcomes],
            }
        )
    return rows


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    columns = (
        *("space", "method", "budget", "evaluations", "of exhaustive"),
        *ERROR_COLUMNS,
        *("regret on fresh examples (95 %)", "best there"),
    )
    rows = [
        (
            *(r["space"], r["method"], r["budget"], f"{r['evaluations']:.0f}"),
            f"{r['share']:.1%}",
            *error_cells(r),
            interval(r["regret"], r["regret_interval"], ".4f"),
            f"{r['best_fresh_score']:.4f}",
        )
        for r in record["results"]
    ]
    return [
        f"Search methods against the exhaustive optimum: {asked['model']}, {asked['dtype']}, "
        f"{asked['trials']} trials ({asked['coupled_trials']} in coupled spaces) with fresh "
        f"calibration sets of {asked['calibration_per_task']} lines per task ({asked['length']}), "
        f"regret on {asked['fresh_per_task']} fresh examples per task; budget `share` is what the "
        "claim allows (40 % of the exhaustive cost for 2 blocks, 20 % for 3, 15 % for 4, 5 % in "
        "the coupled space), `own` is the method's default.",
        Table(columns, rows),
    ]


if __name__ == "__main__":
    run(parser(), measure, report)
