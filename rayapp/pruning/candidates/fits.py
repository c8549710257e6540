"""Healing in closed form: which linear maps a candidate is healed with, as data.

A **span** is a run of neighbouring blocks that a stage skips whole. Two kinds of **fit** heal it,
and both are solved by least squares on the dense model's states:

- ``kv``: a block of the span still writes keys and values in prefill. Its two projections are refit
  to give the dense model's keys and values from the state that really enters them, which is the one
  that entered the span (SwiftKV, arXiv:2410.03960, trains them; we solve for them).
- ``bridge``: a linear map stands for the span in the residual (ReplaceMe, arXiv:2505.02819).

A fit that reads the dense model's states depends on no candidate, so it is solved once for all of
them. A fit that reads the states that the healed stage really makes (``before``) belongs to all
candidates that begin alike. Where survivors are trained as well, they take the spans of one block
(:mod:`rayapp.pruning.candidates.healing`): a survivor beside a longer span would feed its maps with
states that these were not fitted to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates.candidate import DENSE, Candidate

FitKind = Literal["bridge", "kv"]


@dataclass(frozen=True, order=True)
class Fit:
    """One linear map of a stage, from the dense state that enters one block to that of another.

    Attributes:
        stage: The stage that runs it.
        kind: ``bridge`` maps to the state itself, ``kv`` to the keys and values made of it.
        first: The block whose input state the map reads.
        stop: The block whose input state, or KV, the map gives.
        block: The block that has the map's tensors: ``stop`` itself for KV, and the last one of the
            span for a bridge.
        before: What is skipped, and healed in closed form, before the state that the map reads; by
            default nothing is, and the state is the dense model's.
    """

    stage: Stage
    kind: FitKind
    first: int
    stop: int
    block: int
    before: Candidate = DENSE

    def __str__(self) -> str:
        behind = "" if self.before == DENSE else f" behind {self.before}"
        if self.kind == "kv":
            return f"{self.stage} KV of {self.stop} from {self.first}{behind}"
        return f"{self.stage} bridge {self.first} to {self.stop}{behind}"


def spans(skipped: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Runs of neighbouring blocks that are skipped, as ``(first, stop)``, ascending."""
    first = None
    for block, gone in enumerate([*skipped, False]):
        if gone and first is None:
            first = block
        elif not gone and first is not None:
            yield first, block
            first = None


def span_fits(
    stage: Stage,
    span: tuple[int, int],
    writes_kv: Sequence[bool],
    *,
    bridged: bool,
    before: Candidate = DENSE,
) -> Iterator[Fit]:
    """The fits of one span.

    Args:
        stage: The stage that skips the span.
        span: Its first block, and the block behind it.
        writes_kv: Whether a block still writes KV, block by block.
        bridged: Whether anything reads the state behind the span.
        before: What is skipped before the span, if its fits read the states that this leaves.
    """
    first, stop = span
    for block in range(first, stop):
        if writes_kv[block] and (block != first or before != DENSE):
            yield Fit(stage, "kv", first, block, block, before)
    if bridged:
        yield Fit(stage, "bridge", first, stop, stop - 1, before)


def all_fits(num_blocks: int) -> Iterator[Fit]:
    """Every fit to dense states that a candidate of a model of so many blocks may have."""
    for first, last in itertools.combinations_with_replacement(range(num_blocks), 2):
        for stage in STAGES:
            yield Fit(stage, "bridge", first, last + 1, last)
        if first < last:
            yield Fit("prefill", "kv", first, last, last)
