"""The answers to one prompt while they are made, and the interface of single attempts at them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from rayapp.distributed.serve.messages import PrefillAnswer
from rayapp.engine.request import PromptLogprobs, PromptRequests, Timeline, TokenBatch, after
from rayapp.errors import UnavailableError


@dataclass
class Answering:
    """The state of all answers to one prompt, over all attempts.

    Args:
        prompt: The requests of this attempt: those whose answers have not ended.
        timelines: The timeline of every answer, by request id.
        admitted: Called once decode has taken the prompt over.
        sent: The tokens of every answer that the client has, by request id.
        ended: Request ids of complete answers.
        prompt_logprobs: Those of the prompt, which go out with the first batch of every answer.
    """

    prompt: PromptRequests
    timelines: Mapping[str, Timeline]
    admitted: Callable[[], None]
    sent: dict[str, list[int]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    prompt_logprobs: PromptLogprobs = ()

    @property
    def is_complete(self) -> bool:
        """True if every answer has ended."""
        return all(request.request_id in self.ended for request in self.prompt.requests)

    def begin(self, attempt: int) -> None:
        """Begin another attempt at the answers that have not ended."""
        self.prompt = self.prompt.on_attempt(attempt, self.ended)

    def take(self, batch: TokenBatch) -> TokenBatch | None:
        """Return the part of a batch that the client does not have, and count it as sent.

        Raises:
            UnavailableError: Tokens before it are missing.
        """
        sent = self.sent.setdefault(batch.request_id, [])
        if batch.first_index > len(sent):
            raise UnavailableError(
                f"tokens {len(sent)} to {batch.first_index - 1} of request {batch.request_id} did "
                "not arrive; ask again"
            )
        new = after(batch, len(sent))
        if new is not None:
            if not sent:
                new = replace(new, prompt_logprobs=self.prompt_logprobs)
            sent.extend(new.token_ids)
            if new.finish_reason:
                self.ended.add(batch.request_id)
        return new

    def mark_prefill(self, answer: PrefillAnswer) -> None:
        """Mark the first prefill's begin and end on this process's clock; keep what it found."""
        self.prompt_logprobs = answer.prompt_logprobs
        now_s = time.monotonic()
        for timeline in self.timelines.values():
            if timeline.prefill_finished_s is None:
                timeline.prefill_finished_s = now_s
                timeline.prefill_started_s = now_s - answer.prefill_s

    def mark_admission(self) -> None:
        """Mark the first admission to decode, and give the waiting places back."""
        now_s = time.monotonic()
        for timeline in self.timelines.values():
            timeline.admitted_s = timeline.admitted_s or now_s
        self.admitted()


class Attempts(Protocol):
    """Runs single attempts at the answers to a prompt."""

    @property
    def waiting_tokens(self) -> int:
        """Number of prompt tokens of attempts that have not reached a replica yet."""
        ...

    def run(self, answering: Answering) -> AsyncGenerator[TokenBatch, None]:
        """Generate the tokens of all answers; tokens that were sent may be repeated.

        The batches of an answer come in order, from index 0 or later; those of different answers
        in any order.
        """
        ...
