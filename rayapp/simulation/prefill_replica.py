"""A simulated prefill replica: the service's own scheduler over steps of measured length."""

from __future__ import annotations

from collections.abc import Callable

from rayapp.engine.scheduler import Chunk, Scheduler
from rayapp.scaling.costs import prefill_work_s
from rayapp.scaling.reports import PrefillReport
from rayapp.simulation.clock import Clock
from rayapp.simulation.requests import Request
from rayapp.simulation.stage_costs import StageCosts


class PrefillReplica:
    """Runs prompts in chunks, and sends their KV over its own link, one after the other.

    Args:
        name: Name of the replica.
        costs: The measured costs.
        clock: The clock of the simulation.
        prefilled: Called with a request whose first token is there.
        sent: Called with a request whose KV has arrived.
    """

    def __init__(
        self,
        name: str,
        costs: StageCosts,
        clock: Clock,
        *,
        prefilled: Callable[[Request], None],
        sent: Callable[[Request], None],
    ) -> None:
        self.name = name
        self._costs, self._clock = costs, clock
        self._prefilled, self._sent = prefilled, sent
        self._scheduler = Scheduler(costs.max_num_batched_tokens)
        self._requests: dict[str, Request] = {}
        self._done: dict[str, int] = {}
        self._step_ends_s: float | None = None
        self._link_free_s = 0.0
        self._num_sending = 0
        self._num_arrived = 0
        self._num_tokens = 0
        self._arrived_s = self._arrived_square_s = 0.0
        self.num_sent, self.sent_s = 0, 0.0

    @property
    def num_present(self) -> int:
        """Number of prompts that wait or run."""
        return len(self._requests)

    @property
    def num_tokens(self) -> int:
        """Number of prompt tokens that no step has taken yet."""
        return self._scheduler.num_tokens

    @property
    def is_idle(self) -> bool:
        """True if nothing waits, runs or is sent."""
        return not self._requests and not self._num_sending

    def work_of(self, num_tokens: int) -> float:
        """Seconds of a prompt of ``num_tokens`` tokens."""
        chunk = self._costs.max_num_batched_tokens
        return self._costs.prefill.prompt_s(num_tokens, chunk=chunk)

    def add(self, request: Request) -> None:
        """Take a prompt."""
        num_tokens = request.arrival.num_prompt
        work_s = self.work_of(num_tokens)
        self._num_arrived += 1
        self._num_tokens += num_tokens
        self._arrived_s += work_s
        self._arrived_square_s += work_s**2
        self._requests[request.name], self._done[request.name] = request, 0
        self._scheduler.add(request.name, num_tokens)
        if self._step_ends_s is None:
            self._step()

    def report(self) -> PrefillReport:
        """The report that the service's replica would make."""
        prompts = ((self._scheduler.num_left(name), self._done[name]) for name in self._requests)
        running_s = max(0.0, (self._step_ends_s or 0.0) - self._clock.now_s)
        chunk = self._costs.max_num_batched_tokens
        return PrefillReport(
            queued_s=running_s + prefill_work_s(self._costs.prefill, prompts, chunk=chunk),
            arrived=self._num_arrived,
            arrived_s=self._arrived_s,
            arrived_square_s=self._arrived_square_s,
            token_s=self._arrived_s / self._num_tokens if self._num_tokens else 0.0,
            start_s=self._costs.cold_start_s,
        )

    def _step(self) -> None:
        step = self._scheduler.next_step()
        if not step:
            self._step_ends_s = None
            return
        cost = self._costs.prefill
        seconds = cost.step_s
        for chunk in step.chunks:
            seconds += cost.chunk_s(chunk.num_tokens, self._done[chunk.name])
            self._done[chunk.name] += chunk.num_tokens
        self._step_ends_s = self._clock.now_s + seconds
        self._clock.at(self._step_ends_s, lambda: self._end(step.chunks))

    def _end(self, chunks: tuple[Chunk, ...]) -> None:
        for chunk in chunks:
            if chunk.is_last:
                request = self._requests.pop(chunk.name)
                del self._done[chunk.name]
                request.first_s = self._clock.now_s + self._costs.overhead_s
                self._prefilled(request)
                if request.arrival.num_answer > 1:
                    self._send(request)
        self._step()

    def _send(self, request: Request) -> None:
        num_bytes = request.arrival.num_prompt * self._costs.prompt_kv_bytes
        seconds = self._costs.link.seconds(num_bytes)
        self._link_free_s = max(self._link_free_s, self._clock.now_s) + seconds
        self._num_sending += 1
        self.num_sent += 1
        self.sent_s += seconds
        self._clock.at(self._link_free_s, lambda: self._arrived(request))

    def _arrived(self, request: Request) -> None:
        self._num_sending -= 1
        self._sent(request)
