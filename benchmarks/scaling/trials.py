"""One load under one policy, and the choice of each policy's best setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayapp.scaling.admission import Room
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import DECODE, PREFILL
from rayapp.simulation.outcome import Outcome
from rayapp.simulation.policies import FixedPolicy, OwnPolicy, Policy
from rayapp.simulation.simulate import Deaf, Pools, simulate
from rayapp.simulation.traces import Arrival
from scaling.formulas import POLICIES, Lengths, Setup

OURS, CEILING = "rayapp", "every replica, always"
_OPEN = Room(1 << 30)
_FULL = 0.8


@dataclass(frozen=True)
class Trial:
    """A load, and what every policy may use for it.

    Args:
        arrivals: The requests.
        setup: The costs, targets and mean lengths, which all policies know.
        most: Most replicas of each stage.
        deaf: Times in which replicas do not report.
        num_changes: Times that the load turns; None if nobody knows.
    """

    arrivals: Sequence[Arrival]
    setup: Setup
    most: int
    deaf: tuple[Deaf, ...] = ()
    num_changes: int | None = None

    @property
    def initial(self) -> tuple[int, int]:
        """Replicas of both stages at the begin: what the mean load keeps busy for 80 %."""
        rate = len(self.arrivals) / max(1.0, self.arrivals[-1].at_s)
        setup = self.setup
        prefill = rate * setup.prompt_s / _FULL
        decode = rate * setup.lengths.answer * setup.step_s / setup.batch / _FULL
        return tuple(min(self.most, max(1, math.ceil(one))) for one in (prefill, decode))

    def run(
        self, policy: Policy, settings: ScalingSettings, initial: tuple[int, int] | None = None
    ) -> Outcome:
        bounds = (1, self.most)
        return simulate(
            self.arrivals,
            self.setup.costs,
            Pools(bounds, bounds, initial or self.initial),
            policy,
            settings=settings,
            room=_OPEN,
            deaf=self.deaf,
        )

    def everyone(self, settings: ScalingSettings) -> Iterator[tuple[str, float | None, Outcome]]:
        """Our policy as it comes, what no policy exceeds, and the others with all their knobs."""
        yield OURS, None, self.run(OwnPolicy(settings), settings)
        yield CEILING, None, self.run(FixedPolicy(), settings, (self.most, self.most))
        for name, (make, knobs) in POLICIES.items():
            for knob in knobs:
                yield name, knob, self.run(make(self.setup, knob), settings)


def row_of(name: str, knob: float | None, outcome: Outcome) -> dict[str, Any]:
    numbers = outcome.numbers()
    turns = {pool: outcome.num_turns(pool) for pool in (PREFILL, DECODE)}
    return {"policy": name, "knob": knob, **numbers, "turns_by_pool": turns}


def chosen(rows: Sequence[dict[str, Any]], goal: float) -> list[dict[str, Any]]:
    """The cheapest setting of each policy that meets the goal, else the one that comes nearest."""
    result = []
    for name in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == name]
        good = [row for row in own if row["within"] >= goal]
        result.append(
            min(good, key=lambda row: row["replica_s"])
            if good
            else max(own, key=lambda row: row["within"])
        )
    return result


def single_settings(loads: Sequence[Sequence[dict[str, Any]]], goal: float) -> list[dict[str, Any]]:
    """Each policy with the one setting that meets the goal on most loads, then for the least."""
    sums: dict[tuple[str, float | None], dict[str, Any]] = {}
    for rows in loads:
        for row in rows:
            name, knob = row["policy"], row["knob"]
            one = sums.setdefault(
                (name, knob),
                {"policy": name, "knob": knob, "met": 0, "lowest": 1.0, "replica_s": 0.0},
            )
            one["met"] += row["within"] >= goal
            one["lowest"] = min(one["lowest"], row["within"])
            one["replica_s"] += row["replica_s"]
    best: dict[str, dict[str, Any]] = {}
    for one in sums.values():
        before = best.get(one["policy"])
        if before is None or (one["met"], -one["replica_s"]) > (
            before["met"],
            -before["replica_s"],
        ):
            best[one["policy"]] = one
    return list(best.values())


def setup_of(arrivals: Sequence[Arrival], **known: Any) -> Setup:
    """What all policies know beforehand: the mean lengths of the load, too."""
    prompt = sum(arrival.num_prompt for arrival in arrivals) / len(arrivals)
    answer = sum(arrival.num_answer for arrival in arrivals) / len(arrivals)
    return Setup(lengths=Lengths(prompt, answer), **known)
