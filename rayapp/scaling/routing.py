"""Routing: the replica with the least work, but for those that fail and those that know the prompt.

The choice is a pure function of what is known of the replicas. Their reports are some seconds old,
so a caller adds the work that it has sent since; otherwise all callers would send to one replica
until its next report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

FORGIVEN_S = 10.0
"""Seconds for which a replica that failed is avoided, doubled by every further failure."""
_LONGEST_S = 120.0


@dataclass(frozen=True)
class Known:
    """Knowledge of one replica.

    Args:
        work_s: Seconds of work before it when it reported last.
        at_s: When that was.
        sent: Work that was sent to it since, as moments and seconds, oldest first.
        num_failed: Failures one after the other.
        failed_s: When it failed last.
        lasts_s: Seconds that one piece of work lasts where many are done side by side, as in
            decode; 0 where they are done one after the other, as in prefill.
        prefix_tokens: Tokens of the prompt at hand whose KV it holds already.
    """

    work_s: float = 0.0
    at_s: float = float("-inf")
    sent: tuple[tuple[float, float], ...] = ()
    num_failed: int = 0
    failed_s: float = float("-inf")
    prefix_tokens: int = 0
    lasts_s: float = 0.0

    def is_avoided(self, now_s: float) -> bool:
        """True while a failure is recent."""
        if not self.num_failed:
            return False
        return now_s - self.failed_s < min(FORGIVEN_S * 2 ** (self.num_failed - 1), _LONGEST_S)

    def left_s(self, now_s: float) -> float:
        """Seconds of work that it has now, if it has worked on whatever it had since its report.

        A replica that falls silent is so taken to go on; it would look ever busier if what was sent
        to it never ended.
        """
        if self.lasts_s > 0.0:
            pieces = ((self.at_s, self.work_s), *self.sent)
            return sum(s * max(0.0, 1.0 - (now_s - at) / self.lasts_s) for at, s in pieces if s)
        left_s, at_s = self.work_s, self.at_s
        for moment, seconds in (*self.sent, (now_s, 0.0)):
            left_s = max(0.0, left_s - max(0.0, moment - at_s)) + seconds
            at_s = max(at_s, moment)
        return left_s

    def reported(self, at_s: float, work_s: float, lasts_s: float = 0.0) -> Known:
        """Knowledge after a report; work that was sent before it is part of it."""
        if at_s <= self.at_s:
            return self
        later = tuple(one for one in self.sent if one[0] > at_s)
        return replace(self, work_s=work_s, at_s=at_s, sent=later, lasts_s=lasts_s)

    def given(self, at_s: float, work_s: float) -> Known:
        """Knowledge after work was sent to it."""
        lately = tuple(one for one in self.sent if one[0] > at_s - _LONGEST_S)
        return replace(self, sent=(*lately, (at_s, work_s)))

    def failed(self, at_s: float) -> Known:
        """Knowledge after a failure."""
        return replace(self, num_failed=self.num_failed + 1, failed_s=at_s)

    def succeeded(self) -> Known:
        """Knowledge after an answer."""
        return replace(self, num_failed=0, failed_s=float("-inf"))


@dataclass(frozen=True)
class Errand:
    """Work that is to be routed: its seconds, and those per token that a prefix may save."""

    work_s: float = 0.0
    token_s: float = 0.0
    avoid: frozenset[str] = field(default_factory=frozenset)


def ranked(replicas: Mapping[str, Known], errand: Errand, now_s: float) -> list[list[str]]:
    """The replicas in ranks, in the order in which they are to be tried.

    Within the first rank the one that would be done first stands first: its own work, and that of
    the errand, less what it saves with a prefix that it holds. Replicas that fail, or that the
    errand is to avoid, come after all others.

    Args:
        replicas: What is known of every replica, by name.
        errand: What is to be routed.
        now_s: The present time, on the clock of what is known.
    """

    def done_s(name: str) -> tuple[float, str]:
        known = replicas[name]
        saved_s = min(errand.work_s, known.prefix_tokens * errand.token_s)
        return known.left_s(now_s) + errand.work_s - saved_s, name

    names = sorted(replicas, key=done_s)
    failing = {name for name in names if replicas[name].is_avoided(now_s)}
    good = [name for name in names if name not in failing and name not in errand.avoid]
    doubtful = [name for name in names if name in failing and name not in errand.avoid]
    last = [name for name in names if name in errand.avoid]
    return [rank for rank in (good, doubtful, last) if rank]


@dataclass(frozen=True)
class Ways:
    """Knowledge of both ways of one prompt: over a prefill replica, or on a decode replica alone.

    Args:
        queue_s: Seconds of work before the prefill replica that would be done first.
        prefill_s: Seconds of the prompt there.
        handoff_s: Seconds from the end of a prefill until decode has the KV.
        step_s: Seconds of a step of the sequences that the decode replica runs.
        prompts_s: Seconds of prompts that the decode replica is to prefill before this one.
        short_s: Seconds of the prompt there.
    """

    queue_s: float
    prefill_s: float
    handoff_s: float
    step_s: float
    prompts_s: float
    short_s: float

    def is_short_sooner(self, tpot_s: float) -> bool:
        """True if decode has the prompt's KV sooner where it prefills the prompt itself.

        The sequences that run there wait for the prompt meanwhile, so it takes the usual way where
        one of their tokens would come too late.

        Args:
            tpot_s: Longest time per token, seconds.
        """
        beside_s = self.step_s + self.prompts_s + self.short_s
        return beside_s <= min(tpot_s, self.queue_s + self.prefill_s + self.handoff_s)


def first(ranks: Sequence[Sequence[str]]) -> str | None:
    """The replica to try first; None if there is none."""
    return ranks[0][0] if ranks else None
