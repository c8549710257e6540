"""A decode replica copies KV into slots and streams the tokens of all of them.

``admit`` is unary and ends once the KV is in the slab, because a reference passed to a streaming
call stays pinned until that stream ends. ``tokens`` never carries a reference. Between the two
calls a lease reserves the slot.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from rayapp.api.service import Pool, ReplicaHealth
from rayapp.distributed.serve.messages import (
    ANY,
    Address,
    Admission,
    Handover,
    Place,
    Refusal,
    check_address,
    version_conflict,
)
from rayapp.distributed.serve.replicas.leases import Lease, Leases
from rayapp.distributed.serve.replicas.stage import SerialThread, StageModel
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.errors import DeadlineError, IntegrityError, RayappError, UnavailableError
from rayapp.kv.segment import KVSegment
from rayapp.kv.wire import Message, MessageSizes, message_sizes, unpack
from rayapp.models.stack import BlockStack

logger = logging.getLogger(__name__)


class DecodeServer:
    """The server of a decode replica, which runs up to ``max_num_seqs`` sequences at once.

    Args:
        stage: The decode stage.
        place: The replica and the node of this server.
        fetch: The function that gets a message from its handle.
        max_num_seqs: Number of slots.
        deadlines: The deadlines of leases and answers.
        thread: The engine thread, shared if both stages live in one replica.
    """

    def __init__(
        self,
        stage: StageModel,
        place: Place,
        *,
        fetch: Callable[..., Awaitable[Message]],
        max_num_seqs: int,
        deadlines: Deadlines,
        thread: SerialThread | None = None,
    ) -> None:
        self._stage = stage
        self._place = place
        self._fetch = fetch
        self._deadlines = deadlines
        self._versions = stage.versions
        self._thread = thread or SerialThread("engine")
        self._unpacking = SerialThread("unpacking")
        self._max_num_seqs = max_num_seqs
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._num_waiting = 0
        self._num_slots_held = 0
        self._leases = Leases(self._let_go)
        self._attempts: dict[str, int] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._engine = DecodeEngine(
            BlockStack(stage.loaded.model, stage.plan, "decode"),
            stage.plan,
            max_num_seqs=max_num_seqs,
            max_model_len=stage.max_model_len,
            eos_token_ids=stage.loaded.eos_token_ids,
            tokenizer=stage.loaded.tokenizer,
        )
        logger.info("slab: %d bytes for %d sequences", self._engine.kv_bytes, max_num_seqs)

    async def admit(
        self, handover: Handover, handles: Sequence[object], address: Address = ANY
    ) -> Admission | Refusal:
        """Copy KV into a slot; return once the message is no longer needed.

        A replica of another version does nothing and answers with a :class:`Refusal`.

        Args:
            handover: The request and the known part of its answer.
            handles: The message's handle, in a list so that Ray does not resolve it.
            address: The address of the replica that the call is for.

        Raises:
            DeadlineError: No slot was free in time.
            WireError: The message is not this request's KV, or is damaged.
            TransferError: The message is lost.
            UnavailableError: The attempt was cancelled, or replaced by a later one.
        """
        check_address(self._place, address)
        refusal = version_conflict(self._place, self._versions, handover.versions)
        if refusal is not None:
            return refusal
        began_s = time.monotonic()
        lease = await self._take_lease(handover)
        wait_s = time.monotonic() - began_s
        try:
            sizes, fetch_s = await self._load(handover, handles[0], lease)
        except BaseException:
            self._leases.end(lease)
            raise
        self._leases.expect_reader(lease, self._deadlines.lease_s)
        self._start_stepping()
        return Admission(place=self._place, sizes=sizes, wait_s=wait_s, fetch_s=fetch_s)

    async def tokens(
        self, request_id: str, attempt: int, address: Address = ANY
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the answer's tokens in batches; the lease ends with the stream.

        Raises:
            MisdirectedError: The call was for a replica that has gone.
            UnavailableError: The attempt holds no slot here.
            DeadlineError: The lease ended.
        """
        check_address(self._place, address)
        lease = self._leases.find(request_id, attempt)
        self._leases.read(lease)
        try:
            while True:
                batch = await lease.take()
                yield batch
                if batch.finish_reason:
                    return
        finally:
            self._leases.end(lease)

    async def cancel(self, request_id: str, attempt: int, address: Address = ANY) -> None:
        """End a lease, in whatever phase the attempt is, even before it has come here."""
        self._leases.cancel(request_id, attempt)

    async def _take_lease(self, handover: Handover) -> Lease:
        """Wait for a slot; an older attempt of the request loses its slot first."""
        self._leases.check_not_cancelled(handover.request)
        older = self._leases.newest(handover.request.request_id)
        if older is not None and older.request.attempt < handover.request.attempt:
            older.fail(UnavailableError(f"{older.key} was replaced by a later attempt"))
            self._leases.end(older)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(handover.wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineError(
                f"no decode slot within {handover.wait_s:.1f} s; try again later, raise "
                "max_num_seqs or add replicas"
            ) from None
        finally:
            self._num_waiting -= 1
        self._num_slots_held += 1
        try:
            return self._leases.grant(handover.request, total_s=self._deadlines.decode_s)
        except BaseException:
            self._give_slot()
            raise

    def _give_slot(self) -> None:
        self._num_slots_held -= 1
        self._slots.release()

    async def _load(
        self, handover: Handover, handle: object, lease: Lease
    ) -> tuple[MessageSizes, float]:
        """Fetch, check and copy a message; no part of it is referenced when this returns.

        A lease that ends before the copy begins prevents it. A lease that ends later frees the slot
        on the engine's thread, and so after the copy.
        """
        began_s = time.monotonic()
        message = await self._fetch(handle)
        fetch_s = time.monotonic() - began_s
        lease.check()
        request = handover.request
        envelope = self._versions.envelope(request.request_id, request.attempt)
        segment = await self._unpacking.finish(unpack, message, envelope)
        lease.check()
        await self._thread.finish(self._copy_in, handover, segment)
        lease.check()
        return message_sizes(message), fetch_s

    def _copy_in(self, handover: Handover, segment: KVSegment) -> None:
        """Copy the KV into a slot, on the engine thread."""
        request = handover.request
        self._engine.admit(request, segment, handover.first, handover.replay)
        self._attempts[request.request_id] = request.attempt

    def _copy_out(self, request: GenerationRequest) -> None:
        """Free the slot of this attempt, not of a later one, on the engine thread."""
        if self._attempts.get(request.request_id) == request.attempt:
            del self._attempts[request.request_id]
            self._engine.cancel(request.request_id)

    def _start_stepping(self) -> None:
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._step_while_busy())

    async def _step_while_busy(self) -> None:
        """Run engine steps one after the other while any sequence runs."""
        while self._engine.num_running:
            try:
                batches = await self._thread.run(self._engine.step)
            except Exception as error:
                logger.exception("a decode step failed")
                self._fail_all(error)
                return
            for batch in batches:
                self._deliver(batch)

    def _deliver(self, batch: TokenBatch) -> None:
        lease = self._leases.get(batch.request_id, batch.attempt)
        if lease is None:
            return  # It was cancelled during the step.
        lease.put(batch)
        if batch.finish_reason:
            self._let_go(lease)

    def _fail_all(self, error: Exception) -> None:
        reason = error if isinstance(error, RayappError) else UnavailableError(str(error))
        for lease in self._leases.all():
            lease.fail(reason)
            self._leases.end(lease)

    def _let_go(self, lease: Lease) -> None:
        """Free a lease's slot, in the engine first; a second call is harmless."""
        if lease.holds_slot:
            lease.holds_slot = False
            self._thread.submit(self._copy_out, lease.request).add_done_callback(
                lambda _: self._give_slot()
            )

    async def describe(self) -> ReplicaHealth:
        """Describe this replica for ``/health``."""
        return self.health("decode")

    def health(self, pool: Pool) -> ReplicaHealth:
        """Describe this replica as a part of ``pool``."""
        return self._stage.health(
            pool,
            self._place,
            kv_bytes=self._engine.kv_bytes,
            num_running=self._num_slots_held,
            num_waiting=self._num_waiting,
            kv_usage=self._engine.usage,
        )

    @property
    def usage(self) -> float:
        """The larger of the shares of slots and of entries in use."""
        return max(self._num_slots_held / self._max_num_seqs, self._engine.usage)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Metrics by which :class:`rayapp.distributed.serve.autoscaling.DecodePolicy` decides."""
        return {"usage": self.usage, "waiting": self._num_waiting / self._max_num_seqs}

    async def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle; raise if they disagree."""
        await self._thread.run(self._engine.check_integrity)
        counts = {
            "leases": len(self._leases),
            "slots": self._num_slots_held,
            "waiting": self._num_waiting,
            "running": self._engine.num_running,
        }
        if min(counts.values()) < 0 or self._num_slots_held > self._max_num_seqs:
            raise IntegrityError(f"decode holds {counts} with {self._max_num_seqs} slots")
        return counts
