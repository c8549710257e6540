"""A simulated pool: replicas that start, work, drain and go, and the router's picture of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from rayapp.scaling.routing import Errand, Known, first, ranked
from rayapp.scaling.view import Heard, PoolView
from rayapp.simulation.clock import Clock


class Replica(Protocol):
    """A simulated replica of either stage."""

    name: str

    @property
    def is_idle(self) -> bool:
        """True if nothing waits or runs there."""
        ...


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True)
class Change:
    """One change of the number of replicas that a pool is to have."""

    at_s: float
    before: int
    after: int
    reason: str


class SimulatedPool(Generic[R]):
    """The replicas of one stage.

    Args:
        name: Name of the pool.
        bounds: Fewest and most replicas.
        cold_start_s: Seconds from the decision for a replica until it works.
        clock: The clock of the simulation.
        make: Makes a replica from its name.
    """

    def __init__(
        self,
        name: str,
        bounds: tuple[int, int],
        cold_start_s: float,
        clock: Clock,
        make: Callable[[str], R],
    ) -> None:
        self.name, self.bounds = name, bounds
        self._cold_start_s, self._clock, self._make = cold_start_s, clock, make
        self.running: dict[str, R] = {}
        self.draining: dict[str, R] = {}
        self.target = 0
        self.changes: list[Change] = []
        self.replica_s = 0.0
        self._num_made = 0
        self._starting: list[str] = []
        self._counted_s = 0.0
        self._known: dict[str, Known] = {}
        self._heard: dict[str, Heard] = {}

    @property
    def num_starting(self) -> int:
        """Number of replicas that do not work yet."""
        return len(self._starting)

    @property
    def num_held(self) -> int:
        """Number of replicas that hold a machine: starting, working or draining."""
        return len(self.running) + len(self.draining) + self.num_starting

    def begin(self, number: int) -> None:
        """Have a number of replicas that work from the begin."""
        self.target = number
        for _ in range(number):
            self._run(self._new_name())

    def resize(self, number: int, reason: str) -> None:
        """Have another number of replicas from now on."""
        low, high = self.bounds
        number = max(low, min(high, number))
        if number == self.target:
            return
        self.count()
        self.changes.append(Change(self._clock.now_s, self.target, number, reason))
        self.target = number
        while len(self.running) + self.num_starting > number:
            self._remove_one()
        while len(self.running) + self.num_starting < number:
            name = self._new_name()
            self._starting.append(name)
            self._clock.at(self._clock.now_s + self._cold_start_s, partial(self._started, name))

    def count(self) -> None:
        """Add the time that replicas had machines since this was called last."""
        self.replica_s += self.num_held * (self._clock.now_s - self._counted_s)
        self._counted_s = self._clock.now_s

    def left(self, name: str) -> None:
        """Let a draining replica go once its work has ended."""
        replica = self.draining.get(name)
        if replica is not None and replica.is_idle:
            self.count()
            del self.draining[name]

    def best(self, errand: Errand) -> R:
        """The replica that the service's router would choose."""
        known = {name: self._known.get(name, Known()) for name in self.running}
        name = first(ranked(known, errand, self._clock.now_s))
        if name is None:  # The pool always keeps one.
            raise LookupError(f"pool {self.name} has no replica")
        return self.running[name]

    def choose(self, errand: Errand) -> R:
        """Choose the best replica, and remember that the errand was sent to it."""
        replica = self.best(errand)
        known = self._known.get(replica.name, Known())
        self._known[replica.name] = known.given(self._clock.now_s, errand.work_s)
        return replica

    def least_work_s(self) -> float:
        """Seconds of work of the replica that has least, as the router knows it."""
        now_s = self._clock.now_s
        return min(self._known.get(name, Known()).left_s(now_s) for name in self.running)

    def hear(
        self, reports: dict[str, Heard], work_of: Callable[[Heard], tuple[float, float]]
    ) -> None:
        """Take the reports of replicas, for the policy and for the router."""
        self._heard.update(reports)
        for name, heard in reports.items():
            known = self._known.get(name, Known())
            self._known[name] = known.reported(heard.at_s, *work_of(heard))

    def view(self) -> PoolView:
        """The pool as a policy sees it."""
        return PoolView(*self.bounds, self.target, tuple(self.running), dict(self._heard))

    def _new_name(self) -> str:
        self._num_made += 1
        return f"{self.name}-{self._num_made}"

    def _run(self, name: str) -> None:
        self.running[name] = self._make(name)

    def _started(self, name: str) -> None:
        if name in self._starting:
            self._starting.remove(name)
            self._run(name)

    def _remove_one(self) -> None:
        """Remove a replica that still starts, else the one that started last."""
        if self._starting:
            self._starting.pop()
            return
        name = next(reversed(self.running))
        self.draining[name] = self.running.pop(name)
        self._heard.pop(name, None)
        self._known.pop(name, None)
        self.left(name)
