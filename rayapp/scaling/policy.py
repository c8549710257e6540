"""The policy: one decision over all pools, from what their replicas report.

It is a pure function: the same settings, memory and view give the same decisions. Its rules are

- a pool grows as soon as the work that it has, or that arrives, needs more replicas than it has;
- it shrinks once fewer replicas have been enough for the whole of ``downscale_delay_s``, down to
  the most that was needed in that time: the load after the consolidation is what was checked;
- a replica that falls silent is taken to carry as much as the fullest of the others; it holds the
  pool from shrinking, and never from growing; where none reports, the pool stays as it is;
- the link is a stage of its own, which prefill needs enough replicas for;
- ratios between pools only ever add replicas;
- no pool loses more than ``largest_step`` replicas at once, or gains more than it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rayapp.scaling.memory import PoolMemory
from rayapp.scaling.need import Need, decode_need, prefill_need
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import (
    DECODE,
    INGRESS,
    PREFILL,
    UNIFIED,
    Decision,
    Heard,
    PoolView,
    silent_factor,
)
from rayapp.scaling.work import entries_each

_IDLE_BAND = 0.1
"""Share of a pool that may be too much without being taken from it (project default)."""


@dataclass(frozen=True)
class Memory:
    """The memory of the policy between two decisions, by pool and by stage."""

    pools: Mapping[str, PoolMemory] = field(default_factory=dict)

    def of(self, name: str) -> PoolMemory:
        """The memory of one pool or stage."""
        return self.pools.get(name, PoolMemory())


def decide(
    settings: ScalingSettings, memory: Memory, view: Mapping[str, PoolView], now_s: float
) -> tuple[dict[str, Decision], Memory]:
    """Decide the sizes of all pools.

    Args:
        settings: Targets and limits.
        memory: The memory that the last decision returned; an empty one at first.
        view: The pools by name, those of fixed size included.
        now_s: The present time on the clock of the reports, seconds.

    Returns:
        A decision for every pool, and the memory for the next one.
    """
    fresh = {name: pool.fresh(now_s, settings.stale_s) for name, pool in view.items()}
    memory = _remembered(settings, memory, view, fresh, now_s)
    needs = {
        name: _need(settings, memory, name, view, fresh, now_s) for name in view if name != INGRESS
    }
    prompts, link = needs.get(PREFILL), _link_need(settings, memory, now_s)
    if prompts is not None and link is not None:
        needs[PREFILL] = _larger(prompts, link)
    decisions: dict[str, Decision] = {}
    pools = dict(memory.pools)
    delay_s = settings.downscale_delay_s
    for name, pool in view.items():
        need, mind = needs.get(name), memory.of(name)
        if need is not None:
            mind = mind.with_enough(now_s, need.rest, delay_s)
        decisions[name] = _decision(settings, name, pool, need, mind, fresh[name], now_s)
        pools[name] = mind
    decisions = _in_ratio(settings, view, decisions)
    for name, decision in decisions.items():
        if decision.is_change:
            pools[name] = pools[name].changed(now_s, decision.after - decision.before, delay_s)
    return decisions, Memory(pools)


def _remembered(
    settings: ScalingSettings,
    memory: Memory,
    view: Mapping[str, PoolView],
    fresh: Mapping[str, Mapping[str, Heard]],
    now_s: float,
) -> Memory:
    pools = dict(memory.pools)
    reports = {name: heard for pool in fresh.values() for name, heard in pool.items()}
    factors = {name: silent_factor(pool, fresh[name]) for name, pool in view.items()}
    for stage, (read, name) in _COUNTERS.items():
        factor = factors.get(name, factors.get(UNIFIED, 1.0))
        pools[stage] = memory.of(stage).heard(now_s, reports, read, settings.slow_s, factor)
    sequences = [heard.decode for heard in reports.values() if heard.decode is not None]
    if sequences:
        counts = [report.rows + report.waiting for report in sequences]
        silent = (factors.get(DECODE, factors.get(UNIFIED, 1.0)) - 1.0) * len(counts)
        # Replicas that report may be new and nearly empty; one that fell silent has run for long.
        present = sum(counts) + silent * max(counts)
        pools[ANSWERS] = pools[ANSWERS].with_level(now_s, present, settings.slow_s)
        if any(report.rows for report in sequences):
            size = entries_each(sequences)
            pools[SIZES] = memory.of(SIZES).with_level(now_s, size, settings.slow_s)
    for name, pool in view.items():
        pools[name] = memory.of(name).seen(now_s, len(pool.running), pool.target)
    return Memory(pools)


def _prefill_counters(heard: Heard) -> tuple[float, float, float] | None:
    if heard.prefill is None:
        return None
    return heard.prefill.arrived, heard.prefill.arrived_s, heard.prefill.arrived_square_s


def _decode_counters(heard: Heard) -> tuple[float, float, float] | None:
    if heard.decode is None:
        return None
    return (heard.decode.arrived,) * 3


def _link_counters(heard: Heard) -> tuple[float, float, float] | None:
    if heard.ingress is None:
        return None
    return heard.ingress.sent, heard.ingress.sent_s, heard.ingress.sent_s


PROMPTS, ANSWERS, TRANSFERS, SIZES = "prompts", "answers", "transfers", "sizes"
_COUNTERS = {
    PROMPTS: (_prefill_counters, PREFILL),
    ANSWERS: (_decode_counters, DECODE),
    TRANSFERS: (_link_counters, INGRESS),
}


def _need(
    settings: ScalingSettings,
    memory: Memory,
    name: str,
    view: Mapping[str, PoolView],
    fresh: Mapping[str, Mapping[str, Heard]],
    now_s: float,
) -> Need | None:
    """The need of one pool; None if no replica of it reports."""
    heard = fresh[name].values()
    prompts = [one.prefill for one in heard if one.prefill is not None]
    sequences = [one.decode for one in heard if one.decode is not None]
    waiting = sum(
        one.ingress.waiting_tokens for one in fresh.get(INGRESS, {}).values() if one.ingress
    )
    cold_s = memory.of(name).cold_start_s(
        [*(one.start_s for one in prompts), *(one.start_s for one in sequences)],
        settings.cold_start_s,
    )
    arrivals = memory.of(PROMPTS).rates(now_s, settings.fast_s)
    answers = memory.of(ANSWERS)
    prompts_come = bool(memory.of(PROMPTS).samples)
    needs = []
    if name in (PREFILL, UNIFIED) and prompts:
        needs.append(
            prefill_need(
                prompts,
                arrivals,
                settings,
                cold_s=cold_s,
                elsewhere_tokens=waiting,
                factor=silent_factor(view[name], fresh[name]),
            )
        )
    if name in (DECODE, UNIFIED) and sequences:
        level = answers.level(now_s, settings.fast_s)
        # Prompts come before their answers do, so a rise of theirs is known earlier.
        rates = memory.of(PROMPTS if prompts_come else ANSWERS).request_rates(
            now_s, settings.fast_s
        )
        sizes = memory.of(SIZES).level(now_s, settings.fast_s)
        needs.append(decode_need(sequences, level, rates, settings, cold_s=cold_s, sizes=sizes))
    if name == UNIFIED and len(needs) == 2:
        return _sum(needs[0], needs[1], arrivals.slow)
    return needs[0] if needs else None


def _link_need(settings: ScalingSettings, memory: Memory, now_s: float) -> Need | None:
    """Prefill replicas whose links carry the KV that is sent; every replica has one link."""
    busy = memory.of(TRANSFERS).rates(now_s, settings.fast_s).fast
    if busy <= 0.0:
        return None
    number = math.ceil(busy / settings.usage - 1e-9)
    return Need(number, number, f"links are busy with KV for {busy:.2f} s per second")


def _larger(one: Need, other: Need) -> Need:
    first = max((one, other), key=lambda need: need.least)
    return replace(first, rest=max(one.rest, other.rest))


def _sum(prompts: Need, sequences: Need, prefill_load: float) -> Need:
    """The need of replicas that do both: prefill takes time from the steps of decode."""
    extra = math.ceil(prefill_load)
    main = _larger(prompts, sequences)
    return Need(
        max(main.least, extra + sequences.least if extra else 0),
        max(main.rest, extra + sequences.rest if extra else 0),
        main.reason,
    )


def _decision(
    settings: ScalingSettings,
    name: str,
    pool: PoolView,
    need: Need | None,
    memory: PoolMemory,
    fresh: Mapping[str, Heard],
    now_s: float,
) -> Decision:
    """The decision for one pool, before ratios are looked at."""
    before = pool.target
    if pool.minimum == pool.maximum:
        return Decision(name, before, pool.maximum, "its size is fixed")
    if need is None:
        return Decision(name, before, _bounded(pool, before), "no replica reports")
    if need.least > before:
        after = min(need.grown, before + max(settings.largest_step, before))
        return Decision(name, before, _bounded(pool, after), need.reason)
    # A pool that is a little too large would only grow again.
    most = memory.most_enough(now_s, settings.downscale_delay_s)
    if most is None or most > (1.0 - _IDLE_BAND) * before:
        return Decision(name, before, _bounded(pool, before), need.reason)
    silent = len(pool.running) - len(fresh)
    if silent:
        return Decision(
            name, before, _bounded(pool, before), f"{silent} of its replicas do not report"
        )
    after = max(most, before - settings.largest_step)
    return Decision(name, before, _bounded(pool, after), need.reason)


def _bounded(pool: PoolView, number: int) -> int:
    return max(pool.minimum, min(pool.maximum, number))


def _in_ratio(
    settings: ScalingSettings, view: Mapping[str, PoolView], decisions: dict[str, Decision]
) -> dict[str, Decision]:
    """The decisions with enough replicas of either stage beside the other."""
    if PREFILL not in decisions or DECODE not in decisions:
        return decisions
    for name, other, ratio in (
        (PREFILL, DECODE, settings.least_ratio),
        (DECODE, PREFILL, None if settings.most_ratio is None else 1.0 / settings.most_ratio),
    ):
        if ratio is None:
            continue
        fewest = _bounded(view[name], math.ceil(decisions[other].after * ratio - 1e-9))
        if fewest > decisions[name].after:
            reason = f"{decisions[other].after} {other} replicas need at least {fewest}"
            decisions[name] = replace(decisions[name], after=fewest, reason=reason)
    return decisions
