"""Costs of the stages: what a chunk of a prompt, a decode step and a transfer take, in seconds.

Each cost is linear in a few counts, with coefficients that are measured: by the replicas while they
serve (:mod:`rayapp.scaling.fitting`), or beforehand for a simulation.
"""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from rayapp.settings import Strict

_SEARCH_LIMIT = 65536


class PrefillCost(Strict):
    """Seconds of a prefill step: what it always takes, per token, and per pair of tokens.

    A token attends to those before it, so a pair is a token of a chunk and a token that lies before
    it in its prompt, computed in an earlier chunk or in this one.
    """

    step_s: float = Field(default=0.0, ge=0.0)
    token_s: float = Field(default=0.0, ge=0.0)
    pair_s: float = Field(default=0.0, ge=0.0)

    def chunk_s(self, num_tokens: int, num_before: int = 0) -> float:
        """Seconds of ``num_tokens`` tokens after ``num_before`` others, without the step itself."""
        return num_tokens * self.token_s + pairs(num_tokens, num_before) * self.pair_s

    def prompt_s(self, num_tokens: int, num_before: int = 0, *, chunk: int = 512) -> float:
        """Seconds of the rest of a prompt alone on a replica, in steps of ``chunk`` tokens."""
        steps = -(-num_tokens // max(1, chunk))
        return steps * self.step_s + self.chunk_s(num_tokens, num_before)


class DecodeCost(Strict):
    """Seconds of a decode step: what it always takes, per sequence, and per entry of their KV."""

    step_s: float = Field(default=0.0, ge=0.0)
    row_s: float = Field(default=0.0, ge=0.0)
    entry_s: float = Field(default=0.0, ge=0.0)

    def seconds(self, num_rows: float, num_entries: float) -> float:
        """Seconds of a step of ``num_rows`` sequences that hold ``num_entries`` entries in all."""
        return self.step_s + num_rows * self.row_s + num_entries * self.entry_s

    def largest_batch(self, limit_s: float, entries_per_row: float) -> int:
        """The most sequences whose step takes at most ``limit_s``; at least one."""
        per_row_s = self.row_s + entries_per_row * self.entry_s
        if per_row_s <= 0.0:
            return _SEARCH_LIMIT
        return max(1, min(_SEARCH_LIMIT, int((limit_s - self.step_s) / per_row_s + 1e-9)))


class LinkCost(Strict):
    """Seconds of a transfer: what it always takes, and per byte."""

    transfer_s: float = Field(default=0.0, ge=0.0)
    byte_s: float = Field(default=0.0, ge=0.0)

    def seconds(self, num_bytes: float) -> float:
        """Seconds in which ``num_bytes`` bytes are published and fetched."""
        return self.transfer_s + num_bytes * self.byte_s


def pairs(num_tokens: int, num_before: int) -> float:
    """Pairs of tokens that a chunk attends over: with those before it, and within itself."""
    return num_tokens * num_before + num_tokens * (num_tokens - 1) / 2


def prefill_work_s(cost: PrefillCost, prompts: Iterable[tuple[int, int]], *, chunk: int) -> float:
    """Seconds of prefill that a replica still has before it.

    Args:
        cost: The measured cost of its steps.
        prompts: Tokens left and tokens done of every prompt, queued or running; tokens whose KV is
            reused count as done.
        chunk: Tokens of a step.
    """
    waiting = list(prompts)
    steps = -(-sum(left for left, _ in waiting) // max(1, chunk))
    return steps * cost.step_s + sum(cost.chunk_s(left, done) for left, done in waiting)
