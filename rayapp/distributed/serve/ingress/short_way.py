"""Attempts that choose for every prompt: prefilled apart, or on the decode replica itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from statistics import fmean

from rayapp.distributed.serve.ingress.answering import Answering
from rayapp.distributed.serve.ingress.disaggregated import DisaggregatedAttempts
from rayapp.distributed.serve.ingress.unified import UnifiedAttempts
from rayapp.distributed.serve.known_work import standings_of, wait_s
from rayapp.distributed.serve.settings import DECODE, PREFILL
from rayapp.engine.request import PromptRequests, TokenBatch
from rayapp.scaling.routing import Ways

_NEW = 0.2
"""Weight of a new handoff in the mean of all (project default)."""


class ShortWayAttempts:
    """Attempts on either way; a later attempt at an answer takes the usual one.

    Args:
        usual: Attempts over a prefill and a decode replica.
        short: Attempts within a decode replica.
        most_tokens: Longest prompt that takes the short way.
        tpot_s: Seconds per token that no running answer may exceed for a prompt's sake.
    """

    def __init__(
        self,
        usual: DisaggregatedAttempts,
        short: UnifiedAttempts,
        *,
        most_tokens: int,
        tpot_s: float,
    ) -> None:
        self._usual, self._short = usual, short
        self._most_tokens, self._tpot_s = most_tokens, tpot_s
        self._handoff_s: float | None = None
        self._sent_s = 0.0
        """Seconds of prompts that were sent the short way and are not prefilled yet."""

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of attempts that have not reached a replica yet."""
        return self._usual.waiting_tokens

    async def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Generate the tokens of all answers on the way that is sooner."""
        ways = None if answering.prompt.attempt else self._ways(answering.prompt)
        if ways is not None and ways.is_short_sooner(self._tpot_s):
            batches = self._run_short(answering, ways.short_s)
        else:
            batches = self._run_usual(answering)
        async with aclosing(batches) as running:
            async for batch in running:
                yield batch

    async def _run_short(
        self, answering: Answering, work_s: float
    ) -> AsyncGenerator[TokenBatch, None]:
        self._sent_s += work_s
        is_counted = True
        try:
            async with aclosing(self._short.run(answering)) as batches:
                async for batch in batches:
                    if is_counted:
                        self._sent_s -= work_s
                        is_counted = False
                    yield batch
        finally:
            self._sent_s -= work_s * is_counted

    async def _run_usual(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Run an attempt over both pools, and learn how long its handoff took."""
        (timeline, *_) = answering.timelines.values()
        is_learned = bool(answering.prompt.attempt)
        async with aclosing(self._usual.run(answering)) as batches:
            async for batch in batches:
                if not is_learned and timeline.admitted_s and timeline.prefill_finished_s:
                    self._learn(timeline.admitted_s - timeline.prefill_finished_s)
                    is_learned = True
                yield batch

    def _learn(self, handoff_s: float) -> None:
        before_s = handoff_s if self._handoff_s is None else self._handoff_s
        self._handoff_s = before_s + _NEW * (handoff_s - before_s)

    def _ways(self, prompt: PromptRequests) -> Ways | None:
        """Knowledge of both ways; None where a prompt is too long, or too little is known."""
        num_tokens = prompt.prompt.num_prompt_tokens
        apart = standings_of(PREFILL)
        here = [one for one in standings_of(DECODE) if num_tokens <= one.most_prompt]
        if num_tokens > self._most_tokens or not here or not apart or self._handoff_s is None:
            return None
        token_s = fmean(one.token_s for one in apart)
        # Until decode has measured prompts of its own, they are taken to cost what they do apart.
        short_s = fmean(one.token_s for one in here) or token_s
        return Ways(
            queue_s=wait_s(PREFILL),
            prefill_s=num_tokens * token_s,
            handoff_s=self._handoff_s,
            step_s=min(one.step_s for one in here),
            prompts_s=max(min(one.prompts_s for one in here), self._sent_s / len(here)),
            short_s=num_tokens * short_s,
        )
