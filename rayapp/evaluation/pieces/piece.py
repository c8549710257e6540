"""Pieces of an evaluation: examples that run as one batch, and what was measured of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.measures.answers import BATCHES_AT_ONCE, JudgedAnswer
from rayapp.evaluation.measures.choices import Question, question_groups
from rayapp.evaluation.measures.likelihood import LineLikelihood, line_groups
from rayapp.evaluation.measures.rollouts import Opening, Rollout
from rayapp.kv.ledger import TransferRecord

Kind = Literal[
    "likelihood", "dense answers", "plan answers", "dense choices", "plan choices", "rollouts"
]
"""The measures of a piece; progress uses the same words."""
OF_DENSE: frozenset[Kind] = frozenset({"dense answers", "dense choices"})
"""Kinds that measure the dense model alone, so that no plan changes them."""


@dataclass(frozen=True)
class Piece:
    """Examples of one task that are measured together.

    Attributes:
        kind: What is measured.
        places: The examples' numbers within their task.
        examples: Lines, questions or openings, as ``kind`` wants them.
    """

    kind: Kind
    places: tuple[int, ...]
    examples: tuple[Any, ...]

    @cached_property
    def key(self) -> str:
        """Hash of what is measured, whatever the task is called."""
        content = [self.kind, [asdict(example) for example in self.examples]]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Done:
    """The values measured of a piece, example by example, and the seconds that it took."""

    piece: Piece
    values: tuple[Any, ...]
    seconds: float


def likelihood_pieces(lines: Sequence[TokenizedLine]) -> Iterator[Piece]:
    """Batches that run end to end; lines about images run one by one."""
    texts = [n for n, line in enumerate(lines) if not isinstance(line, TokenizedImageLine)]
    for group in line_groups([lines[n] for n in texts]):
        yield _piece("likelihood", lines, [texts[place] for batch in group for place in batch])
    for number in sorted(set(range(len(lines))) - set(texts)):
        yield _piece("likelihood", lines, [number])


def answer_pieces(
    kind: Literal["dense answers", "plan answers"],
    lines: Sequence[TokenizedLine],
    *,
    max_num_seqs: int,
) -> Iterator[Piece]:
    """Slices of lines that the engine answers in one call."""
    yield from _slices(kind, lines, max_num_seqs * BATCHES_AT_ONCE)


def choice_pieces(
    kind: Literal["dense choices", "plan choices"], questions: Sequence[Question]
) -> Iterator[Piece]:
    """Batches of questions that run end to end."""
    for group in question_groups(questions):
        yield _piece(kind, questions, [place for batch in group for place in batch])


def rollout_pieces(openings: Sequence[Opening], *, max_num_seqs: int) -> Iterator[Piece]:
    """Prompts that are answered together."""
    yield from _slices("rollouts", openings, max_num_seqs)


def _slices(kind: Kind, examples: Sequence[Any], size: int) -> Iterator[Piece]:
    for start in range(0, len(examples), size):
        yield _piece(kind, examples, range(start, min(start + size, len(examples))))


def _piece(kind: Kind, examples: Sequence[Any], places: Iterable[int]) -> Piece:
    chosen = tuple(places)
    return Piece(kind, chosen, tuple(examples[place] for place in chosen))


def as_json(value: Any) -> Any:
    """A measured value as plain data."""
    return list(value) if isinstance(value, tuple) else asdict(value)


def from_json(kind: Kind, value: Any) -> Any:
    """The measured value that :func:`as_json` wrote; floats come back bit for bit."""
    if kind in ("dense choices", "plan choices"):
        return tuple(value)
    if kind == "likelihood":
        return LineLikelihood(**value)
    if kind == "rollouts":
        return Rollout(**{name: tuple(part) for name, part in value.items()})
    return JudgedAnswer(**(value | {"transfer": TransferRecord(**value["transfer"])}))
