"""Policies of other systems, written from their documentation; each has one knob.

They see the same pools at the same moments as ours: requests, queued tokens and usage as their
metrics would say, and costs of the stages that somebody has measured for them. Where a system runs
under Kubernetes' autoscaler, a pool shrinks to the most that was wanted in the last five minutes,
which is that autoscaler's default.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rayapp.scaling.settings import Targets
from rayapp.scaling.view import DECODE, PREFILL, Decision, PoolView
from rayapp.simulation.policies import Facts, Policy
from rayapp.simulation.stage_costs import StageCosts

Views = Mapping[str, PoolView]
AllFacts = Mapping[str, Facts]


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of prompts and answers, which operators give these systems."""

    prompt: float
    answer: float


@dataclass(frozen=True)
class Setup:
    """What a policy is told before it starts."""

    costs: StageCosts
    targets: Targets
    lengths: Lengths

    @property
    def prompt_s(self) -> float:
        chunk = self.costs.max_num_batched_tokens
        return self.costs.prefill.prompt_s(round(self.lengths.prompt), chunk=chunk)

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.lengths.prompt / self.prompt_s

    @property
    def batch(self) -> int:
        """The largest batch that meets the TPOT target."""
        largest = self.costs.decode.largest_batch(self.targets.tpot_s, self.entries)
        return max(1, min(largest, self.costs.max_num_seqs))

    @property
    def entries(self) -> float:
        """Entries of a sequence in the middle of its answer."""
        return self.lengths.prompt + self.lengths.answer / 2

    @property
    def step_s(self) -> float:
        return self.costs.decode.seconds(self.batch, self.batch * self.entries)


class _Window:
    """Values of the last seconds."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._values: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, value: float) -> None:
        self._values.append((now_s, value))
        while self._values[0][0] < now_s - self._span_s:
            self._values.popleft()

    @property
    def mean(self) -> float:
        return sum(value for _, value in self._values) / len(self._values)

    @property
    def most(self) -> float:
        return max(value for _, value in self._values)

    @property
    def per_s(self) -> float:
        """Growth per second of a counter."""
        (from_s, first), (to_s, last) = self._values[0], self._values[-1]
        return (last - first) / (to_s - from_s) if to_s > from_s else 0.0


def _sizes(view: Views, wanted: Mapping[str, float]) -> dict[str, Decision]:
    return {
        name: Decision(name, view[name].target, max(1, math.ceil(number - 1e-9)), "")
        for name, number in wanted.items()
    }


class ServeDefault:
    """Ray Serve's default: ongoing requests over a target, with its delays of 30 and 600 s."""

    def __init__(self, setup: Setup, knob: float) -> None:
        del setup
        self._target = knob
        self._seen = {name: _Window(30.0) for name in (PREFILL, DECODE)}
        self._since: dict[str, tuple[int, float]] = {}

    def sizes(self, view: Views, facts: AllFacts, now_s: float) -> dict[str, Decision]:
        decisions = {}
        for name, seen in self._seen.items():
            seen.add(now_s, facts[name].num_present)
            wanted = max(1, math.ceil(seen.mean / self._target - 1e-9))
            target = view[name].target
            sign = (wanted > target) - (wanted < target)
            before, since_s = self._since.get(name, (0, now_s))
            self._since[name] = (sign, since_s if sign == before else now_s)
            delay_s = 30.0 if sign > 0 else 600.0
            if sign and now_s - self._since[name][1] >= delay_s:
                decisions[name] = Decision(name, target, wanted, "")
                self._since.pop(name)
        return decisions


class _Stabilised(ABC):
    """Kubernetes' autoscaler: grows at once, shrinks to the most of the last five minutes."""

    def __init__(self, setup: Setup, knob: float, span_s: float = 300.0) -> None:
        self._setup, self._knob = setup, knob
        self._wanted = {name: _Window(span_s) for name in (PREFILL, DECODE)}
        self._counts = {name: _Window(60.0) for name in (PREFILL, DECODE)}
        self._tokens = _Window(60.0)

    def sizes(self, view: Views, facts: AllFacts, now_s: float) -> dict[str, Decision]:
        for name, window in self._counts.items():
            window.add(now_s, facts[name].arrived)
        self._tokens.add(now_s, facts[DECODE].computed_tokens)
        wanted = self.wanted(view, facts)
        for name, number in wanted.items():
            self._wanted[name].add(now_s, number)
        return _sizes(view, {name: self._wanted[name].most for name in wanted})

    @abstractmethod
    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        """The replicas of both pools that the formula asks for, before they are rounded."""


class LlmD(_Stabilised):
    """llm-d: queued uncached tokens over what one replica does in a share of the slack; KV usage.

    The knob is that share.
    """

    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        setup = self._setup
        slack_s = max(0.1, setup.targets.ttft_s - setup.prompt_s)
        per_replica = setup.prompt_tokens_per_s * slack_s * self._knob
        return {
            PREFILL: facts[PREFILL].queued_tokens / per_replica,
            # Usage counts slots as an operator would set them: the batch that meets the target.
            DECODE: facts[DECODE].num_present / setup.batch / 0.8,
        }


