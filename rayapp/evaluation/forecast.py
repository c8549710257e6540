"""An evaluation before it is measured: how much it computes, how long, and how exactly it tells.

Tokens are counted on both sides. Times follow from a rate that is measured now, on a few examples
of every kind, which all evaluators run at the same time: where they share cores or memory, they are
slower than one of them alone. A task's batches are shared out as they come, so that few batches do
not gain by many evaluators.

The interval of points lost follows from the share of examples on which only one of the two sides is
expected to be right (flips): ``1.96 x sqrt(flips / n)``, McNemar's.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayapp.evaluation.cells import NAMELESS, Table
from rayapp.evaluation.data import EvaluationData
from rayapp.evaluation.evaluate import AnyData, checked_inputs, num_threads
from rayapp.evaluation.pieces.compute import HERE, PieceCompute, Place
from rayapp.evaluation.pieces.piece import (
    Kind,
    Piece,
    answer_pieces,
    choice_pieces,
    likelihood_pieces,
    rollout_pieces,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.plan import PruningPlan

_TWO_SIDED = 1.96
_PROBED_EXAMPLES = 4
_PASSES: dict[Kind, int] = {"likelihood": 2, "rollouts": 4}
"""Passes over an example's tokens by kind, on both sides together; a greedy answer is one."""


@dataclass(frozen=True)
class ForecastRow:
    """The work of one task, and how exactly it will tell.

    ``seconds`` are those of all evaluators at work. ``points`` is the half width of the 95 %
    interval of points lost; None of texts and rollouts.
    """

    task: str
    what: str
    num_examples: int
    num_tokens: int
    seconds: float
    points: float | None


@dataclass(frozen=True)
class Forecast:
    """All tasks, with the share of flips that intervals follow from."""

    rows: tuple[ForecastRow, ...]
    flips: float

    @property
    def seconds(self) -> float:
        """Seconds of everything but timings, on the evaluators there are."""
        return sum(row.seconds for row in self.rows)

    @property
    def macro_points(self) -> float | None:
        """Half width of the interval of the mean over tasks; None without a task to judge."""
        widths = [row.points for row in self.rows if row.points is not None]
        return math.sqrt(sum(width**2 for width in widths)) / len(widths) if widths else None

    def tables(self) -> tuple[Table, ...]:
        """A line per task."""
        columns = ("task", "measured", "n", "tokens, both sides", "seconds", "points lost, +-")
        rows = tuple(
            (
                row.task or NAMELESS,
                row.what,
                f"{row.num_examples:,}",
                f"{row.num_tokens:,}",
                f"{row.seconds:,.0f}",
                "" if row.points is None else f"{row.points:.1f}",
            )
            for row in self.rows
        )
        return (Table("Before it is measured", columns, rows),)

    def sentence(self) -> str:
        """All rows together, in one sentence."""
        tokens = sum(row.num_tokens for row in self.rows)
        told = f"{tokens:,} tokens in about {self.seconds / 60:,.1f} min, timings aside"
        if self.macro_points is None:
            return told
        return (
            f"{told}; mean points lost will be known to +-{self.macro_points:.1f} (95 %), if "
            f"{self.flips:.0%} of answers flip"
        )


def forecast(
    model: str | Path,
    plan: PruningPlan | str | Path | None,
    data: AnyData,
    *,
    texts: AnyData = (),
    settings: EvaluationSettings,
    place: Place = HERE,
) -> Forecast:
    """Count an evaluation's work and measure its rate on a few examples; nothing is kept.

    Raises:
        InputError: The inputs are refused as by :func:`rayapp.evaluation.evaluate.evaluate`.
    """
    chosen, subject, examples = checked_inputs(model, plan, data, texts, settings)
    with num_threads(settings.num_threads), place.open(subject) as compute:
        compute.use(chosen)
        rates: dict[Kind, _Rate] = {}
        rows = [
            _row(task, what, pieces, rates, compute, settings)
            for task, what, pieces in _work(examples, settings)
        ]
        return Forecast(tuple(rows), settings.expected_flips)


