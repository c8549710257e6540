"""Claim: the model of block interactions is better fitted to real scores than taken from gradients.

As in `search_quality.py`, every trial draws a fresh calibration set and scores every candidate of
every space on it, which is the truth. Reported apart:

- models: how each ranks the candidates (Spearman's rank correlation with the real scores, over the
  whole space and over those that the fitted model was not told), how far its favourite is off, and
  what has been spent when its order, verified from the top, meets a set within 1 % of the optimum;
- methods: search error at the cost that the claim of `search_quality.py` allows.

Models: Hessian in gates from gradients (`cbo`; with more draws, to see whether its noise matters;
and of the data's labels, as published), the sum of single units' scores, those scores with the
gradients' interactions (lengths measured, angles from gradients), and the model that `surrogate`
has fitted when its evaluations are spent. Cost is in candidate scores on the whole set, gradient
passes counted threefold.

    python benchmarks/surrogate_gradients.py
    python benchmarks/surrogate_gradients.py --model out/model --spaces decode2 --trials 3
"""

from __future__ import annotations

import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from exhaustive.errors import ERROR_COLUMNS, error_cells, told_errors, trial_interval
from exhaustive.ranking import Array, Ranking, Truth
from exhaustive.replay import GENERATION_SIZE, Found, replay, told_to
from exhaustive.scores import ScoreTable, scorer_of, trial_evaluator
from exhaustive.spaces import budget_of, spaces_in_trial, spaces_of, trials_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table, interval

from rayapp.models.loading import load_model
from rayapp.pruning.candidates.candidate import DENSE
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.gate_hessian import GateHessian, measure_gate_hessian, measuring_cost
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.methods.cbo import quadratic_model
from rayapp.pruning.methods.method import Setup
from rayapp.pruning.methods.quadratic import Quadratic, features, root_losses, singles
from rayapp.pruning.methods.surrogate import Surrogate

GRADIENTS, FITTED = "gradients", "fitted to real scores"
METHODS = ("cbo", "surrogate", "one_shot")
SPACES = ["decode2", "decode3", "prefill2", "coupled2"]

Hessians = dict[str, tuple[GateHessian, int]]
"""Hessians by name, with the cost of measuring them."""


@dataclass(frozen=True)
class Trial:
    """The results of one calibration set on one space."""

    rankings: dict[str, Ranking]
    found: dict[str, Found]


def parser() -> ArgumentParser:
    options = trials_parser(__doc__, spaces=SPACES, trials=5, coupled_trials=2, lines=32)
    options.add_argument("--draws", type=int, default=16, help="of the Hessian with less noise")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    spaces = spaces_of(arguments, loaded.signature.num_blocks)
    trials: dict[str, list[Trial]] = {name: [] for name in spaces}
    started_s = time.process_time()
    for number in range(arguments.trials):
        used = spaces_in_trial(spaces, number, arguments)
        evaluator = trial_evaluator(loaded, number, arguments)
        hessians = measured_hessians(evaluator, arguments.draws)
        table = ScoreTable(
            scorer_of(evaluator), measure_influence(evaluator), hessians[GRADIENTS][0]
        )
        for name, space in used.items():
            trials[name].append(trial_of(table, space, hessians, arguments.seed + number))
        cpu_s = time.process_time() - started_s
        print(f"trial {number}: {len(table.scores)} scores, {cpu_s:.0f} s of CPU", flush=True)
    recorder.write(
        generation_size=GENERATION_SIZE,
        models=[
            r for n, found in trials.items() for r in model_rows(n, found, arguments.resamples)
        ],
        methods=[
            row
            for name, found in trials.items()
            for row in method_rows(name, spaces[name], found, arguments.resamples)
        ],
    )


def trial_of(table: ScoreTable, space: Space, hessians: Hessians, seed: int) -> Trial:
    rankings = rank_models(Truth.of(table, space), table, hessians, seed)
    found = {m: replay(table, space, m, budget_of(space), seed) for m in METHODS}
    return Trial(rankings, found)


def measured_hessians(evaluator: Evaluator, draws: int) -> Hessians:
    return {
        GRADIENTS: (measure_gate_hessian(evaluator), measuring_cost()),
        f"{GRADIENTS}, {draws} draws": (
            measure_gate_hessian(evaluator, draws=draws),
            measuring_cost(draws),
        ),
        f"{GRADIENTS}, data's labels": (
            measure_gate_hessian(evaluator, labels="data"),
            measuring_cost(),
        ),
    }


