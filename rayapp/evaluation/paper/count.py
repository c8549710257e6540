"""The work of a paper before it is begun: what is done, and the tokens and hours of the rest.

Tokens are those that one side runs: of a search, every candidate on every calibration line, at
most, since candidates share states; of an evaluation, all examples on both sides. Hours follow from
a rate that was measured, on rows that are done or on a few lines before the start.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.cells import Table
from rayapp.evaluation.data import EvaluationData
from rayapp.evaluation.pieces.compute import PieceCompute
from rayapp.evaluation.pieces.piece import Piece
from rayapp.pruning.methods.method import Setup
from rayapp.pruning.methods.table import GRADIENT_METHODS, METHODS
from rayapp.pruning.settings.search import SearchSettings

GRADIENT_PASSES = 3
"""Evaluations that a gradient pass counts as."""
NUM_PROBED = 6
"""Lines that a rate is probed on (project default)."""
FEW = 2
"""Evaluations of a method that ranks by influence: its measurement, and the plan."""


@dataclass(frozen=True)
class Job:
    """One row's work that is left.

    Attributes:
        title: The row's title.
        removed: Its sizes in words.
        search_tokens: Tokens of its search; 0 if its plan is there.
        data_tokens: Tokens of the data sets that it has not met.
        num_data: Number of these data sets.
    """

    title: str
    removed: str
    search_tokens: int
    data_tokens: int
    num_data: int

    @property
    def tokens(self) -> int:
        """All tokens that are left."""
        return self.search_tokens + self.data_tokens

    @property
    def state(self) -> str:
        """How far the row is, in a word or two."""
        if self.search_tokens:
            return "to search"
        return f"{self.num_data} to measure" if self.num_data else "done"


@dataclass(frozen=True)
class Count:
    """All jobs, and a measured rate in tokens per second; None if nothing was measured yet."""

    jobs: Sequence[Job]
    rate: float | None

    @property
    def tokens(self) -> int:
        """All tokens that are left."""
        return sum(job.tokens for job in self.jobs)

    def hours(self, tokens: int) -> str:
        """The time of so many tokens in words."""
        return "-" if not self.rate else f"{tokens / self.rate / 3600:.2f}"

    def sentence(self) -> str:
        """How much is left, in one sentence."""
        left = sum(job.state != "done" for job in self.jobs)
        told = f"{left} of {len(self.jobs)} rows left, {self.tokens:,} tokens at most"
        if not self.rate or not left:
            return told
        return f"{told}, {self.hours(self.tokens)} h at {self.rate:,.0f} tokens per second"

    def table(self) -> Table:
        """A line per row: state, tokens and hours left."""
        rows = tuple(
            (job.title, job.removed, job.state, f"{job.tokens:,}", self.hours(job.tokens))
            for job in self.jobs
        )
        columns = ("row", "blocks removed, prefill and decode", "state", "tokens left", "hours")
        return Table(self.sentence(), columns, rows)


def tokens_of(data: EvaluationData) -> int:
    """Number of tokens that one side runs of a data set; answers as long as the right ones."""
    choices = sum(
        len(question.prompt) + sum(map(len, question.choices))
        for task in data.choices.values()
        for question in task
    )
    lines = [line for task in data.completions.values() for line in task]
    windows = [line for task in data.texts.values() for line in task.lines]
    twice = sum(
        2 * len(line.prompt) + len(line.continuation) + line.num_answer_tokens for line in lines
    )
    return choices + twice + sum(len(one.prompt) + len(one.continuation) for one in windows)


def search_evaluations(search: SearchSettings, num_blocks: int) -> int:
    """Number of candidates that a search scores at most."""
    space, kind = search.space(num_blocks), METHODS[search.method]
    if kind.uses_influence:
        return FEW
    gradients = search.method in GRADIENT_METHODS
    name = "surrogate" if gradients else search.method
    setup = Setup(space, search.evaluations, search.generation_size, search.seed)
    return METHODS[name](setup).evaluations_left + gradients * GRADIENT_PASSES


def probed_rate(compute: PieceCompute, lines: Sequence[TokenizedLine]) -> float:
    """Tokens per second of both sides on all evaluators, which run the same few lines together."""
    num_evaluators = compute.num_evaluators
    probe = Piece("likelihood", tuple(range(len(lines))), tuple(lines))
    seconds = [done.seconds for done in compute.run([probe] * num_evaluators)]
    tokens = 2 * sum(len(line.prompt) + len(line.continuation) for line in lines)
    return num_evaluators * tokens / statistics.mean(seconds)


def few_lines(data_sets: Iterable[EvaluationData]) -> list[TokenizedLine]:
    """Lines that a rate can be probed on: one of every task, none about images."""
    return list(itertools.islice(_firsts(data_sets), NUM_PROBED))


def _firsts(data_sets: Iterable[EvaluationData]) -> Iterator[TokenizedLine]:
    for data in data_sets:
        for question in (task[0] for task in data.choices.values()):
            yield TokenizedLine(question.prompt, question.choices[0], question.task)
        yield from (task[0] for task in data.completions.values() if not data.image_lines)
        yield from (task.lines[0] for task in data.texts.values())
