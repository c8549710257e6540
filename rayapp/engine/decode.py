"""The decode engine: slots, pages, continuous batching, one token per running sequence and step.

Sequences join (:meth:`DecodeEngine.admit`) and leave between steps; nothing is padded, and no
sequence waits for the longest. Where pages run out, the youngest sequence is set aside in host
memory; it comes back before new ones are admitted, and a sequence alone always fits.

An engine is not thread-safe: one thread (or one lock) owns it. Only
:meth:`~rayapp.engine.sequences.running.Reservation.load` may run beside it.
Shapes: B = running sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.engine.answer import Answer
from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.engine.sampling import sample
from rayapp.engine.sequences.memory import KVMemory
from rayapp.engine.sequences.paged_kv import PagedKV, SequenceKV
from rayapp.engine.sequences.running import (
    AnswerStart,
    AsideSequence,
    Reservation,
    RunningSequence,
    begun,
    came_late,
    check_extent,
    reported,
    youngest,
)
from rayapp.errors import IntegrityError, OverloadedError
from rayapp.kv.segment import KVExtent, KVSegment
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan


class DecodeEngine:
    """Runs the decode stage for up to ``max_num_seqs`` sequences at once.

    Args:
        stack: The blocks of the decode stage.
        plan: The plan, which says how KV was cut and which stage samples the first token.
        max_num_seqs: Number of slots.
        max_model_len: Most KV entries of a sequence in one block.
        eos_token_ids: Tokens that end an answer.
        tokenizer: The model's tokenizer, needed for requests with stop strings.
        memory: The memory for KV, and how it is divided.

    Raises:
        InputError: The memory does not hold one sequence of ``max_model_len`` entries.
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
        memory: KVMemory = KVMemory(),  # noqa: B008 - frozen
    ) -> None:
        self.stack = stack
        self.plan = plan
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.blocks = SingleTokenStack(stack)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self.pages = PagedKV(
            stack,
            plan,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            memory=memory,
        )
        most = memory.aside_bytes
        self._aside_bytes = self.pages.nbytes // 2 if most is None else most
        self._sequences: list[RunningSequence] = []
        self._reserved: list[Reservation] = []
        self._aside: list[AsideSequence] = []
        self._preempted: list[GenerationRequest] = []
        self._num_admitted = 0

    @property
    def num_running(self) -> int:
        """Number of sequences that were admitted and have not ended, some perhaps set aside."""
        return len(self._sequences) + len(self._aside)

    @property
    def running(self) -> tuple[RunningSequence, ...]:
        """The sequences that take part in the next step."""
        return tuple(self._sequences)

    @property
    def num_aside(self) -> int:
        """Number of sequences whose KV is in host memory until there is room."""
        return len(self._aside)

    @property
    def num_free(self) -> int:
        """Number of slots that nobody has, is promised or will come back to."""
        return self.max_num_seqs - self.num_running - self._num_reserved

    @property
    def _num_reserved(self) -> int:
        return sum(len(reservation.requests) for reservation in self._reserved)

    @property
    def kv_bytes(self) -> int:
        """Number of bytes set aside for KV."""
        return self.pages.nbytes

    @property
    def num_kv_tokens(self) -> int:
        """Number of tokens whose KV finds room."""
        return self.pages.num_tokens

    @property
    def usage(self) -> float:
        """Share of the pages that hold an entry, 0 to 1; of the slots if no block attends."""
        if not self.pages.num_pages:
            return self.num_running / self.max_num_seqs
        return self.pages.num_filled / self.pages.num_pages

    def admit(
        self,
        request: GenerationRequest,
        segment: KVSegment,
        first: TokenBatch | None = None,
        replay: Sequence[int] = (),
    ) -> None:
        """Take a segment over; its sequence takes part from the next step on.

        See :meth:`admit_answers`, and :class:`AnswerStart` for ``first`` and ``replay``.
        """
        self.admit_answers([AnswerStart(request, first, tuple(replay))], segment)

    def admit_answers(self, answers: Sequence[AnswerStart], segment: KVSegment) -> None:
        """Take a prompt's KV over for one or more answers, which share it; all or none.

        An older attempt of the same request loses its place first.

        Args:
            answers: The answers that are to be decoded.
            segment: The KV of their prompt, which may be released when this returns.

        Raises:
            OverloadedError: Slots or pages do not suffice at the moment.
            RequestError: An answer would not fit into ``max_model_len``.
            WireError: The segment is not one of this plan and prompt.
            TransferError: The same or a later attempt is already running.
            IntegrityError: What is known of an answer contradicts the plan, or ends the answer.
        """
        reservation = self.reserve([start.request for start in answers], segment.extent)
        try:
            reservation.load(segment)
            self.commit(reservation, answers)
        finally:
            self.release(reservation)

    def reserve(self, requests: Sequence[GenerationRequest], extent: KVExtent) -> Reservation:
        """Take slots and pages for the answers to a prompt whose KV is to come, all or none.

        The KV may still be computed. After one call of :meth:`Reservation.load` or several, with
        parts of it in their order, this ends with :meth:`commit`, or at any time with
        :meth:`release`. :meth:`admit_answers` tells the errors.

        Args:
            requests: The requests for the answers.
            extent: The lengths of the prompt.
        """
        counts = self.pages.num_entries(extent)
        for request in requests:
            check_extent(request, extent, counts, self.plan, self.max_model_len)
        for request in requests:
            self._supersede(request)
        if len(requests) > self.num_free:
            raise OverloadedError(
                f"{len(requests)} decode slots are needed, {self.num_free} of {self.max_num_seqs} "
                "are free; try again later or raise max_num_seqs"
            )
        limits = [request.sampling.max_tokens for request in requests]
        is_alone, held = not (self.num_running or self._reserved), None
        if not self._aside:
            held = self.pages.take(extent, limits, self.num_free, is_alone=is_alone)
        if held is None:
            raise OverloadedError(
                f"{self.pages.num_filled} of {self.pages.num_pages} pages of KV are filled and "
                f"{len(self._aside)} sequences wait for room; try again later or raise kv_memory"
            )
        reservation = Reservation(tuple(requests), extent, held, self.pages)
        self._reserved.append(reservation)
        return reservation

    def commit(self, reservation: Reservation, answers: Sequence[AnswerStart]) -> None:
        """Let answers of a reservation take part from the next step on.

        Args:
            reservation: A reservation whose KV has been loaded.
            answers: What is known of the answers that go on; the others give their place back.

        Raises:
            WireError: Parts of the KV are missing.
            IntegrityError: What is known of an answer contradicts the plan, or ends the answer.
            TransferError: A later attempt has come meanwhile; the reservation was released.
        """
        reservation.check_complete()
        sequences = [self._begun(start, reservation.extent) for start in answers]
        self._close(reservation)
        names = [request.request_id for request in reservation.requests]
        held = dict(zip(names, reservation.held, strict=True))
        for sequence in sequences:
            newest = self._find(sequence.request.request_id)
            if newest is not None and newest.request.attempt >= sequence.request.attempt:
                self._free_all(reservation.held)
                raise came_late(sequence.request, newest.request)
        for sequence in sequences:
            self._supersede(sequence.request)
            sequence.kv, sequence.age = held.pop(sequence.request.request_id), self._num_admitted
            self._num_admitted += 1
        self._free_all(held.values())
        self._sequences += sequences

    def _begun(self, start: AnswerStart, extent: KVExtent) -> RunningSequence:
        answer = Answer(start.request, self._eos_token_ids, self._tokenizer)
        return begun(start, self.plan, extent, answer)

    def release(self, reservation: Reservation) -> None:
        """Give a reservation's slots and pages back; a second call is harmless."""
        if reservation.is_open:
            self._close(reservation)
            self._free_all(reservation.held)

    def _close(self, reservation: Reservation) -> None:
        if not reservation.is_open:
            raise IntegrityError("a reservation was committed or released before")
        reservation.is_open = False
        self._reserved.remove(reservation)
        self.pages.unpin(reservation.held)

    def _free_all(self, held: Iterable[SequenceKV]) -> None:
        for kv in held:
            self.pages.free(kv)

    def _find(self, request_id: str) -> RunningSequence | None:
        """The admitted sequence of a request, running or set aside."""
        everyone = (*self._sequences, *(aside.sequence for aside in self._aside))
        return next((s for s in everyone if s.request.request_id == request_id), None)

    def _supersede(self, request: GenerationRequest) -> None:
        running = self._find(request.request_id)
        if running is None:
            return
        if running.request.attempt >= request.attempt:
            raise came_late(request, running.request)
        self.cancel(request.request_id)

    def step(self) -> list[TokenBatch]:
        """Run one token of every running sequence; return the new answer tokens.

        Sequences that still replay, or are set aside, report nothing. Finished sequences have left
        when this returns.
        """
        self.make_room()
        return self.settle(self._feed()) if self._sequences else []

    def make_room(self) -> None:
        """Let sequences that were set aside come back, and give every running one its next place.

        Where there is no place, the youngest is set aside, and so on until the others have room.
        """
        self._bring_back()
        for sequence in sorted(self._sequences, key=lambda sequence: sequence.age):
            while sequence in self._sequences:
                is_alone = len(self._sequences) == 1
                if self.pages.make_room(sequence.kv, sequence.position, is_alone=is_alone):
                    break
                self._set_aside(youngest(self._sequences))

    def take_preempted(self) -> list[GenerationRequest]:
        """Return the requests without room even in host memory, and forget them.

        They have left the engine; what was sent of their answers is to be replayed elsewhere.
        """
        preempted, self._preempted = self._preempted, []
        return preempted

    def _bring_back(self) -> None:
        """Let sequences that were set aside come back, the oldest first, while there is room."""
        while self._aside and len(self._sequences) + self._num_reserved < self.max_num_seqs:
            oldest = min(self._aside, key=lambda aside: aside.sequence.age)
            is_alone = not (self._sequences or self._reserved)
            num_free = len(self._aside) + self.num_free
            kv = self.pages.bring_back(oldest.kv, num_free, is_alone=is_alone)
            if kv is None:
                return
            oldest.sequence.kv = kv
            self._aside.remove(oldest)
            self._sequences.append(oldest.sequence)

    @torch.inference_mode()
    def _set_aside(self, sequence: RunningSequence) -> None:
        """Move a sequence to host memory, or out of the engine if that is full."""
        self._sequences.remove(sequence)
        aside = AsideSequence(sequence, self.pages.put_aside(sequence.kv))
        sequence.kv = ()
        if sum(each.nbytes for each in self._aside) + aside.nbytes <= self._aside_bytes:
            self._aside.append(aside)
        else:
            self._preempted.append(sequence.request)

    def advance(self) -> torch.Tensor:
        """Feed the next token of every running sequence; return the logits ``(B, V)`` after it."""
        self.make_room()
        return self._feed()

    @torch.inference_mode()
    def _feed(self) -> torch.Tensor:
        tokens_B1E, positions_B1 = self.begin_tokens()
        masks = {} if self.blocks.is_plain else self.pages.masks()
        hidden_B1E = self.blocks.run(tokens_B1E, positions_B1, self.pages, masks)
        return self.stack.logits(hidden_B1E)[:, 0]

    def begin_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Claim an entry for the next token of every running sequence, after :meth:`make_room`.

        Returns:
            The tokens' embeddings ``(B, 1, E)``, and their positions ``(B, 1)``. Once they have run
            over :attr:`pages`, :meth:`settle` takes the logits after them.
        """
        # Rows in the order in which they lie in memory need no reordering to be read together.
        self._sequences.sort(key=lambda sequence: self.pages.place(sequence.kv))
        sequences = self._sequences
        tokens_B1 = torch.tensor([[sequence.pending.popleft()] for sequence in sequences])
        positions = [sequence.position for sequence in sequences]
        self.pages.begin_step([sequence.kv for sequence in sequences], positions)
        for sequence in sequences:
            sequence.position += 1
        return self.stack.embed(tokens_B1), torch.tensor(positions)[:, None]

    @torch.inference_mode()
    def settle(self, logits_BV: torch.Tensor) -> list[TokenBatch]:
        """Sample from the logits ``(B, V)`` of running sequences; those that finish leave."""
        due = [slot for slot, sequence in enumerate(self._sequences) if not sequence.pending]
        if len(due) < len(self._sequences):
            logits_BV = logits_BV[due]
        sequences = [self._sequences[slot] for slot in due]
        params = [sequence.request.sampling for sequence in sequences]
        indices = [sequence.answer.num_tokens for sequence in sequences]
        adjustments = [sequence.answer.adjustment for sequence in sequences]
        tokens, logprobs = sample(logits_BV, params, indices, adjustments) if due else ([], [])
        batches = [
            reported(sequence, token_id, logprob)
            for sequence, token_id, logprob in zip(sequences, tokens, logprobs, strict=True)
        ]
        for sequence, batch in zip(sequences, batches, strict=True):
            if batch.finish_reason:
                self._leave(sequence)
        return batches

    def cancel(self, request_id: str) -> bool:
        """End a request's sequence at once; return whether it had one."""
        for aside in self._aside:
            if aside.sequence.request.request_id == request_id:
                self._aside.remove(aside)
                return True
        sequence = self._find(request_id)
        if sequence is None:
            return False
        self._leave(sequence)
        return True

    def _leave(self, sequence: RunningSequence) -> None:
        self._sequences.remove(sequence)
        self.pages.free(sequence.kv)

    def check_integrity(self) -> None:
        """Raise :class:`IntegrityError` with the numbers if slots and page tables disagree."""
        admitted = [*self._sequences, *(aside.sequence for aside in self._aside)]
        names = {sequence.request.request_id for sequence in admitted}
        if self.num_free < 0 or len(names) < len(admitted):
            raise IntegrityError(
                f"{len(self._sequences)} running, {len(self._aside)} set aside and "
                f"{self._num_reserved} reserved of {self.max_num_seqs} slots, {len(names)} names"
            )
        reserved = [kv for reservation in self._reserved for kv in reservation.held]
        self.pages.check_integrity([*(s.kv for s in self._sequences), *reserved])