def angled(lengths_M: Array, hessian: Quadratic) -> Quadratic:
    """Changes with measured squared lengths, at the angles that a Hessian sees between them."""
    roots_M = np.sqrt(2 * hessian.linear_M)
    cosines_MM = hessian.pairs_MM / np.maximum(np.outer(roots_M, roots_M), 1e-30)
    sizes_M = np.sqrt(np.maximum(lengths_M, 0.0))
    return Quadratic(lengths_M, 2 * cosines_MM * np.outer(sizes_M, sizes_M))


def rank_models(
    truth: Truth, table: ScoreTable, hessians: Hessians, seed: int
) -> dict[str, Ranking]:
    space, probes = truth.space, singles(truth.space)
    [dense_score] = table.lookup([DENSE])
    models = {
        name: (quadratic_model(space, hessian.units(space.num_units)), cost)
        for name, (hessian, cost) in hessians.items()
    }
    losses_P = np.array(table.lookup(probes)) - dense_score
    lengths_M = losses_P @ features(space, probes)
    model, cost = models[GRADIENTS]
    models["sum of singles"] = Quadratic.additive(lengths_M), 1 + len(probes)
    models["singles at gradients' angles"] = angled(lengths_M, model), 1 + len(probes) + cost
    told = told_to(Surrogate(Setup(space, budget_of(space), GENERATION_SIZE, seed)), table)
    targets_N = root_losses(np.array(list(told.values())), dense_score)
    fitted = Quadratic.fitted(features(space, list(told)), targets_N)
    unseen_N = np.array([candidate not in told for candidate in truth.candidates])
    ranked = {name: truth.ranking(model, unseen_N, cost) for name, (model, cost) in models.items()}
    return ranked | {FITTED: truth.ranking(fitted, unseen_N, len(told), list(told))}


def model_rows(name: str, trials: Sequence[Trial], resamples: int) -> list[dict[str, Any]]:
    rows = []
    for model in trials[0].rankings:
        found = [trial.rankings[model] for trial in trials]
        correlations = [each.correlation for each in found]
        unseen = [each.unseen_correlation for each in found]
        errors = [each.favourite_error for each in found]
        rows.append(
            {
                "space": name,
                "model": model,
                "trials": len(found),
                "cost": found[0].cost,
                "correlation": statistics.mean(correlations),
                "correlation_interval": trial_interval(correlations, resamples),
                "unseen_correlation": statistics.mean(unseen),
                "unseen_correlation_interval": trial_interval(unseen, resamples),
                "favourite_error_median": statistics.median(errors),
                "favourite_errors": errors,
                "cost_to_1_percent_median": statistics.median(e.cost_to_limit for e in found),
                "costs_to_1_percent": [each.cost_to_limit for each in found],
            }
        )
    return rows


def method_rows(name: str, space: Space, trials: Sequence[Trial], resamples: int) -> list[Any]:
    rows = []
    for method in METHODS:
        found = [trial.found[method] for trial in trials]
        errors = [each.error for each in found]
        rows.append(
            {
                "space": name,
                "size": space.size,
                "method": method,
                "evaluations": statistics.mean(each.evaluations for each in found),
                **told_errors(errors, resamples),
                "plans": [str(each.best) for each in found],
            }
        )
    return rows


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    return [
        f"Models of block interactions against exhaustively scored spaces: {asked['model']}, "
        f"{asked['dtype']}, {asked['trials']} trials ({asked['coupled_trials']} in coupled "
        f"spaces) with fresh calibration sets of {asked['calibration_per_task']} lines per task "
        f"({asked['length']}). Costs are candidate scores on the whole set, gradient passes "
        "threefold; unseen ones are those that the fitted model was not told.",
        models_table(record["models"]),
        "Search methods at the cost that the claim of `search_quality.py` allows (40 % of the "
        "exhaustive cost for 2 blocks, 20 % for 3, 5 % in the coupled space); `one_shot` stops by "
        "itself.",
        methods_table(record["methods"]),
    ]


def models_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = (
        *("space", "model", "cost", "rank correlation (95 %)", "on unseen ones (95 %)"),
        *("favourite's error, median", "cost to 1 %, median"),
    )
    cells = [
        (
            *(r["space"], r["model"], str(r["cost"])),
            interval(r["correlation"], r["correlation_interval"], ".2f"),
            interval(r["unseen_correlation"], r["unseen_correlation_interval"], ".2f"),
            f"{r['favourite_error_median']:.3g}",
            f"{r['cost_to_1_percent_median']:g}",
        )
        for r in rows
    ]
    return Table(columns, cells)


def methods_table(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [
        (
            *(r["space"], r["method"], f"{r['evaluations']:.0f}"),
            f"{r['evaluations'] / r['size']:.1%}",
            *error_cells(r),
        )
        for r in rows
    ]
    return Table(("space", "method", "cost", "of exhaustive", *ERROR_COLUMNS), cells)


if __name__ == "__main__":
    run(parser(), measure, report)
