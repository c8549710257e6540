"""What a plan gains on a link of any speed, from seconds and bytes that do not depend on the link.

A link is named by the time that the dense KV takes on it over the dense prefill: *r*. Prefill,
handoff and decode follow one another; nothing of a transfer is hidden behind computation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """One request under one plan.

    Attributes:
        prefill_s: Seconds of prefill.
        tpot_s: Seconds of a decode step.
        codec_s: Seconds to pack the KV, and to check and unpack it.
        num_bytes: Bytes of the message.
    """

    prefill_s: float
    tpot_s: float
    codec_s: float
    num_bytes: float

    def answer_s(self, link_s: float, num_answer_tokens: int) -> float:
        """Seconds of a whole answer whose first token prefill makes; ``link_s`` is per byte."""
        steps_s = (num_answer_tokens - 1) * self.tpot_s
        return self.prefill_s + self.codec_s + link_s * self.num_bytes + steps_s

    def first_token_s(self, link_s: float) -> float:
        """Seconds to a first token that decode makes, after the handoff."""
        return self.prefill_s + self.codec_s + link_s * self.num_bytes + self.tpot_s


@dataclass(frozen=True)
class Comparison:
    """A plan beside the dense model on the same request.

    Attributes:
        dense: Costs of the dense model.
        plan: Costs of the plan.
        num_answer_tokens: Number of answer tokens; one is the time to a first token from decode.
    """

    dense: Costs
    plan: Costs
    num_answer_tokens: int

    def gain(self, r: float) -> float:
        """Times as fast as dense where the dense transfer takes ``r`` dense prefills."""
        link_s = r * self.dense.prefill_s / self.dense.num_bytes
        return self._seconds(self.dense, link_s) / self._seconds(self.plan, link_s)

    def break_even(self) -> float | None:
        """The least ``r`` from which on the plan gains; 0 if it always does, None if it never does.

        A plan that sends fewer bytes wins back on the link what its encoding costs.
        """
        lost_s = self._seconds(self.plan, 0.0) - self._seconds(self.dense, 0.0)
        won = 1 - self.plan.num_bytes / self.dense.num_bytes
        if lost_s <= 0:
            return 0.0
        return lost_s / won / self.dense.prefill_s if won > 0 else None

    def _seconds(self, costs: Costs, link_s: float) -> float:
        if self.num_answer_tokens == 1:
            return costs.first_token_s(link_s)
        return costs.answer_s(link_s, self.num_answer_tokens)


def dense_ratio(dense: Costs, gbit_per_s: float) -> float:
    """*r* on a link: seconds of the dense transfer over seconds of the dense prefill."""
    return 8 * dense.num_bytes / (gbit_per_s * 1e9) / dense.prefill_s
