"""An evaluation before it is measured: how much it computes, how long, and how exactly it tells.

Tokens are counted on both sides. Times follow from a rate that is measured now, on a few examples
of every kind. The interval of points lost follows from the share of examples on which only one of
the two sides is expected to be right (flips): ``1.96 x sqrt(flips / n)``, McNemar's.
"""

from __future__ import annotations

import math
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

    ``points`` is the half width of the 95 % interval of points lost; None of texts and rollouts.
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
    num_evaluators: int

    @property
    def seconds(self) -> float:
        """Seconds of everything but timings, on the evaluators there are."""
        return sum(row.seconds for row in self.rows) / self.num_evaluators

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
        rates: dict[Kind, float] = {}
        rows = [
            _row(task, what, pieces, rates, compute, settings)
            for task, what, pieces in _work(examples, settings)
        ]
        return Forecast(tuple(rows), settings.expected_flips, compute.num_evaluators)


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
    rates: dict[Kind, float],
    compute: PieceCompute,
    settings: EvaluationSettings,
) -> ForecastRow:
    seconds, tokens, places = 0.0, 0, set()
    for piece in pieces:
        if piece.kind not in rates:
            rates[piece.kind] = _rate(compute, pieces, piece.kind, settings)
        count = _num_tokens(piece.examples, piece.kind, settings)
        seconds += count / rates[piece.kind]
        tokens += count
        places |= set(piece.places)
    judged = what in ("completions", "choices")
    points = 100 * _TWO_SIDED * math.sqrt(settings.expected_flips / len(places))
    return ForecastRow(task, what, len(places), tokens, seconds, points if judged else None)


def _rate(
    compute: PieceCompute, pieces: Sequence[Piece], kind: Kind, settings: EvaluationSettings
) -> float:
    """Tokens per second of a kind, on a few examples of its middle piece, after one untimed run."""
    same = [piece for piece in pieces if piece.kind == kind]
    middle = same[len(same) // 2]
    some = middle.examples[: 1 if kind == "rollouts" else _PROBED_EXAMPLES]
    probe = Piece(kind, tuple(range(len(some))), some)
    if kind != "rollouts":
        list(compute.run([probe]))
    (done,) = compute.run([probe])
    return _num_tokens(some, kind, settings) / done.seconds


def _num_tokens(examples: Sequence[Any], kind: Kind, settings: EvaluationSettings) -> int:
    """Number of tokens that both sides run together."""
    passes = _PASSES.get(kind, 1)
    answer = settings.max_rollout_tokens if kind == "rollouts" else 0
    return sum(passes * (_length(example) + answer) for example in examples)


def _length(example: Any) -> int:
    rest = getattr(example, "continuation", ())
    choices = getattr(example, "choices", ())
    return len(example.prompt) + len(rest) + sum(map(len, choices))
