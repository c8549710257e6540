"""The decode engine: slots, continuous batching, one token per active sequence and step.

Sequences join (:meth:`DecodeEngine.admit`) and leave between steps; nothing is padded, and no
sequence waits for the longest. An engine is not thread-safe: one thread (or one lock) owns it.
Shapes: B = active sequences, V = vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rayapp.engine.answer import Answer
from rayapp.engine.request import FinishReason, GenerationRequest, TokenBatch, TokenLogprobs
from rayapp.engine.sampling import sample
from rayapp.engine.slab import Slab
from rayapp.errors import IntegrityError, OverloadedError, RequestError, TransferError, WireError
from rayapp.kv.segment import KVSegment
from rayapp.kv.select import num_prefilled
from rayapp.models.single_token import SingleTokenStack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan


@dataclass
class _Sequence:
    """A sequence in its slot: ``pending`` tokens are still to be fed, the first at ``position``."""

    request: GenerationRequest
    answer: Answer
    pending: deque[int]
    position: int


class DecodeEngine:
    """Runs the decode stage for up to ``max_num_seqs`` sequences at once.

    Args:
        stack: The blocks of the decode stage.
        plan: The plan, which says how KV was cut and which stage samples the first token.
        max_num_seqs: Number of slots.
        max_model_len: KV entries per slot and block.
        eos_token_ids: Tokens that end an answer.
        tokenizer: The model's tokenizer, needed for requests with stop strings.
    """

    def __init__(
        self,
        stack: BlockStack,
        plan: PruningPlan,
        *,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.stack = stack
        self.plan = plan
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self._blocks = SingleTokenStack(stack)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._slab = Slab(stack, plan, num_slots=max_num_seqs, capacity=max_model_len)
        self._sequences: list[_Sequence] = []  # The index of a sequence is its slot.
        self._slots: dict[str, int] = {}

    @property
    def num_running(self) -> int:
        """Number of active sequences."""
        return len(self._sequences)

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return self.max_num_seqs - len(self._sequences)

    @property
    def slab_bytes(self) -> int:
        """Number of bytes set aside for KV, fixed by ``max_num_seqs x max_model_len``."""
        return self._slab.nbytes

    @property
    def usage(self) -> float:
        """Share of the slab's entries in use, 0 to 1; if no block attends, the share of slots."""
        if not self._slab.num_entries:
            return self.num_running / self.max_num_seqs
        return self._slab.num_used / self._slab.num_entries

    def admit(
        self,
        request: GenerationRequest,
        segment: KVSegment,
        first: TokenBatch | None = None,
        replay: Sequence[int] = (),
    ) -> int:
        """Copy a segment into a free slot; the sequence takes part from the next step on.

        An older attempt of the same request loses its slot first.

        Args:
            request: The request that is answered.
            segment: The KV of its prompt, which may be released when this returns.
            first: The first answer token if prefill sampled it; it is not reported again.
            replay: Answer tokens that the client already has, from index 0. They are fed one by one
                and neither sampled nor reported again, and replace ``first``.

        Returns:
            The slot's number, which may change when other sequences leave.

        Raises:
            OverloadedError: No slot is free.
            RequestError: The answer would not fit into a slot.
            WireError: The segment is not one of this plan and prompt.
            TransferError: The same or a later attempt is already running.
            IntegrityError: ``first`` and ``replay`` contradict the plan, or end the answer.
        """
        self._check_segment(request, segment)
        sent = tuple(replay) or (first.token_ids if first else ())
        sequence = self._sequence(request, segment.next_position, sent)
        self._supersede(request)
        if not self.num_free:
            raise OverloadedError(
                f"all {self.max_num_seqs} decode slots are taken; "
                "try again later or raise max_num_seqs"
            )
        slot = len(self._sequences)
        self._slab.load(slot, segment)
        self._sequences.append(sequence)
        self._slots[request.request_id] = slot
        return slot

    def _check_segment(self, request: GenerationRequest, segment: KVSegment) -> None:
        kept = request.num_prompt_tokens - segment.num_visual_tokens_removed
        expected = num_prefilled(self.plan, kept)
        lengths = (segment.num_prompt_tokens, segment.num_prefilled)
        in_images = sum(image.num_tokens for image in request.images)
        if lengths != (request.num_prompt_tokens, expected) or (
            segment.num_visual_tokens_removed > in_images
        ):
            raise WireError(
                f"the KV segment is of {lengths[0]} prompt tokens, {lengths[1]} of them prefilled; "
                f"the request has {request.num_prompt_tokens}, {expected} to prefill: prefill again"
            )
        self._slab.check(segment)
        entries = max((entry.num_entries for entry in segment.blocks), default=0)
        if entries + request.sampling.max_tokens > self.max_model_len:
            raise RequestError(
                f"{entries} entries and max_tokens={request.sampling.max_tokens} exceed the "
                f"{self.max_model_len} entries of a slot; lower max_tokens or raise max_model_len"
            )

    def _sequence(
        self, request: GenerationRequest, next_position: int, sent: tuple[int, ...]
    ) -> _Sequence:
        """Build a sequence; its first inputs are the last prompt token and tokens sent before."""
        decodes_first = self.plan.first_token == "decode"
        if not decodes_first and not sent:
            raise IntegrityError(
                f"request {request.request_id} came without its first token, which prefill samples "
                "under this plan; pass it as `first`"
            )
        answer = Answer(request, self._eos_token_ids, self._tokenizer)
        ended = [answer.take(token_id) for token_id in sent]
        if any(ended):
            raise IntegrityError(
                f"request {request.request_id}: the answer ended ({ended[-1]}) within the "
                f"{len(sent)} tokens already sent; there is nothing to decode"
            )
        pending = deque(sent)
        if decodes_first:
            pending.appendleft(request.prompt_token_ids[-1])
        return _Sequence(request, answer, pending, next_position - decodes_first)

    def _supersede(self, request: GenerationRequest) -> None:
        slot = self._slots.get(request.request_id)
        if slot is None:
            return
        running = self._sequences[slot].request.attempt
        if running >= request.attempt:
            raise TransferError(
                f"request {request.request_id}: attempt {running} is running, attempt "
                f"{request.attempt} came late and was dropped"
            )
        self._free(slot)

    def step(self) -> list[TokenBatch]:
        """Run one token of every active sequence; return the new answer tokens in slot order.

        Sequences that still replay report nothing. Finished sequences have left when this returns.
        """
        return self.settle(self.advance()) if self._sequences else []

    @torch.inference_mode()
    def advance(self) -> torch.Tensor:
        """Feed the next token of every active sequence; return the logits ``(B, V)`` after it."""
        sequences = self._sequences
        tokens_B1 = torch.tensor([[sequence.pending.popleft()] for sequence in sequences])
        positions_B = np.array([sequence.position for sequence in sequences])
        for sequence in sequences:
            sequence.position += 1
        masks = self._slab.begin_step(positions_B)
        positions_B1 = torch.from_numpy(positions_B)[:, None]
        stack = self.stack
        hidden_B1E = self._blocks.run(stack.embed(tokens_B1), positions_B1, self._slab, masks)
        return stack.logits(hidden_B1E)[:, 0]

    @torch.inference_mode()
    def settle(self, logits_BV: torch.Tensor) -> list[TokenBatch]:
        """Sample from the logits of :meth:`advance`, and remove finished sequences."""
        due = [slot for slot, sequence in enumerate(self._sequences) if not sequence.pending]
        if len(due) < len(self._sequences):
            logits_BV = logits_BV[due]
        sequences = [self._sequences[slot] for slot in due]
        params = [sequence.request.sampling for sequence in sequences]
        indices = [sequence.answer.num_tokens for sequence in sequences]
        tokens, logprobs = sample(logits_BV, params, indices) if due else ([], [])
        batches = [
            _batch(sequence, token_id, logprob)
            for sequence, token_id, logprob in zip(sequences, tokens, logprobs, strict=True)
        ]
        finished = [slot for slot, batch in zip(due, batches, strict=True) if batch.finish_reason]
        for slot in reversed(finished):  # From the end, because the last active slot fills a hole.
            self._free(slot)
        return batches

    def cancel(self, request_id: str) -> bool:
        """Free a request's slot at once; return whether the request had one."""
        slot = self._slots.get(request_id)
        if slot is None:
            return False
        self._free(slot)
        return True

    @torch.inference_mode()
    def _free(self, slot: int) -> None:
        last = len(self._sequences) - 1
        del self._slots[self._sequences[slot].request.request_id]
        moved = self._sequences.pop()
        if slot != last:
            self._slab.clear(slot)
            self._slab.move(last, slot)
            self._sequences[slot] = moved
            self._slots[moved.request.request_id] = slot
        self._slab.clear(last)

    def check_integrity(self) -> None:
        """Raise :class:`IntegrityError` with the numbers if slots and entries disagree."""
        active, free = len(self._sequences), self.max_num_seqs - len(self._sequences)
        names = {s.request.request_id: slot for slot, s in enumerate(self._sequences)}
        if free < 0 or names != self._slots:
            raise IntegrityError(
                f"{active} active of {self.max_num_seqs} slots, by name {self._slots}, "
                f"by slot {names}"
            )
        for group in self._slab.groups:
            used = group.used_S.tolist()
            leftover = [slot for slot in range(active, self.max_num_seqs) if used[slot]]
            if leftover or max(used) > self.max_model_len or (group.low_S > group.used_S).any():
                raise IntegrityError(
                    f"blocks {list(group.blocks)}: {active} active slots, entries per slot {used} "
                    f"of {self.max_model_len}, first visible {group.low_S.tolist()}"
                )
        if not active and self._slab.num_used:
            raise IntegrityError(f"idle, but {self._slab.num_used} entries are in use")


def _batch(sequence: _Sequence, token_id: int, logprob: TokenLogprobs | None) -> TokenBatch:
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
