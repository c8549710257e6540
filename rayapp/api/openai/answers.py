"""Answers as they grow: token batches become text, and several answers become one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from rayapp.api.service import Service
from rayapp.engine.request import (
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    Timeline,
    TokenBatch,
    TokenLogprobs,
)
from rayapp.engine.stopping import TextStream


@dataclass(frozen=True)
class Delta:
    """The tokens and text that one batch adds to answer ``index``; text may lag behind tokens.

    ``timeline`` comes with the answer's end.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptLogprobs = ()
    timeline: Timeline | None = None


@dataclass
class AnswerText:
    """One whole answer: the sum of its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptLogprobs = ()
    timeline: Timeline | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.timeline = delta.timeline or self.timeline


BatchObserver = Callable[[Timeline, TokenBatch], None]


class _Growing:
    """An answer as it grows: its place in the reply, its timeline, and its text."""

    def __init__(
        self, request: GenerationRequest, index: int, service: Service, observe: BatchObserver
    ) -> None:
        tokenizer: PreTrainedTokenizerBase = service.description.tokenizer
        self.timeline = Timeline()
        self._index = index
        self._observe = observe
        sampling = request.sampling
        self._text = TextStream(
            tokenizer,
            sampling.stop,
            context=request.prompt_token_ids,
            min_tokens=sampling.min_tokens,
        )

    def delta(self, batch: TokenBatch) -> Delta:
        """Observe a batch and turn it into text."""
        self._observe(self.timeline, batch)
        released = self._text.push(batch.token_ids)
        if batch.finish_reason:
            released += self._text.flush()
        return Delta(
            self._index,
            released,
            batch.token_ids,
            batch.logprobs,
            batch.finish_reason,
            batch.prompt_logprobs,
            self.timeline if batch.finish_reason else None,
        )


async def answer_deltas(
    service: Service,
    requests: Sequence[GenerationRequest],
    first_index: int,
    observers: Sequence[BatchObserver],
) -> AsyncGenerator[Delta, None]:
    """Generate the deltas of all answers to one prompt; closing this generator cancels them.

    Args:
        service: The source of tokens.
        requests: Tokens and sampling, one request per answer.
        first_index: Number of the first of these answers within its reply.
        observers: One per answer, called with its timeline and every batch before the batch goes
            out.
    """
    answers = {
        request.request_id: _Growing(request, first_index + number, service, observe)
        for number, (request, observe) in enumerate(zip(requests, observers, strict=True))
    }
    timelines = [answer.timeline for answer in answers.values()]
    async with aclosing(service.generate(requests, timelines)) as batches:
        async for batch in batches:
            yield answers[batch.request_id].delta(batch)


async def admitted_together(
    service: Service,
    prompts: Sequence[Sequence[GenerationRequest]],
    deltas: AsyncGenerator[Delta, None],
) -> AsyncGenerator[Delta, None]:
    """Generate the deltas of several prompts, which are admitted together or not at all.

    Args:
        service: The source of tokens.
        prompts: The requests for the answers to every prompt.
        deltas: Those of all prompts, merged.
    """
    with service.admitted(prompts):
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta


async def merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Merge streams of deltas as they arrive; the order within every stream stays.

    The first error ends them all, and so does closing this generator.
    """
    if len(streams) == 1:  # The common case needs no queue, which costs as much as a token's text.
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    events: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, events)) for stream in streams]
    try:
        for task in tasks:
            task.add_done_callback(events.put_nowait)
        num_open = len(tasks)
        while num_open:
            event = await events.get()
            if isinstance(event, Delta):
                yield event
            else:
                event.result()
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    stream: AsyncGenerator[Delta, None], events: asyncio.Queue[Delta | asyncio.Task[None]]
) -> None:
    async with aclosing(stream):
        async for delta in stream:
            events.put_nowait(delta)


async def collected(deltas: AsyncGenerator[Delta, None], num_answers: int) -> list[AnswerText]:
    """Wait for all answers and return them in the order of their indices."""
    answers = [AnswerText() for _ in range(num_answers)]
    async with aclosing(deltas):
        async for delta in deltas:
            answers[delta.index].add(delta)
    return answers
