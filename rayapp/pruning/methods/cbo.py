"""CBO: a quadratic model of block interactions from gradients ranks; real scores verify.

After CBO (arXiv:2602.00161): removing the units ``x`` is taken to cost ``x^T H x / 2``, with ``H``
the Hessian of the dense model's score in gates on its units. Project defaults: gates per stage and
part (:mod:`rayapp.pruning.measures.gate_hessian`), the space's own rules in place of an Ising
solver, and its best candidates scored, best first, until evaluations or candidates are spent.
Nothing is fitted again: that is ``surrogate``, which keeps the model and measures its entries
instead.

The Hessian costs as much as three evaluations, on top of those that are allowed. Without
``--evaluations``, their number grows with the square root of the space's size as for ``surrogate``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rayapp.pruning.candidates.space import Space
from rayapp.pruning.methods.landscape import Landscape
from rayapp.pruning.methods.method import Generation, Setup
from rayapp.pruning.methods.quadratic import Array, Quadratic
from rayapp.pruning.methods.surrogate import MAX_VERIFIED, PER_ROOT


class Cbo:
    """Verifies the favourites of a model of gradients, a generation at a time."""

    uses_influence = False

    def __init__(self, setup: Setup) -> None:
        assert setup.gate_hessian is not None, "cbo starts from the measured Hessian"
        space = setup.space
        wanted = min(MAX_VERIFIED, math.ceil(PER_ROOT * math.sqrt(space.size)))
        self._waiting = Landscape(space).lowest(
            quadratic_model(space, setup.gate_hessian.units(space.num_units)),
            setup.evaluations or wanted,
            rng=lambda index: setup.rng(0, index),
        )
        self._generation_size = setup.generation_size

    def ask(self) -> Generation | None:
        """The model's best candidates that were not verified yet."""
        favourites = self._waiting[: self._generation_size]
        return Generation(tuple(sorted(favourites)), "cbo") if favourites else None

    def tell(self, scores: Sequence[float]) -> None:
        """Count the candidates as verified; the model does not learn."""
        del self._waiting[: len(scores)]

    @property
    def evaluations_left(self) -> int:
        """Evaluations that are still allowed; never more than the space has candidates."""
        return len(self._waiting)


def quadratic_model(space: Space, hessian_MM: Array) -> Quadratic:
    """``x^T H x / 2`` over the variables of a space, in nats per token.

    If both stages remove one set, decode's units stand for both, with all that couples them.
    """
    if space.shared:
        stages = len(hessian_MM) // space.num_units
        both_UU = hessian_MM.reshape(stages, space.num_units, stages, -1).sum(axis=(0, 2))
        hessian_MM = np.zeros_like(hessian_MM)
        hessian_MM[-space.num_units :, -space.num_units :] = both_UU
    diagonal_M = np.diagonal(hessian_MM)
    return Quadratic(diagonal_M / 2, hessian_MM - np.diag(diagonal_M))