@dataclass(frozen=True)
class _Rate:
    """Tokens per second of one evaluator, while so many run."""

    tokens_per_s: float
    num_evaluators: int

    def seconds(self, tokens: Sequence[int]) -> float:
        """Seconds of pieces of so many tokens; a free evaluator takes the next one."""
        free_at = [0.0] * self.num_evaluators
        for count in tokens:
            heapq.heapreplace(free_at, free_at[0] + count / self.tokens_per_s)
        return max(free_at)


def _work(
    data: EvaluationData, settings: EvaluationSettings
) -> Iterator[tuple[str, str, list[Piece]]]:
    size = settings.max_num_seqs
    for task, lines in data.completions.items():
        pieces = list(likelihood_pieces(lines))
        pieces += answer_pieces("dense answers", lines, max_num_seqs=size)
        pieces += answer_pieces("plan answers", lines, max_num_seqs=size)
        yield task, "completions", pieces
    for task, questions in data.choices.items():
        pieces = list(choice_pieces("dense choices", questions))
        pieces += choice_pieces("plan choices", questions)
        yield task, "choices", pieces
    for task, windows in data.texts.items():
        yield task, "windows of text", list(likelihood_pieces(windows.lines))
    for task, openings in data.openings.items():
        yield task, "rollouts", list(rollout_pieces(openings, max_num_seqs=size))


def _row(
    task: str,
    what: str,
    pieces: Sequence[Piece],
    rates: dict[Kind, _Rate],
    compute: PieceCompute,
    settings: EvaluationSettings,
) -> ForecastRow:
    by_kind: dict[Kind, list[Piece]] = {}
    for piece in pieces:
        by_kind.setdefault(piece.kind, []).append(piece)
    seconds, tokens = 0.0, 0
    for kind, same in by_kind.items():  # a kind begins when the one before it has ended
        if kind not in rates:
            rates[kind] = _rate(compute, same, kind, settings)
        counts = [_num_tokens(piece.examples, kind, settings) for piece in same]
        seconds += rates[kind].seconds(counts)
        tokens += sum(counts)
    places = {place for piece in pieces for place in piece.places}
    judged = what in ("completions", "choices")
    points = 100 * _TWO_SIDED * math.sqrt(settings.expected_flips / len(places))
    return ForecastRow(task, what, len(places), tokens, seconds, points if judged else None)


def _rate(
    compute: PieceCompute, pieces: Sequence[Piece], kind: Kind, settings: EvaluationSettings
) -> _Rate:
    """The rate on a few examples of a kind's middle piece, after one untimed run of each."""
    middle = pieces[len(pieces) // 2]
    some = middle.examples[: 1 if kind == "rollouts" else _PROBED_EXAMPLES]
    probe = Piece(kind, tuple(range(len(some))), some)
    if kind != "rollouts":
        list(compute.run([probe] * compute.num_evaluators))
    num_evaluators = compute.num_evaluators
    seconds = [done.seconds for done in compute.run([probe] * num_evaluators)]
    tokens = _num_tokens(some, kind, settings)
    return _Rate(tokens / statistics.mean(seconds), num_evaluators)


def _num_tokens(examples: Sequence[Any], kind: Kind, settings: EvaluationSettings) -> int:
    """Number of tokens that both sides run together."""
    passes = _PASSES.get(kind, 1)
    return sum(passes * _length(example, kind, settings) for example in examples)


def _length(example: Any, kind: Kind, settings: EvaluationSettings) -> int:
    """Number of tokens of one pass over an example."""
    if kind == "rollouts":
        return len(example.prompt) + settings.max_rollout_tokens
    if kind in ("dense answers", "plan answers"):
        return len(example.prompt) + int(example.num_answer_tokens)
    rest = getattr(example, "continuation", ())
    choices = getattr(example, "choices", ())
    return len(example.prompt) + len(rest) + sum(map(len, choices))
