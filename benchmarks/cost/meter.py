"""Meters: the cost of a piece of work, and compute that measures its own cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayapp.pruning.candidates.healing import Unit
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.gate_hessian import measure_gate_hessian, measuring_cost
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.scorer import Done, LocalCompute, Measured, Work

PASSES: dict[Callable[..., Any], int] = {
    measure_influence: 1,
    measure_gate_hessian: measuring_cost(),  # a backward pass counts twice
}
"""Number of passes of the dense model, both stages, that a measurement costs."""


@dataclass
class Cost:
    """A cost in block x token forwards, and in seconds."""

    forwards: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Cost(*(mine + its for mine, its in pairs))

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(*(-value for value in asdict(other).values()))

    def over(self, other: Cost) -> dict[str, float]:
        """Ratio of this cost to ``other``."""
        return {key: value / getattr(other, key) for key, value in asdict(self).items()}


class Meter:
    """Adds up the forwards of an evaluator within the context."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.cost = Cost()

    def __enter__(self) -> Meter:
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.cost += self._now() - self._began

    def _now(self) -> Cost:
        return Cost(self._evaluator.forwards, time.perf_counter(), time.process_time())


class Recording(LocalCompute):
    """In-process compute that keeps its cost, and every piece of work with its seconds."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator)
        self.meter = Meter(evaluator)
        self.rounds: list[list[Done]] = []

    def run(self, work: Sequence[Work]) -> Iterator[Done]:
        self.rounds.append([])
        with self.meter:
            done = list(super().run(work))
        self.rounds[-1] += done
        yield from done

    def measure(
        self, function: Callable[..., Measured], *arguments: object, units: Collection[Unit] = ()
    ) -> Measured:
        """Measure, and count work that no evaluator counts as dense passes."""
        with self.meter:
            measured = super().measure(function, *arguments, units=units)
        self._count_dense(PASSES.get(function, 0))
        return measured

    def _count_dense(self, passes: int) -> None:
        evaluator = self._evaluator
        inputs = [evaluator.inputs(chunk) for chunk in range(len(evaluator.calibration.chunks))]
        tokens = sum(each.prefill_ids_BP.numel() + each.decode_ids_BD.numel() for each in inputs)
        self.meter.cost += Cost(forwards=float(passes * tokens * evaluator.runner.num_blocks))
