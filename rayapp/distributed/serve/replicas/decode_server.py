"""A decode replica copies KV into slots and delivers the tokens of all of them.

``admit`` is unary and ends once the message is no longer needed, because a reference passed to a
streaming call stays pinned until that stream ends. ``follow`` is unary too: it lasts as long as
the answers, so that the replica counts as busy with them, and is waited for when it is drained.
Their tokens leave by ``deliver``, the one streaming call of an ingress, which outlives its
requests. Between ``admit`` and ``follow`` a lease reserves the slots. Before the prompt is
prefilled, ``book`` promises that there will be some.

KV that comes in parts is preceded by ``reserve``, and all parts but the last by ``load``; both are
unary (:mod:`rayapp.distributed.serve.replicas.admission.admissions`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from rayapp.api.service import Pool, ReplicaHealth
from rayapp.distributed.serve.messages import (
    ANY,
    Address,
    Admission,
    Copied,
    Handover,
    Place,
    Refusal,
    Seat,
    Seating,
    TokenRow,
    Versions,
    check_address,
    version_conflict,
)
from rayapp.distributed.serve.replicas.admission.admissions import Admissions
from rayapp.distributed.serve.replicas.admission.bookings import Bookings
from rayapp.distributed.serve.replicas.admission.forecast import Forecast
from rayapp.distributed.serve.replicas.admission.leases import Lease, Leases
from rayapp.distributed.serve.replicas.admission.placing import Placing
from rayapp.distributed.serve.replicas.admission.slots import Slots
from rayapp.distributed.serve.replicas.engine_loop import (
    EngineLoop,
    failure_of,
    is_out_of_memory,
)
from rayapp.distributed.serve.replicas.serial_thread import SerialThread
from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import GenerationRequest, PromptRequests, TokenBatch
from rayapp.engine.sequences.memory import KVMemory
from rayapp.errors import (
    IntegrityError,
    PreemptedError,
    UnavailableError,
)
from rayapp.kv.pieces import Arrival
from rayapp.models.stack import BlockStack
from rayapp.scaling.meters import DecodeMeter
from rayapp.scaling.reports import DecodeReport
from rayapp.scaling.settings import Targets
from rayapp.scaling.work import decode_standing

logger = logging.getLogger(__name__)


class DecodeServer:
    """The server of a decode replica, which runs up to ``max_num_seqs`` sequences at once.

    Args:
        stage: The decode stage.
        place: The replica and the node of this server.
        loop: The loop that steps the engine, shared if both stages live in one replica.
        fetch: The function that gets a message from its handle.
        max_num_seqs: Number of slots.
        deadlines: The deadlines of leases, answers and steps.
        memory: The memory for KV.
        tpot_s: Seconds per token that its answers are to meet, by which its work is counted.
    """

    def __init__(
        self,
        stage: StageModel,
        place: Place,
        loop: EngineLoop,
        *,
        fetch: Callable[..., Awaitable[Arrival]],
        max_num_seqs: int,
        deadlines: Deadlines,
        memory: KVMemory = KVMemory(),  # noqa: B008 - frozen
        tpot_s: float = Targets().tpot_s,
    ) -> None:
        self._stage = stage
        self._tpot_s = tpot_s
        self._meter = DecodeMeter()
        self._place = place
        self._deadlines = deadlines
        self._versions = stage.versions
        self._loop = loop
        self._thread = loop.thread
        self._unpacking = SerialThread("unpacking")
        self._slots = Slots(max_num_seqs)
        self._leases = Leases(self._let_all_go)
        self.engine = DecodeEngine(
            BlockStack(stage.loaded.model, stage.plan, "decode"),
            stage.plan,
            max_num_seqs=max_num_seqs,
            max_model_len=stage.max_model_len,
            eos_token_ids=stage.loaded.eos_token_ids,
            tokenizer=stage.loaded.tokenizer,
            memory=memory,
        )
        self._placing = Placing(self.engine, loop, self._unpacking, self._slots)
        self._forecast = Forecast(self.engine, self._meter, self._slots, self._leases)
        self._bookings = Bookings(self._slots, self._forecast.room)
        self._admissions = Admissions(
            place,
            stage.versions,
            fetch=fetch,
            bookings=self._bookings,
            leases=self._leases,
            placing=self._placing,
            let_go=self._let_go,
            deadlines=deadlines,
        )
        loop.attach(sequences=self, check_idle=self.engine.check_integrity)
        logger.info(
            "pages: %d bytes hold %d tokens of %d sequences",
            *(self.engine.kv_bytes, self.engine.num_kv_tokens, max_num_seqs),
        )

    async def book(
        self, prompt: PromptRequests, versions: Versions, wait_s: float, address: Address = ANY
    ) -> Seat | Refusal:
        """Promise room for answers to a prompt before it is prefilled.

        A replica of another version does nothing and answers with a :class:`Refusal`. Errors are
        those of :meth:`Admissions.book`.

        Args:
            prompt: The requests for all answers, with their attempt.
            versions: The plan, weights and type that the caller wants.
            wait_s: Longest wait for room, seconds.
            address: The address of the replica that the call is for.
        """
        check_address(self._place, address)
        refusal = version_conflict(self._place, self._versions, versions)
        if refusal is not None:
            return refusal
        pages = self._forecast.pages_of(prompt.prompt)
        return await self._admissions.book(prompt, pages, address.reader, wait_s)

    async def reserve(self, seating: Seating, address: Address = ANY) -> Seat | Refusal:
        """Reserve slots and pages for KV that comes in parts; :meth:`admit` follows the last one.

        A replica of another version does nothing and answers with a :class:`Refusal`. Errors are
        those of :meth:`Admissions.reserve`.
        """
        check_address(self._place, address)
        refusal = version_conflict(self._place, self._versions, seating.versions)
        if refusal is not None:
            return refusal
        self._meter.arrive(len(seating.prompt.requests))
        return await self._admissions.reserve(seating, address.reader)

    async def load(
        self, name: str, attempt: int, part: int, handles: Sequence[object], address: Address = ANY
    ) -> Copied:
        """Copy one part of the KV, not the last, and return once the message is not needed.

        Errors are those of :meth:`Admissions.load`.

        Args:
            name: The name of the prompt's requests.
            attempt: Their attempt.
            part: Number of the part.
            handles: The message's handle, in a list so that Ray does not resolve it.
            address: The address of the replica that the call is for.
        """
        check_address(self._place, address)
        return await self._admissions.load(name, attempt, part, handles[0])

    async def admit(
        self, handover: Handover, handles: Sequence[object], address: Address = ANY
    ) -> Admission | Refusal:
        """Copy KV, or its last part, into slots; return once the message is no longer needed.

        A replica of another version does nothing and answers with a :class:`Refusal`. Errors are
        those of :meth:`Admissions.admit`.

        Args:
            handover: The requests and the known parts of their answers.
            handles: The message's handle, in a list so that Ray does not resolve it.
            address: The address of the replica that the call is for.
        """
        check_address(self._place, address)
        refusal = version_conflict(self._place, self._versions, handover.versions)
        if refusal is not None:
            return refusal
        if not handover.part:
            self._meter.arrive(len(handover.prompt.requests))
        return await self._admissions.admit(handover, handles[0], address.reader)

    async def follow(self, name: str, attempt: int, address: Address = ANY) -> None:
        """Return once all answers have ended and left; the lease ends with this call.

        Raises:
            MisdirectedError: The call was for a replica that has gone.
            UnavailableError: The attempt holds no slot here.
            DeadlineError: The lease ended.
        """
        check_address(self._place, address)
        lease = self._leases.find(name, attempt)
        self._leases.read(lease)
        try:
            await lease.all_read()
        finally:
            self._leases.end(lease)

    async def deliver(self, address: Address = ANY) -> AsyncGenerator[list[TokenRow], None]:
        """Generate the tokens of all answers for the calling ingress, an item per step.

        The stream ends after the last of them, and now and then between two items; the caller asks
        again while it expects tokens.
        """
        check_address(self._place, address)
        async with aclosing(self._leases.outboxes.of(address.reader).items()) as items:
            async for item in items:
                yield item

    async def cancel(self, name: str, attempt: int, address: Address = ANY) -> None:
        """End a booking or lease, in whatever phase the attempt is, even before it comes here."""
        self._leases.cancel(name, attempt)
        self._bookings.cancel(name, attempt)

    def check_not_cancelled(self, prompt: PromptRequests) -> None:
        """Raise :class:`UnavailableError` if this attempt has been cancelled."""
        self._leases.check_not_cancelled(prompt)

    @property
    def num_waiting(self) -> int:
        """Number of answers that wait for a slot, and of prompts that wait for a booking."""
        return self._num_seatless + self._bookings.num_waiting

    @property
    def _num_seatless(self) -> int:
        """Number of answers whose KV is here, and that have no slot."""
        without = sum(len(lease.waiting) for lease in self._leases.all())
        return self._admissions.num_applying + without

    @property
    def num_running(self) -> int:
        """Number of sequences that compute a token in the next step."""
        return self.engine.num_running

    async def run_tokens(self) -> None:
        """Compute a token of every running sequence and deliver it; an error ends them all."""
        num_aside = self.engine.num_aside
        try:
            batches = await self._loop.run(self._step)
        except Exception as error:  # noqa: BLE001 - raised to those who wait for the answers
            await self.fail_step(error)
            return
        self.settle(batches, num_aside)

    async def fail_step(self, error: Exception) -> None:
        """End all answers, because a step that had them raised."""
        logger.error("a decode step failed", exc_info=error)
        if is_out_of_memory(error):
            self._slots.keep_to(self.engine.num_running - 1)
        await self._fail_all(UnavailableError(str(failure_of(error, "decode"))))

    def settle(self, batches: Sequence[TokenBatch], num_aside: int) -> None:
        """Deliver the tokens of a step.

        Args:
            batches: The tokens.
            num_aside: Number of sequences that were set aside before the step.
        """
        for batch in batches:
            self._deliver(batch)
        for request in self.engine.take_preempted():
            self._hand_back(request)
        if self.engine.num_aside < num_aside:
            self._slots.tell()

    @property
    def expected_step_s(self) -> float:
        """Seconds that a step of the running sequences alone is expected to take."""
        running = self.engine.running
        return self._meter.cost.seconds(len(running), sum(one.position for one in running))

    def _step(self) -> list[TokenBatch]:
        """Run a step on the engine's thread, and learn what it cost."""
        began_s = time.perf_counter()
        batches = self.engine.step()
        seconds = time.perf_counter() - began_s
        running = self.engine.running
        entries = sum(sequence.position for sequence in running)
        if running:
            self._meter.observe(len(running), entries, seconds)
        return batches

    def _hand_back(self, request: GenerationRequest) -> None:
        """Tell the reader of an answer that it found no room in pages or in host memory.

        The lease ends when that is read, or when nobody reads it; its slots are free at once.
        """
        lease = self._leases.of_answer(request.request_id, request.attempt)
        if lease is not None:
            lease.fail(
                PreemptedError(
                    f"request {request.request_id} gave its pages of KV to older requests; it goes "
                    "on elsewhere, or raise kv_memory"
                )
            )
            self._let_all_go(lease)

    def _deliver(self, batch: TokenBatch) -> None:
        lease = self._leases.of_answer(batch.request_id, batch.attempt)
        if lease is None:
            return  # It was cancelled during the step.
        lease.put(batch)
        if batch.finish_reason:
            self._meter.end(batch.first_index + len(batch.token_ids))
            self._let_go(lease, batch.request_id)

    async def _fail_all(self, error: Exception) -> None:
        """End all leases, and return when the engine has freed what they held."""
        for lease in self._leases.all():
            lease.fail(error)
            self._leases.end(lease)
        await self._thread.run(lambda: None)

    def _let_all_go(self, lease: Lease) -> None:
        """Free all slots of a lease that ends, and wait for no more."""
        if lease.seating is not None:
            lease.seating.cancel()
        if lease.incoming is not None:
            self._placing.release(lease.incoming)
        for request_id in tuple(lease.seated):
            self._let_go(lease, request_id)

    def _let_go(self, lease: Lease, request_id: str) -> None:
        """Free an answer's slot, in the engine first; a second call is harmless."""
        if request_id in lease.seated:
            lease.seated.discard(request_id)
            freeing = self._placing.free(request_id, lease.prompt.attempt)
            freeing.add_done_callback(lambda _: self._slots.give())

    async def describe(self) -> ReplicaHealth:
        """Describe this replica for ``/health``."""
        return self.health("decode")

    def health(self, pool: Pool) -> ReplicaHealth:
        """Describe this replica as a part of ``pool``."""
        return self._stage.health(
            pool,
            self._place,
            kv_bytes=self.engine.kv_bytes,
            kv_tokens=self.engine.num_kv_tokens,
            num_running=self._slots.num_held,
            num_waiting=self.num_waiting,
            kv_usage=self.engine.usage,
        )

    @property
    def report(self) -> DecodeReport:
        """The work of this replica, as routing and scaling count it."""
        return self._meter.report(
            rows=self._slots.num_held,
            waiting=self._num_seatless + self._bookings.num_short,
            entries=self.engine.usage * self.engine.num_kv_tokens,
            max_rows=self._slots.num_slots,
            max_entries=self.engine.num_kv_tokens,
            start_s=self._stage.load_s,
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers by which :class:`rayapp.distributed.serve.autoscaling.ServicePolicy` decides."""
        return self.report.numbers()

    def record_routing_stats(self) -> dict[str, float]:
        """Numbers by which the router chooses between replicas."""
        standing = decode_standing(self.report, self._tpot_s, time.time(), self._loop.num_failed)
        return standing.numbers()

    async def check_health(self) -> None:
        """Raise :class:`UnavailableError` if a call hangs; Serve asks this every few seconds."""
        self._loop.check_alive(self._deadlines.step_s)
        self._unpacking.check_alive(self._deadlines.step_s)

    async def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        await self._thread.run(self.engine.check_integrity)
        counts = {
            "bookings": len(self._bookings),
            "leases": len(self._leases),
            "slots": self._slots.num_held,
            "waiting": self.num_waiting,
            "running": self.engine.num_running,
        }
        if min(counts.values()) < 0 or self._slots.num_held > self._slots.num_slots:
            raise IntegrityError(f"decode holds {counts} with {self._slots.num_slots} slots")
        return counts
