"""How many replicas meet the targets: of fixed pools, and of pools that follow the load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rayapp.scaling.admission import Room
from rayapp.scaling.settings import ScalingSettings, Targets
from rayapp.simulation.outcome import Outcome
from rayapp.simulation.policies import FixedPolicy, OwnPolicy, Policy
from rayapp.simulation.settings import CapacitySettings
from rayapp.simulation.simulate import Pools, simulate
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.traces import Arrival

_OPEN = Room(1 << 30)
_NO_MORE = 1e-3


@dataclass(frozen=True)
class Capacity:
    """The capacity that a load needs of one kind of replica.

    Args:
        costs: The costs of its stages.
        sizes: Fewest replicas of prefill and of decode that meet the targets all the time, or the
            most that were allowed.
        fixed: The outcome with these sizes.
        elastic: The outcome of pools that follow the load.
        attainment: Share of requests that was to meet the targets.
        price_per_hour: Price of one replica for an hour.
    """

    costs: StageCosts
    sizes: tuple[int, int]
    fixed: Outcome
    elastic: Outcome
    attainment: float
    price_per_hour: float

    @property
    def is_met(self) -> bool:
        """True if fixed pools meet the targets."""
        return self.fixed.share_within() >= self.attainment

    @property
    def best(self) -> Outcome:
        """The cheaper of both ways that meet the targets, else the one that meets them more."""
        good = [one for one in (self.elastic, self.fixed) if one.share_within() >= self.attainment]
        if good:
            return min(good, key=lambda one: one.total_replica_s)
        return max((self.elastic, self.fixed), key=Outcome.share_within)

    def price_per_million(self, outcome: Outcome) -> float:
        """Price of a million answer tokens."""
        hours = outcome.total_replica_s / 3600
        return hours * self.price_per_hour / max(1, outcome.num_answer_tokens) * 1e6

    def numbers(self) -> dict[str, Any]:
        """Everything that is reported, as plain data."""
        return {
            "name": self.costs.name,
            "prefill_replicas": self.sizes[0],
            "decode_replicas": self.sizes[1],
            "is_met": self.is_met,
            "fixed": self._numbers(self.fixed),
            "elastic": self._numbers(self.elastic),
        }

    def _numbers(self, outcome: Outcome) -> dict[str, Any]:
        return {
            **outcome.numbers(),
            "price_per_million_tokens": self.price_per_million(outcome),
        }


def plan_capacity(
    arrivals: Sequence[Arrival],
    costs: StageCosts,
    targets: Targets,
    settings: CapacitySettings,
) -> Capacity:
    """Find the fewest replicas of both stages that meet the targets, and follow the load beside it.

    First tokens wait for prefill alone and further ones for decode, so either stage is searched by
    itself, the other one being as large as it may; then both together are made to meet the targets.

    Args:
        arrivals: The requests.
        costs: The measured costs of the stages.
        targets: The targets of answers.
        settings: What may be used.
    """
    most = settings.most_replicas
    scaling = ScalingSettings(
        targets=targets, attainment=settings.attainment, cold_start_s=costs.cold_start_s
    )

    def run(prefill: tuple[int, int], decode: tuple[int, int], policy: Policy) -> Outcome:
        begin = (_started(prefill, sizes[0]), _started(decode, sizes[1]))
        pools = Pools(prefill, decode, begin)
        return simulate(
            arrivals,
            costs,
            pools,
            policy,
            settings=scaling,
            room=_OPEN,
            short_prompt_tokens=settings.short_prompt_tokens,
        )

    def fixed(prefill: int, decode: int) -> Outcome:
        return run((prefill, prefill), (decode, decode), FixedPolicy())

    sizes = (most, most)
    outcome = fixed(*sizes)
    # Where even the most replicas miss the targets, those are sought that miss them no more.
    wanted = min(settings.attainment, outcome.share_within() - _NO_MORE)
    sizes = (
        _fewest(most, lambda n: fixed(n, most).share_within(tpot=False) >= wanted),
        _fewest(most, lambda n: fixed(most, n).share_within(ttft=False) >= wanted),
    )
    outcome = fixed(*sizes)
    while outcome.share_within() < wanted and min(sizes) < most:
        grows = 0 if outcome.share_within(tpot=False) <= outcome.share_within(ttft=False) else 1
        grows = 1 - grows if sizes[grows] == most else grows
        sizes = (sizes[0] + (grows == 0), sizes[1] + (grows == 1))
        outcome = fixed(*sizes)
    elastic = run((1, most), (1, most), OwnPolicy(scaling))
    return Capacity(costs, sizes, outcome, elastic, settings.attainment, settings.price_per_hour)


def _started(bounds: tuple[int, int], size: int) -> int:
    """Replicas that work at the begin: half of what the whole load needs, within the bounds."""
    return max(bounds[0], min(bounds[1], -(-size // 2)))


def _fewest(most: int, is_enough: Callable[[int], bool]) -> int:
    """The fewest replicas that are enough, or the most if none are."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low
