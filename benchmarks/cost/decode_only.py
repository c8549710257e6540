"""Decode-only candidates against the bound (P + C)/C x L/(L - f)."""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

from lines.equal import equal_lines

from cost.meter import Cost, Meter
from cost.trial import naive
from rayapp.models.loading import LoadedModel
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.score import CHUNK_TOKENS


def decode_only(arguments: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """Single blocks removed from decode, each scored after the dense model and nothing else.

    The chunk has the size that a search has by default, and times are medians of some repeats.
    """
    tokens = arguments.prompt_tokens + arguments.continuation_tokens
    count = max(4, CHUNK_TOKENS // tokens // 4 * 4)
    lines = equal_lines(
        model.tokenizer,
        arguments,
        "calibration",
        count,
        arguments.seed,
        chunk_tokens=count * tokens,
    )
    repeats = [_once(model, lines) for _ in range(arguments.decode_runs)]
    rows = [
        _row(arguments, block, [repeat[block] for repeat in repeats], len(repeats[0]))
        for block in range(len(repeats[0]))
    ]
    totals = [_reached(repeat) for repeat in repeats]
    share = arguments.continuation_tokens / tokens
    blocks = len(rows)
    bound = blocks * blocks / sum(share * (blocks - block) for block in range(blocks))
    reached = {key: statistics.median(total[key] for total in totals) for key in totals[0]}
    return {
        "num_lines": len(lines.lines),
        "num_repeats": len(repeats),
        "blocks": [row for row in rows if math.isfinite(row["reached"])],
        "bound": bound,
        "reached": reached,
        "shares_of_bound": {key: value / bound for key, value in reached.items()},
        "least_share_of_bound": min(row["reached"] / row["bound"] for row in rows),
    }


def _once(model: LoadedModel, lines: Calibration) -> list[tuple[Cost, Cost]]:
    """Costs of every block's candidate, with reuse and from scratch."""
    evaluator = Evaluator(model.model, lines, Objective())
    evaluator.line_sums([DENSE], 0)
    costs = []
    for block in range(evaluator.runner.num_blocks):
        candidate = Candidate((), (2 * block, 2 * block + 1))
        with Meter(evaluator) as ours:
            evaluator.line_sums([candidate], 0)
        costs.append((ours.cost, naive(model.model, lines, [candidate])[0]))
    return costs


def _reached(costs: list[tuple[Cost, Cost]]) -> dict[str, float]:
    """Ratios of the costs from scratch to those with reuse, over all blocks."""
    ours = sum((mine for mine, _ in costs), Cost())
    return sum((theirs for _, theirs in costs), Cost()).over(ours)


def _row(
    arguments: argparse.Namespace, block: int, costs: list[tuple[Cost, Cost]], num_blocks: int
) -> dict[str, float]:
    """The row of one block in forwards, which are the same in every repeat."""
    ours, theirs = costs[0]
    prompt, answer = arguments.prompt_tokens, arguments.continuation_tokens
    return {
        "block": block,
        "bound": (prompt + answer) / answer * num_blocks / (num_blocks - block),
        "reached": theirs.forwards / ours.forwards if ours.forwards else math.inf,
    }