class TokenScale(_Stabilised):
    """TokenScale: tokens that arrive per second over the velocity of prefill and of decode.

    The knob is the share of the velocity that is used.
    """

    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        setup, knob = self._setup, self._knob
        prompts, answers = (self._counts[name].per_s for name in (PREFILL, DECODE))
        prefill = prompts * setup.prompt_s / knob
        link_s = setup.costs.link.seconds(setup.lengths.prompt * setup.costs.prompt_kv_bytes)
        decode = answers * setup.lengths.answer * setup.step_s / setup.batch / knob
        return {PREFILL: max(prefill, prompts * link_s / knob), DECODE: decode}


class HeteroScale(_Stabilised):
    """HeteroScale: decode tokens per second is the only signal, and P:D is kept.

    The knob is the share of the largest rate that a replica should reach; within a tenth of it
    nothing changes.
    """

    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        setup = self._setup
        per_replica = setup.batch / setup.step_s * self._knob
        number = self._tokens.per_s / per_replica
        target = view[DECODE].target
        decode = target if 0.9 <= number / target <= 1.1 else number
        ratio = setup.prompt_s * setup.batch / (setup.lengths.answer * setup.step_s)
        return {DECODE: decode, PREFILL: math.ceil(max(1.0, decode) - 1e-9) * ratio}


class _Periodic(ABC):
    """A planner that decides once per interval."""

    interval_s = 60.0

    def __init__(self, setup: Setup, knob: float) -> None:
        self._setup, self._knob = setup, knob
        self._next_s = self.interval_s
        self._before = {PREFILL: 0, DECODE: 0}

    def sizes(self, view: Views, facts: AllFacts, now_s: float) -> dict[str, Decision]:
        if now_s < self._next_s:
            return {}
        self._next_s = now_s + self.interval_s
        return _sizes(view, self.wanted(view, facts))

    @abstractmethod
    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        """The replicas of both pools that the formula asks for, before they are rounded."""


class DynamoThroughput(_Periodic):
    """Dynamo's planner by throughput: the demand of the last minute over what one engine does.

    The knob is the demand's margin.
    """

    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        setup, wanted = self._setup, {}
        rates = {
            PREFILL: 1.0 / setup.prompt_s,
            DECODE: setup.batch / (setup.lengths.answer * setup.step_s),
        }
        for name, engine_rps in rates.items():
            demand = (facts[name].arrived - self._before[name]) / self.interval_s
            self._before[name] = facts[name].arrived
            wanted[name] = demand * self._knob / engine_rps
        return wanted


class DynamoLoad(_Periodic):
    """Dynamo's planner by load: one more if the engines exceed the target, one less if 0.8 holds.

    The knob is the share of the targets that counts as exceeded. It decides every five seconds.
    """

    interval_s = 5.0

    def wanted(self, view: Views, facts: AllFacts) -> dict[str, float]:
        setup = self._setup
        prefill, decode = view[PREFILL].target, view[DECODE].target
        ready = {name: max(1, len(view[name].running)) for name in (PREFILL, DECODE)}

        def ttft_s(number: int) -> float:
            return facts[PREFILL].queued_tokens / setup.prompt_tokens_per_s / number + (
                setup.prompt_s
            )

        def itl_s(number: int) -> float:
            rows = facts[DECODE].num_present / number
            return setup.costs.decode.seconds(rows, rows * setup.entries)

        return {
            PREFILL: self._moved(prefill, ready[PREFILL], ttft_s, setup.targets.ttft_s),
            DECODE: self._moved(decode, ready[DECODE], itl_s, setup.targets.tpot_s),
        }

    def _moved(
        self, target: int, ready: int, predicted_s: Callable[[int], float], limit_s: float
    ) -> int:
        if predicted_s(ready) > limit_s * self._knob:
            return max(target, ready + 1)
        if ready > 1 and target == ready and predicted_s(ready - 1) < 0.8 * limit_s * self._knob:
            return target - 1
        return target


Maker = Callable[[Setup, float], Policy]

POLICIES: dict[str, tuple[Maker, tuple[float, ...]]] = {
    "Ray Serve, default": (ServeDefault, (2.0, 4.0, 8.0)),
    "llm-d": (LlmD, (0.1, 0.3, 0.65)),
    "Dynamo, throughput": (DynamoThroughput, (1.5, 2.0, 3.0)),
    "Dynamo, load": (DynamoLoad, (0.4, 0.6, 0.8)),
    "HeteroScale": (HeteroScale, (0.4, 0.55, 0.7)),
    "TokenScale": (TokenScale, (0.4, 0.55, 0.7)),
}
"""Policies with the values of their knob that are tried; the cheapest good one is taken."""
