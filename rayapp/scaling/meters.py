"""Meters of a replica: they learn what its steps cost, count what arrives, and make its reports."""

from __future__ import annotations

from collections.abc import Iterable

from rayapp.scaling.costs import DecodeCost, PrefillCost, pairs, prefill_work_s
from rayapp.scaling.fitting import LinearFit
from rayapp.scaling.reports import DecodeReport, PrefillReport

_USUAL_ANSWER = 128.0
_FADE = 0.98
_ENTRIES = 1000.0


class PrefillMeter:
    """The meter of a prefill engine.

    Args:
        chunk: Tokens that a step may compute.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._fit = LinearFit((1.0, float(chunk), float(chunk) ** 2))
        self._num_arrived = self._num_tokens = 0
        self._arrived_s = self._square_s = 0.0

    @property
    def cost(self) -> PrefillCost:
        """The measured cost of a step; zeros before the first."""
        step_s, token_s, pair_s = self._fit.coefficients
        return PrefillCost(step_s=step_s, token_s=token_s, pair_s=pair_s)

    @property
    def token_s(self) -> float:
        """Seconds per prompt token at the lengths that came."""
        return self._arrived_s / self._num_tokens if self._num_tokens else 0.0

    def arrive(self, num_tokens: int) -> None:
        """Count a prompt of which ``num_tokens`` tokens are to be computed."""
        work_s = self.cost.prompt_s(num_tokens, chunk=self._chunk)
        self._num_arrived += 1
        self._num_tokens += num_tokens
        self._arrived_s += work_s
        self._square_s += work_s**2

    def observe(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """Learn from a step.

        Args:
            chunks: Tokens of every chunk, and tokens of its prompt that were done before.
            seconds: Seconds that the step took.
        """
        parts = list(chunks)
        num_tokens = sum(count for count, _ in parts)
        num_pairs = sum(pairs(count, before) for count, before in parts)
        self._fit.observe((1.0, num_tokens, num_pairs), seconds)

    def report(self, prompts: Iterable[tuple[int, int]], start_s: float) -> PrefillReport:
        """The report of the replica.

        Args:
            prompts: Tokens left and tokens done of every prompt that waits or runs.
            start_s: Seconds that the replica took to start.
        """
        return PrefillReport(
            queued_s=prefill_work_s(self.cost, prompts, chunk=self._chunk),
            arrived=self._num_arrived,
            arrived_s=self._arrived_s,
            arrived_square_s=self._square_s,
            token_s=self.token_s,
            start_s=start_s,
        )


class DecodeMeter:
    """The meter of a decode engine."""

    def __init__(self) -> None:
        self._fit = LinearFit((1.0, 1.0, _ENTRIES))
        self._num_arrived = 0
        self._answer_tokens = _USUAL_ANSWER

    @property
    def cost(self) -> DecodeCost:
        """The measured cost of a step; zeros before the first."""
        step_s, row_s, entry_s = self._fit.coefficients
        return DecodeCost(step_s=step_s, row_s=row_s, entry_s=entry_s)

    @property
    def answer_tokens(self) -> float:
        """Mean number of tokens of the answers that ended, later ones counting more."""
        return self._answer_tokens

    def arrive(self, num_sequences: int) -> None:
        """Count sequences that came."""
        self._num_arrived += num_sequences

    def end(self, num_tokens: int) -> None:
        """Learn from an answer of ``num_tokens`` tokens that ended."""
        self._answer_tokens = _FADE * self._answer_tokens + (1.0 - _FADE) * num_tokens

    def observe(self, num_rows: int, num_entries: int, seconds: float) -> None:
        """Learn from a step of ``num_rows`` sequences with ``num_entries`` entries in all."""
        self._fit.observe((1.0, num_rows, num_entries), seconds)

    def report(
        self,
        *,
        rows: int,
        waiting: int,
        entries: float,
        max_rows: int,
        max_entries: float,
        start_s: float,
    ) -> DecodeReport:
        """The report of the replica; see :class:`rayapp.scaling.reports.DecodeReport`."""
        return DecodeReport(
            rows=rows,
            waiting=waiting,
            entries=entries,
            max_rows=max_rows,
            max_entries=max_entries,
            **self.cost.model_dump(),
            answer_tokens=self._answer_tokens,
            arrived=self._num_arrived,
            start_s=start_s,
        )
