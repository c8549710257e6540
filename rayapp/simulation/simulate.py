"""The simulation: a trace goes through ingress, prefill, link and decode, under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rayapp.scaling.admission import Room, refusal
from rayapp.scaling.reports import IngressReport
from rayapp.scaling.routing import Errand, Ways
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import DECODE, INGRESS, PREFILL, Heard, PoolView
from rayapp.scaling.work import (
    answer_lasts_s,
    decode_errand,
    decode_work_s,
    present_step_s,
)
from rayapp.simulation.clock import Clock
from rayapp.simulation.decode_replica import DecodeReplica, TokenCount
from rayapp.simulation.outcome import Moment, Outcome
from rayapp.simulation.policies import Facts, Policy
from rayapp.simulation.pool import SimulatedPool
from rayapp.simulation.prefill_replica import PrefillReplica
from rayapp.simulation.requests import Request
from rayapp.simulation.stage_costs import StageCosts
from rayapp.simulation.traces import Arrival

_NOTED_S = 5.0


@dataclass(frozen=True)
class Deaf:
    """A time in which replicas of a pool do not report: the first ``share`` of them."""

    pool: str
    from_s: float
    to_s: float
    share: float = 1.0


@dataclass(frozen=True)
class Pools:
    """Bounds of the pools, and how many replicas work at the begin; the minimum without."""

    prefill: tuple[int, int] = (1, 1)
    decode: tuple[int, int] = (1, 1)
    initial: tuple[int, int] | None = None


def simulate(
    arrivals: Sequence[Arrival],
    costs: StageCosts,
    pools: Pools,
    policy: Policy,
    *,
    settings: ScalingSettings,
    room: Room = Room(256, 120.0),  # noqa: B008 - frozen
    deaf: Sequence[Deaf] = (),
    short_prompt_tokens: int = 0,
) -> Outcome:
    """Run a trace through the service, and return what became of its requests.

    Args:
        arrivals: The requests.
        costs: The measured costs of the stages.
        pools: Bounds of the pools.
        policy: The policy that sizes them.
        settings: Targets, which the outcome is judged by, and the time between two reports.
        room: What admission lets in.
        deaf: Times in which replicas do not report.
        short_prompt_tokens: Longest prompt that decode may prefill itself; 0 for none.
    """
    simulation = _Simulation(arrivals, costs, pools, policy, settings, room, deaf)
    simulation.short_prompt_tokens = short_prompt_tokens
    return simulation.run()


class _Simulation:
    short_prompt_tokens = 0

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        costs: StageCosts,
        pools: Pools,
        policy: Policy,
        settings: ScalingSettings,
        room: Room,
        deaf: Sequence[Deaf],
    ) -> None:
        self._costs, self._policy, self._settings = costs, policy, settings
        self._room, self._deaf = room, deaf
        self._clock = Clock()
        self._requests = [Request(str(n), arrival) for n, arrival in enumerate(arrivals)]
        self._num_waiting = self._num_open = self._num_arrived = self._num_handed_over = 0
        self._errand = Errand()
        self._computed = TokenCount()
        self._links: dict[str, tuple[int, float]] = {}
        self._moments: list[Moment] = []
        self._noted_s = float("-inf")
        self.prefill = SimulatedPool(
            PREFILL, pools.prefill, costs.cold_start_s, self._clock, self._new_prefill
        )
        self.decode = SimulatedPool(
            DECODE, pools.decode, costs.cold_start_s, self._clock, self._new_decode
        )
        begin = pools.initial or (pools.prefill[0], pools.decode[0])
        self.prefill.begin(begin[0])
        self.decode.begin(begin[1])

    def run(self) -> Outcome:
        for request in self._requests:
            self._clock.at(request.arrival.at_s, partial(self._arrive, request))
        self._num_open = len(self._requests)
        self._clock.at(0.0, self._decide)
        self._clock.run(lambda: not self._num_open)
        for pool in (self.prefill, self.decode):
            pool.count()
        return Outcome(
            requests=self._requests,
            targets=self._settings.targets,
            span_s=self._clock.now_s,
            replica_s={PREFILL: self.prefill.replica_s, DECODE: self.decode.replica_s},
            changes={PREFILL: self.prefill.changes, DECODE: self.decode.changes},
            moments=self._moments,
        )

    def _new_prefill(self, name: str) -> PrefillReplica:
        return PrefillReplica(
            name,
            self._costs,
            self._clock,
            prefilled=self._prefilled,
            sent=partial(self._handed_over, name),
        )

    def _new_decode(self, name: str) -> DecodeReplica:
        def left() -> None:
            self._clock.at(self._clock.now_s, lambda: self.decode.left(name))

        def finished(request: Request) -> None:
            self._end(request)
            left()

        def prefilled(request: Request) -> None:
            self._num_handed_over += request.arrival.num_answer > 1
            self._prefilled(request)
            left()

        return DecodeReplica(
            name,
            self._costs,
            self._clock,
            self._computed,
            finished=finished,
            prefilled=prefilled,
        )

    def _arrive(self, request: Request) -> None:
        least_s = self.prefill.least_work_s()
        if refusal(self._room, self._num_waiting, 1, {PREFILL: least_s}) is not None:
            request.is_refused = True
            self._num_open -= 1
            return
        self._num_waiting += 1
        self._num_arrived += 1
        if request.arrival.num_prompt <= self.short_prompt_tokens:
            decode = self.decode.best(self._errand)
            if self._ways(request, decode).is_short_sooner(self._settings.targets.tpot_s):
                self.decode.choose(self._errand).add_prompt(request)
                return
        replica = next(iter(self.prefill.running.values()))
        work_s = replica.work_of(request.arrival.num_prompt)
        chosen = self.prefill.choose(Errand(work_s, work_s / max(1, request.arrival.num_prompt)))
        chosen.add(request)

    def _ways(self, request: Request, decode: DecodeReplica) -> Ways:
        """Both ways of a prompt, as the ingress would know them."""
        num_tokens = request.arrival.num_prompt
        num_bytes = num_tokens * self._costs.prompt_kv_bytes
        return Ways(
            queue_s=self.prefill.least_work_s(),
            prefill_s=next(iter(self.prefill.running.values())).work_of(num_tokens),
            handoff_s=self._costs.link.seconds(num_bytes),
            step_s=present_step_s(decode.report()),
            prompts_s=decode.prompts_s,
            short_s=decode.prompt_s(num_tokens),
        )

    def _prefilled(self, request: Request) -> None:
        self._num_waiting -= 1
        if request.arrival.num_answer <= 1:
            request.finished_s = request.first_s
            self._end(request)

    def _handed_over(self, prefill_name: str, request: Request) -> None:
        self._num_handed_over += 1
        self.decode.choose(self._errand).add(request)
        self.prefill.left(prefill_name)

    def _end(self, request: Request) -> None:
        del request
        self._num_open -= 1

    def _decide(self) -> None:
        self._hear()
        view: dict[str, PoolView] = {PREFILL: self.prefill.view(), DECODE: self.decode.view()}
        view[INGRESS] = self._ingress()
        decisions = self._policy.sizes(view, self._facts(), self._clock.now_s)
        for pool in (self.prefill, self.decode):
            decision = decisions.get(pool.name)
            if decision is not None:
                pool.resize(decision.after, decision.reason)
        if self._clock.now_s - self._noted_s >= _NOTED_S:
            self._note()
        self._clock.at(self._clock.now_s + self._settings.interval_s, self._decide)

    def _hear(self) -> None:
        now_s = self._clock.now_s
        prompts = {n: Heard(now_s, prefill=r.report()) for n, r in self.prefill.running.items()}
        sequences = {n: Heard(now_s, decode=r.report()) for n, r in self.decode.running.items()}
        tpot_s = self._settings.targets.tpot_s
        self._errand = decode_errand(
            [one.decode for one in sequences.values() if one.decode], tpot_s
        )
        self.prefill.hear(
            self._audible(PREFILL, prompts),
            lambda one: (one.prefill.queued_s if one.prefill else 0.0, 0.0),
        )
        self.decode.hear(
            self._audible(DECODE, sequences),
            lambda one: (
                (decode_work_s(one.decode, tpot_s), answer_lasts_s(one.decode, tpot_s))
                if one.decode
                else (0.0, 0.0)
            ),
        )

    def _audible(self, pool: str, reports: dict[str, Heard]) -> dict[str, Heard]:
        """The reports that arrive: in a deaf time, not those of the first replicas."""
        for deaf in self._deaf:
            if deaf.pool == pool and deaf.from_s <= self._clock.now_s < deaf.to_s:
                lost = round(len(reports) * deaf.share)
                return dict(list(reports.items())[lost:])
        return reports

    def _ingress(self) -> PoolView:
        everyone = [*self.prefill.running.values(), *self.prefill.draining.values()]
        self._links |= {replica.name: (replica.num_sent, replica.sent_s) for replica in everyone}
        report = IngressReport(
            waiting_tokens=0.0,
            sent=sum(number for number, _ in self._links.values()),
            sent_s=sum(seconds for _, seconds in self._links.values()),
        )
        return PoolView(1, 1, 1, ("it",), {"it": Heard(self._clock.now_s, ingress=report)})

    def _facts(self) -> dict[str, Facts]:
        prompts = self.prefill.running.values()
        sequences = self.decode.running.values()
        return {
            PREFILL: Facts(
                num_present=sum(one.num_present for one in prompts),
                queued_tokens=sum(one.num_tokens for one in prompts),
                arrived=self._num_arrived,
            ),
            DECODE: Facts(
                num_present=sum(one.num_present for one in sequences),
                usage=sum(one.usage for one in sequences),
                arrived=self._num_handed_over,
                computed_tokens=self._computed.num_tokens,
            ),
        }

    def _note(self) -> None:
        self._noted_s = self._clock.now_s
        self._moments.append(
            Moment(
                self._clock.now_s,
                len(self.prefill.running),
                len(self.decode.running),
                self._num_waiting,
                sum(one.num_present for one in self.decode.running.values()),
            )
        )
