"""Claim: what a block costs when it is removed is the model's doing, not that of its quantisation.

A model that reached us in Q4_1 shows which blocks prefill and decode can do without. So a model
whose own weights we have is rounded in the same way (products of the blocks to Q4_1, embeddings to
Q8_0, by llama.cpp's own arithmetic), and both are mapped on the same lines: every block is removed
alone, from prefill with its KV still written, and from decode. Scores are KL to the same model with
nothing removed, mean over tasks.

    python benchmarks/quantised_map.py
    python benchmarks/quantised_map.py --per-task 2 --kind Q4_0
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from exhaustive.ranking import spearman
from lines.drawn import drawn_lines
from recorder.dots import Dots, Marks, Panel
from recorder.options import add_model, add_seed, benchmark_parser, model_name
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table

from rayapp.evaluation.measures.likelihood import TwoStages, likelihoods
from rayapp.models.formats.block_quants import QuantType, quantise
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import STAGES, PruningPlan
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.calibration import Calibration, load_calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.testbed import tasks


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_seed(options, "the questions of the test-bed", 11)
    options.add_argument("--kind", choices=get_args(QuantType), default="Q4_1")
    options.add_argument(
        "--data", type=Path, help="lines to map on; default: questions of the test-bed"
    )
    options.add_argument("--per-task", type=int, default=64, help="questions of every task")
    options.add_argument("--split", choices=tasks.SPLITS, default="validation")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    before, after = (load_model(arguments.model, dtype="float32") for _ in range(2))
    quantise(after.model, arguments.kind)
    lines = read_lines(arguments, before)
    recorder.write(
        num_lines=len(lines.lines),
        own_kl=distance(before, after, lines),
        maps={name: block_map(m, lines) for name, m in (("before", before), ("after", after))},
    )


def read_lines(arguments: Namespace, loaded: LoadedModel) -> Calibration:
    if arguments.data:
        return load_calibration(arguments.data, loaded.tokenizer)
    return drawn_lines(
        loaded.tokenizer, arguments.split, arguments.per_task, arguments.seed, length="mixed"
    )


def distance(before: LoadedModel, after: LoadedModel, lines: Calibration) -> float:
    """The KL that rounding alone costs, nats per answer token."""
    sides = (TwoStages(loaded.model, PruningPlan()) for loaded in (before, after))
    sums = [line for _, line in likelihoods(*sides, lines.lines)]
    return sum(line.kl for line in sums) / sum(line.num_tokens for line in sums)


def block_map(loaded: LoadedModel, lines: Calibration) -> dict[str, list[float]]:
    """The score of every block removed alone, stage by stage."""
    objective = Objective()
    compute = LocalCompute(Evaluator(loaded.model, lines, objective))
    scorer = Scorer(lines, objective, compute, weights="one model")
    blocks = [(2 * block, 2 * block + 1) for block in range(loaded.signature.num_blocks)]
    scores = scorer.score_many(
        [Candidate(**{stage: units}) for stage in STAGES for units in blocks]
    )
    values = [score.value for score in scores]
    return {"prefill": values[: len(blocks)], "decode": values[len(blocks) :]}


def report(record: Record) -> list[Block]:
    asked = record["configuration"]
    where = asked["data"] or f"questions of the {asked['split']} split"
    return [
        f"Blocks of {asked['model']} removed alone, with its own weights and after {asked['kind']} "
        f"(float32, {record['num_lines']} lines, {where}). KL to the same model with nothing "
        f"removed, nats per answer token, mean over tasks. Rounding alone costs a KL of "
        f"{record['own_kl']:.2g}.",
        *(agreement(record["maps"], stage) for stage in STAGES),
        Dots("KL of single blocks, before and after", [panel(record, s) for s in STAGES]),
        table_of(record["maps"]),
    ]


def agreement(maps: dict[str, Any], stage: str) -> str:
    """Rank correlation and largest change of one stage, in a sentence."""
    before, after = (np.array(maps[name][stage]) for name in ("before", "after"))
    changes = np.abs(np.log(after / before))
    worst = int(changes.argmax())
    k = max(1, len(before) // 3)
    cheapest = [set(np.argsort(values)[:k].tolist()) for values in (before, after)]
    return (
        f"**{stage}**: rank correlation {spearman(before, after):.3f}; the largest change is block "
        f"{worst}'s, from {before[worst]:.4f} to {after[worst]:.4f}; of the {k} cheapest blocks, "
        f"{len(cheapest[0] & cheapest[1])} are the same."
    )


def panel(record: Record, stage: str) -> Panel:
    maps = record["maps"]
    names = [str(block) for block in range(len(maps["before"][stage]))]
    words = {"before": "own weights", "after": f"after {record['configuration']['kind']}"}
    marks = [Marks(words[name], maps[name][stage], names) for name in maps]
    return Panel(stage, "KL, nats per answer token", marks, rows=names, is_log=True)


def table_of(maps: dict[str, Any]) -> Table:
    columns = ["block", *(f"{stage}, {when}" for stage in STAGES for when in ("before", "after"))]
    values = [maps[when][stage] for stage in STAGES for when in ("before", "after")]
    rows = [[str(n), *(f"{v:.4g}" for v in row)] for n, row in enumerate(zip(*values, strict=True))]
    return Table(columns, rows)


def label(arguments: Namespace) -> str:
    return f"{model_name(arguments.model)}-{arguments.kind.lower()}"


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
