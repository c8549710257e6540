"""A sequence that decodes: its request, its answer, and the KV that it holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rayapp.engine.answer import Answer
from rayapp.engine.request import FinishReason, GenerationRequest, TokenBatch, TokenLogprobs
from rayapp.engine.sequences.paged_kv import PagedKV, SequenceKV, StoredKV
from rayapp.errors import IntegrityError, RequestError, TransferError, WireError
from rayapp.kv.segment import KVExtent, KVSegment
from rayapp.kv.select import num_prefilled
from rayapp.plan import PruningPlan


@dataclass(frozen=True)
class AnswerStart:
    """One answer to a prompt, and what of it is known.

    Args:
        request: The request that is answered; every answer has one of its own.
        first: The first answer token if prefill sampled it; it is not reported again.
        replay: Answer tokens that the client already has, from index 0. They are fed one by one and
            neither sampled nor reported again, and replace ``first``.
    """

    request: GenerationRequest
    first: TokenBatch | None = None
    replay: tuple[int, ...] = ()

    @property
    def sent(self) -> tuple[int, ...]:
        """The answer tokens that are known."""
        return self.replay or (self.first.token_ids if self.first else ())


@dataclass(eq=False)
class RunningSequence:
    """A sequence: ``pending`` tokens are still to be fed, the first at ``position``.

    ``age`` is lower for a sequence that came earlier.
    """

    request: GenerationRequest
    answer: Answer
    pending: deque[int]
    position: int
    kv: SequenceKV = ()
    age: int = 0


@dataclass(eq=False)
class AsideSequence:
    """A sequence that has no slot and no pages for the moment; its KV is in host memory."""

    sequence: RunningSequence
    kv: StoredKV

    @property
    def nbytes(self) -> int:
        """Number of bytes of host memory."""
        return sum(stored.nbytes for stored in self.kv)


@dataclass(eq=False)
class Reservation:
    """Slots and pages for the answers to one prompt, before its KV is copied.

    Nobody reads or moves the pages until they are committed, so :meth:`load` may run beside a step.
    """

    requests: tuple[GenerationRequest, ...]
    extent: KVExtent
    held: list[SequenceKV]
    pages: PagedKV
    is_open: bool = True

    def __post_init__(self) -> None:
        self._loaded = self.pages.nothing_loaded()

    def place(self, block: int, num_entries: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the pages of a block's next entries; see :class:`rayapp.kv.landing.Landing`."""
        return self.pages.landing_place(self.held, self.extent, self._loaded, block, num_entries)

    def load(self, segment: KVSegment) -> None:
        """Copy the prompt's KV, or its next part, into the pages, on any thread.

        The segment may be released when this returns.

        Raises:
            WireError: The segment is not the KV that comes next; nothing was copied.
        """
        if segment.extent != self.extent:
            raise WireError(
                f"the KV segment is of {segment.extent}, pages were taken for {self.extent}; "
                "prefill again"
            )
        self._loaded = self.pages.load(self.held, segment, self._loaded)

    def check_complete(self) -> None:
        """Raise :class:`WireError` if parts of the KV have not been copied."""
        num_missing = self.pages.num_missing(self.extent, self._loaded)
        if num_missing:
            raise WireError(
                f"{num_missing} entries of KV have not come, after {sum(self._loaded.counts)}, "
                "over all blocks; prefill again"
            )


def check_extent(
    request: GenerationRequest,
    extent: KVExtent,
    num_entries: Iterable[int],
    plan: PruningPlan,
    max_model_len: int,
) -> None:
    """Raise an error if the KV to come is not of a request's prompt, or leaves too little room.

    Args:
        request: The request that is answered.
        extent: The lengths of the prompt whose KV comes.
        num_entries: Entries that the KV has, by groups of blocks.
        plan: The plan, which says which tokens prefill runs.
        max_model_len: Most entries of a sequence in one block.

    Raises:
        WireError: The lengths are not those of the prompt under this plan.
        RequestError: Prompt and answer exceed ``max_model_len`` entries.
    """
    kept = request.num_prompt_tokens - extent.num_visual_tokens_removed
    expected = num_prefilled(plan, kept)
    lengths = (extent.num_prompt_tokens, extent.num_prefilled)
    in_images = sum(image.num_tokens for image in request.images)
    if lengths != (request.num_prompt_tokens, expected) or (
        extent.num_visual_tokens_removed > in_images
    ):
        raise WireError(
            f"the KV segment is of {lengths[0]} prompt tokens, {lengths[1]} of them prefilled; "
            f"the request has {request.num_prompt_tokens}, {expected} to prefill: prefill again"
        )
    entries = max(num_entries, default=0)
    if entries + request.sampling.max_tokens > max_model_len:
        raise RequestError(
            f"{entries} entries and max_tokens={request.sampling.max_tokens} exceed the "
            f"{max_model_len} entries of a sequence; lower max_tokens or raise max_model_len"
        )


def begun(
    start: AnswerStart,
    plan: PruningPlan,
    extent: KVExtent,
    answer: Answer,
) -> RunningSequence:
    """Build a sequence; its first inputs are the last prompt token and tokens sent before.

    Raises:
        IntegrityError: What is known contradicts the plan, or ends the answer.
    """
    request, sent = start.request, start.sent
    decodes_first = plan.first_token == "decode"
    if not decodes_first and not sent:
        raise IntegrityError(
            f"request {request.request_id} came without its first token, which prefill samples "
            "under this plan; pass it as `first`"
        )
    ended = [answer.take(token_id) for token_id in sent]
    if any(ended):
        raise IntegrityError(
            f"request {request.request_id}: the answer ended ({ended[-1]}) within the "
            f"{len(sent)} tokens already sent; there is nothing to decode"
        )
    pending = deque(sent)
    if decodes_first:
        pending.appendleft(request.prompt_token_ids[-1])
    return RunningSequence(request, answer, pending, extent.next_position - decodes_first)


def youngest(sequences: Sequence[RunningSequence]) -> RunningSequence:
    """The sequence that came last."""
    return max(sequences, key=lambda sequence: sequence.age)


def came_late(request: GenerationRequest, running: GenerationRequest) -> TransferError:
    """The error for an attempt that comes after a later one, or twice."""
    return TransferError(
        f"request {request.request_id}: attempt {running.attempt} is running, attempt "
        f"{request.attempt} came late and was dropped"
    )


def reported(sequence: RunningSequence, token_id: int, logprob: TokenLogprobs | None) -> TokenBatch:
    """Add a sampled token to its answer; return the batch to report."""
    request, index = sequence.request, sequence.answer.num_tokens
    reason: FinishReason | None = sequence.answer.take(token_id)
    sequence.pending.append(token_id)
    return TokenBatch(
        request_id=request.request_id,
        attempt=request.attempt,
        first_index=index,
        token_ids=(token_id,),
        finish_reason=reason,
        logprobs=() if logprob is None else (logprob,),
    )
