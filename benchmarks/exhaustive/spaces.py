"""Spaces small enough to score whole, with the allowed costs of their searches, and options."""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from recorder.options import add_model, add_seed, benchmark_parser

from rayapp.pruning.candidates.space import Space
from rayapp.testbed import tasks

SIZES = {
    "decode2": (0, 2),
    "decode3": (0, 3),
    "decode4": (0, 4),
    "prefill2": (2, 0),
    "prefill3": (3, 0),
    "prefill4": (4, 0),
    "coupled2": (2, 2),
}
"""Numbers of blocks removed from prefill and from decode."""
SHARES = {66: 0.4, 220: 0.2, 495: 0.15, 4356: 0.05}
"""Share of the exhaustive cost that the claim allows, by size of the space (12 blocks)."""


def trials_parser(
    doc: str | None, *, spaces: Sequence[str], trials: int, coupled_trials: int, lines: int
) -> ArgumentParser:
    """A parser of options for benchmarks that score whole spaces, trial by trial."""
    parser = benchmark_parser(doc)
    add_model(parser)
    add_seed(parser, "the first trial; every further one adds 1")
    parser.add_argument("--spaces", nargs="+", choices=sorted(SIZES), default=list(spaces))
    parser.add_argument("--trials", type=int, default=trials, help="calibration sets drawn")
    parser.add_argument("--coupled-trials", type=int, default=coupled_trials)
    parser.add_argument("--calibration-per-task", type=int, default=lines)
    parser.add_argument("--length", choices=sorted(tasks.LENGTHS), default="short")
    parser.add_argument("--resamples", type=int, default=2000, help="of every interval")
    return parser


def budget_of(space: Space) -> int:
    """Number of candidate scores that the claim allows a search of this space."""
    return math.floor(SHARES.get(space.size, 0.15) * space.size)


def spaces_of(arguments: Namespace, num_blocks: int) -> dict[str, Space]:
    """The chosen spaces by name."""
    return {name: Space(num_blocks, *SIZES[name]) for name in arguments.spaces}


def spaces_in_trial(spaces: dict[str, Space], trial: int, arguments: Namespace) -> dict[str, Space]:
    """The spaces of one trial; coupled ones are large, and take part in fewer."""
    limits = {True: arguments.coupled_trials, False: arguments.trials}
    return {n: s for n, s in spaces.items() if trial < limits[n.startswith("coupled")]}
