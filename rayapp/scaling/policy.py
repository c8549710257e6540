"""The policy: one decision over all pools, from what their replicas report.

It is a pure function: the same settings, memory and view give the same decisions. Its rules are

- a pool grows as soon as the work that it has, or that arrives, needs more replicas than it has;
- it shrinks once fewer replicas have been enough for the whole of ``downscale_delay_s``, down to
  the most that was needed in that time: the load after the consolidation is what was checked;
- a replica that is silent holds the pool from shrinking, and never keeps it from growing for the
  others; where none reports, the pool stays as it is;
- the link is a stage of its own, which prefill needs enough replicas for;
- ratios between pools only ever add replicas;
- no pool changes by more than ``largest_step`` replicas at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rayapp.scaling.memory import PoolMemory
from rayapp.scaling.need import Need, decode_need, prefill_need
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import DECODE, INGRESS, PREFILL, UNIFIED, Decision, Heard, PoolView


@dataclass(frozen=True)
class Memory:
    """What the policy remembers between two decisions, by pool; a pool has a memory per stage."""

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
    memory = _remembered(settings, memory, fresh, now_s)
    needs = {name: _need(settings, memory, name, fresh, now_s) for name in view if name != INGRESS}
    prompts, link = needs.get(PREFILL), _link_need(settings, memory, now_s)
    if prompts is not None and link is not None:
        needs[PREFILL] = _larger(prompts, link)
    decisions: dict[str, Decision] = {}
    pools = dict(memory.pools)
    for name, pool in view.items():
        need = needs.get(name)
        if need is not None:
            mind = memory.of(name).with_enough(now_s, need.rest, settings.downscale_delay_s)
            pools[name] = mind
        decisions[name] = _decision(settings, name, pool, need, pools.get(name), fresh[name], now_s)
    return _in_ratio(settings, view, decisions), Memory(pools)


def _remembered(
    settings: ScalingSettings,
    memory: Memory,
    fresh: Mapping[str, Mapping[str, Heard]],
    now_s: float,
) -> Memory:
    pools = dict(memory.pools)
    for stage, read in _COUNTERS.items():
        reports = {n: heard for pool in fresh.values() for n, heard in pool.items()}
        pools[stage] = memory.of(stage).heard(now_s, reports, read, settings.slow_s)
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


_COUNTERS = {
    "prefill arrivals": _prefill_counters,
    "decode arrivals": _decode_counters,
    "transfers": _link_counters,
}


def _need(
    settings: ScalingSettings,
    memory: Memory,
    name: str,
    fresh: Mapping[str, Mapping[str, Heard]],
    now_s: float,
) -> Need | None:
    """The need of one pool; None if no replica of it reports."""
    heard = fresh[name].values()
    prompts = [one.prefill for one in heard if one.prefill is not None]
    sequences = [one.decode for one in heard if one.decode is not None]
    arrivals = memory.of("prefill arrivals").rates(now_s, settings.fast_s)
    answers = memory.of("decode arrivals").rates(now_s, settings.fast_s)
    waiting = sum(
        one.ingress.waiting_tokens for one in fresh.get(INGRESS, {}).values() if one.ingress
    )
    if name == PREFILL and prompts:
        return prefill_need(prompts, arrivals, settings, elsewhere_tokens=waiting)
    if name == DECODE and sequences:
        return decode_need(sequences, answers, settings)
    if name == UNIFIED and prompts and sequences:
        return _sum(
            prefill_need(prompts, arrivals, settings, elsewhere_tokens=waiting),
            decode_need(sequences, answers, settings),
            arrivals.fast,
        )
    return None


def _link_need(settings: ScalingSettings, memory: Memory, now_s: float) -> Need | None:
    """Prefill replicas whose links carry the KV that is sent; every replica has one link."""
    busy = memory.of("transfers").rates(now_s, settings.fast_s).fast
    if busy <= 0.0:
        return None
    number = math.ceil(busy / settings.usage - 1e-9)
    return Need(number, number, f"links are busy with KV for {busy:.2f} s per second")


def _larger(one: Need, other: Need) -> Need:
    first = max((one, other), key=lambda need: need.whole)
    return replace(first, rest=max(one.rest, other.rest))


def _sum(prompts: Need, sequences: Need, prefill_load: float) -> Need:
    """The need of replicas that do both: prefill takes time from the steps of decode."""
    extra = math.ceil(prefill_load)
    main = _larger(prompts, sequences)
    together = extra + sequences.whole if extra else main.whole
    return Need(max(main.whole, together), max(main.rest, extra + sequences.rest), main.reason)


def _decision(
    settings: ScalingSettings,
    name: str,
    pool: PoolView,
    need: Need | None,
    memory: PoolMemory | None,
    fresh: Mapping[str, Heard],
    now_s: float,
) -> Decision:
    """The decision for one pool, before ratios are looked at."""
    before = pool.target
    if pool.minimum == pool.maximum:
        return Decision(name, before, pool.maximum, "its size is fixed")
    if need is None or memory is None:
        return Decision(name, before, _bounded(pool, before), "no replica reports")
    if need.whole > before:
        after = min(need.whole, before + settings.largest_step)
        return Decision(name, before, _bounded(pool, after), need.reason)
    lowest = max(number for _, number in memory.enough)
    is_settled = now_s - memory.enough[0][0] >= settings.downscale_delay_s * 0.95
    if lowest >= before or not is_settled:
        return Decision(name, before, _bounded(pool, before), need.reason)
    silent = len(pool.running) - len(fresh)
    if silent:
        return Decision(
            name, before, _bounded(pool, before), f"{silent} of its replicas do not report"
        )
    after = max(lowest, before - settings.largest_step)
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
