"""The token stream from engines in this process: the twin of the one over Ray, without a network.

One worker thread owns both engines. Everything crosses to it through a queue of commands, and back
through ``call_soon_threadsafe``, so no engine is ever touched from two threads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.api.service import HealthReport, Pool, ReplicaHealth, ServiceDescription
from rayapp.engine.request import GenerationRequest, Timeline, TokenBatch
from rayapp.engine.stages import NODE, Stages
from rayapp.errors import DeadlineError, IntegrityError, OverloadedError, UnavailableError
from rayapp.kv.ledger import Ledger
from rayapp.plan import PruningPlan
from rayapp.vision.reader import ImageSupport

_IDLE_WAIT_S = 0.5


@dataclass(eq=False)
class _Ticket:
    """One request under way, and how to reach whoever waits for it."""

    request: GenerationRequest
    timeline: Timeline
    deliver: Callable[[TokenBatch | Exception], None]


@dataclass(frozen=True)
class Patience:
    """Limits of the wait for a slot.

    Args:
        max_waiting: Requests that may wait for a slot; further ones are refused.
        deadline_s: Longest time that an answer may go without a token.
    """

    max_waiting: int = 64
    deadline_s: float = 60.0


class InProcessService:
    """Implements :class:`rayapp.api.service.Service` with one prefill and one decode engine.

    Args:
        model: A dense model; both stages share its weights.
        tokenizer: The model's tokenizer.
        plan: The plan; None serves the dense model.
        model_name: The name by which clients call the model.
        max_model_len: Limit of prompt and answer tokens together; None takes the model's limit.
        max_num_seqs: Number of decode slots.
        patience: Number of requests that may wait, and their time limit.
        images: The reader of images, needed to take them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        plan: PruningPlan | None = None,
        *,
        model_name: str = "model",
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        patience: Patience = Patience(),
        images: ImageSupport | None = None,
    ) -> None:
        stages = Stages(model, tokenizer, plan, max_model_len=max_model_len, images=images)
        self._stages = stages
        self._decode = stages.decode_engine(max_num_seqs=max_num_seqs)
        self._patience = patience
        self._parameter_bytes = sum(p.nbytes for p in model.parameters())
        self._description = ServiceDescription(
            model_name=model_name,
            max_model_len=stages.max_model_len,
            vocab_size=stages.vocab_size,
            tokenizer=tokenizer,
            plan=stages.plan,
            images=stages.images.intake if stages.images else None,
        )
        self._ledger = Ledger()
        self._tickets: dict[str, _Ticket] = {}
        self._promised: set[str] = set()
        self._waiting: deque[_Ticket] = deque()
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rayapp-engines", daemon=True)
        self._thread.start()

    @property
    def description(self) -> ServiceDescription:
        """The served model, plan and limits."""
        return self._description

    async def generate(
        self, requests: Sequence[GenerationRequest], timelines: Sequence[Timeline] = ()
    ) -> AsyncGenerator[TokenBatch, None]:
        """Token batches of all answers; see ``rayapp.api.service.Service``."""
        for request in requests:
            self._description.check(request)
        self._check_open()
        inbox: asyncio.Queue[TokenBatch | Exception] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(item: TokenBatch | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        marks = timelines or [Timeline() for _ in requests]
        tickets = [_Ticket(*pair, deliver) for pair in zip(requests, marks, strict=True)]
        self._commands.put(lambda: self._enqueue(tickets))
        num_left = len(tickets)
        try:
            while num_left:
                batch = await self._next(inbox, requests[0])
                num_left -= batch.finish_reason is not None
                yield batch
        finally:
            self._commands.put(lambda: [self._drop(ticket) for ticket in tickets])

    def arriving(self, num_answers: int) -> AbstractContextManager[None]:
        """Hold nothing: tokenizing is quick here."""
        self._check_places(num_answers)
        return nullcontext()

    @contextmanager
    def admitted(self, prompts: Sequence[Sequence[GenerationRequest]]) -> Iterator[None]:
        """Promise places to the answers of all prompts; see ``rayapp.api.service.Service``."""
        self._check_open()
        names = {request.request_id for answers in prompts for request in answers}
        self._check_places(len(names))
        self._promised |= names
        try:
            yield
        finally:
            self._promised -= names

    def _check_places(self, num_new: int) -> None:
        num_open = len(self._tickets.keys() | self._promised)
        if num_open + num_new > self._patience.max_waiting + self._decode.max_num_seqs:
            raise OverloadedError(f"{num_open} requests are open; ask for fewer answers at once")

    async def health(self) -> HealthReport:
        """One replica of each stage."""
        ready = self._thread.is_alive() and not self._closed.is_set()
        if not ready:
            return HealthReport(ready=False, reason="the engines were closed")
        return HealthReport(
            ready=True, replicas=(self._replica("prefill"), self._replica("decode"))
        )

    async def counted_elsewhere(self):
        """Nothing: this is the only process."""
        return ()

    async def transfers(self) -> dict[str, Any]:
        """Return the ledger of the transfers."""
        return self._ledger.as_json()

    def check_idle(self) -> None:
        """Raise :class:`IntegrityError` with the numbers if resources are still in use."""
        held = (len(self._tickets), len(self._waiting), self._decode.num_running)
        if any(held):
            raise IntegrityError(f"{held} tickets, waiting requests and slots are still held")
        self._decode.check_integrity()

    def close(self) -> None:
        """End the worker thread; requests under way get an error."""
        self._closed.set()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise UnavailableError("the engines were closed; build a new service")

    async def _next(
        self, inbox: asyncio.Queue[TokenBatch | Exception], request: GenerationRequest
    ) -> TokenBatch:
        try:
            item = await asyncio.wait_for(inbox.get(), self._patience.deadline_s)
        except TimeoutError:
            raise DeadlineError(
                f"request {request.request_id}: no token within {self._patience.deadline_s} s; "
                "ask again later or for less"
            ) from None
        if isinstance(item, Exception):
            raise item
        return item

    def _replica(self, pool: Pool) -> ReplicaHealth:
        decoding = pool == "decode"
        return ReplicaHealth(
            pool=pool,
            replica_id=f"{NODE}-{pool}",
            node=NODE,
            parameter_bytes=self._parameter_bytes,
            kv_bytes=self._decode.kv_bytes if decoding else 0,
            plan_fingerprint=self._description.plan.fingerprint,
            weights_fingerprint=self._stages.signature.weights_fingerprint,
            dtype=str(self._decode.stack.dtype).removeprefix("torch."),
            num_running=self._decode.num_running if decoding else 0,
            num_waiting=0 if decoding else len(self._waiting),
            kv_usage=self._decode.usage if decoding else 0.0,
            image_cache=None if decoding else self._stages.prefill.image_cache,
        )

    # From here on: the worker thread.

    def _work(self) -> None:
        while not self._closed.is_set():
            self._obey()
            while self._waiting and self._decode.num_free:
                self._begin(self._waiting.popleft())
                self._obey(block=False)
            self._step()
        self._fail_all(UnavailableError("the engines were closed; ask again elsewhere"))

    def _step(self) -> None:
        """Run one token of every active sequence; if that fails, all of them fail, and we go on."""
        try:
            batches = self._decode.step()
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            self._fail_all(error)
            return
        for batch in batches:
            self._send(batch)

    def _fail_all(self, error: Exception) -> None:
        for ticket in list(self._tickets.values()):
            self._drop(ticket)
            ticket.deliver(error)

    def _obey(self, *, block: bool = True) -> None:
        """Run all commands; wait for one only where there is nothing else to do."""
        idle = block and not self._waiting and not self._decode.num_running
        try:
            self._commands.get(block=idle, timeout=_IDLE_WAIT_S)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _enqueue(self, tickets: Sequence[_Ticket]) -> None:
        places = self._patience.max_waiting + self._decode.num_free
        places -= len(self._promised - self._tickets.keys())
        is_promised = tickets[0].request.request_id in self._promised
        if not is_promised and len(self._waiting) + len(tickets) > places:
            tickets[0].deliver(
                OverloadedError(
                    f"{len(self._waiting)} requests are waiting, which is the limit; "
                    "try again later"
                )
            )
            return
        self._tickets.update({ticket.request.request_id: ticket for ticket in tickets})
        self._waiting.extend(tickets)

    def _drop(self, ticket: _Ticket) -> None:
        """Free the request's remaining resources; none are left if it has ended."""
        if self._tickets.pop(ticket.request.request_id, None) is None:
            return
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self._decode.cancel(ticket.request.request_id)

    def _begin(self, ticket: _Ticket) -> None:
        """Prefill, hand over, admit; an error of one request never ends the thread."""
        try:
            record = self._stages.start(ticket.request, self._decode, ticket.timeline, self._send)
            if record is not None:
                self._ledger.add(record)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            self._drop(ticket)
            ticket.deliver(error)

    def _send(self, batch: TokenBatch) -> None:
        ticket = self._tickets.get(batch.request_id)
        if ticket is None:
            return
        if batch.finish_reason:
            del self._tickets[batch.request_id]
        ticket.deliver(batch)
