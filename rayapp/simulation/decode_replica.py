"""A simulated decode replica: sequences that step together, in slots and pages.

Short prompts that it prefills itself run between two steps.

Between two changes of the batch all steps are computed at once: a step of ``R`` rows takes a fixed
time and a time per entry, and every step adds ``R`` entries, so the end of any number of steps is a
closed form.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayapp.scaling.reports import DecodeReport
from rayapp.simulation.clock import Clock
from rayapp.simulation.requests import Request
from rayapp.simulation.stage_costs import StageCosts

_USUAL_ANSWER = 128.0
_FADE = 0.98
_TICK_S = 1e-9


@dataclass
class TokenCount:
    """Number of tokens that the decode replicas of a simulation have computed together."""

    num_tokens: int = 0


class DecodeReplica:
    """Runs up to ``max_num_seqs`` sequences, a token of every one per step.

    Sequences that find no slot or no pages wait in the order in which they came. Where pages run
    out, the youngest sequence waits again with what it has.

    Args:
        name: Name of the replica.
        costs: The measured costs.
        clock: The clock of the simulation.
        computed: Counts the tokens that are computed.
        finished: Called with a request whose last token is there.
        prefilled: Called with a request whose first token is made here.
    """

    def __init__(
        self,
        name: str,
        costs: StageCosts,
        clock: Clock,
        computed: TokenCount,
        *,
        finished: Callable[[Request], None],
        prefilled: Callable[[Request], None],
    ) -> None:
        self.name = name
        self._costs, self._clock, self._finished = costs, clock, finished
        self._computed, self._prefilled = computed, prefilled
        self._prompts: list[Request] = []
        self._num_prefilling = 0
        self._waiting: deque[Request] = deque()
        self._rows: list[tuple[int, int, Request]] = []  # A heap by the step of their last token.
        self._joined: dict[Request, int] = {}
        self._numbers = itertools.count()
        self._entries = 0
        self._steps = 0
        self._boundary_s = 0.0
        self._is_called = 0
        self._num_arrived = 0
        self._answer_tokens = _USUAL_ANSWER

    @property
    def num_present(self) -> int:
        """Number of sequences that run or wait."""
        return len(self._rows) + len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """True if nothing runs or waits."""
        return not (self.num_present or self._prompts or self._num_prefilling)

    @property
    def prompts_s(self) -> float:
        """Seconds of the prompts that are to be prefilled here."""
        return sum(self.prompt_s(one.arrival.num_prompt) for one in self._prompts)

    def prompt_s(self, num_tokens: int) -> float:
        """Seconds of a prompt of ``num_tokens`` tokens, in a step of its own."""
        return self._costs.prefill.step_s + self._costs.prefill.chunk_s(num_tokens)

    def add_prompt(self, request: Request) -> None:
        """Take a prompt, which is prefilled once the step that runs has ended."""
        self._prompts.append(request)
        now_s = self._clock.now_s
        self._call_at(self._ends_s(self._num_done(now_s) + 1) if self._rows else now_s)

    @property
    def usage(self) -> float:
        """Share of slots or of entries in use, whichever is larger."""
        rows, entries = len(self._rows), self._entries_now()
        return max(rows / self._costs.max_num_seqs, entries / self._costs.max_entries)

    def add(self, request: Request) -> None:
        """Take a sequence whose KV has arrived."""
        self._take(request)
        now_s = self._clock.now_s
        # Whoever comes at the same moment joins the same step.
        self._call_at(self._ends_s(self._num_done(now_s) + 1) if self._rows else now_s)

    def _take(self, request: Request) -> None:
        self._num_arrived += 1
        request.num_left = request.arrival.num_answer - 1
        request.entries = math.ceil(request.arrival.num_prompt * self._costs.kept_share)
        self._waiting.append(request)

    def report(self) -> DecodeReport:
        """The report that the service's replica would make."""
        cost = self._costs.decode
        return DecodeReport(
            rows=len(self._rows),
            waiting=len(self._waiting),
            entries=self._entries_now(),
            max_rows=self._costs.max_num_seqs,
            max_entries=self._costs.max_entries,
            step_s=cost.step_s,
            row_s=cost.row_s,
            entry_s=cost.entry_s,
            answer_tokens=self._answer_tokens,
            arrived=self._num_arrived,
            start_s=self._costs.cold_start_s,
        )

    def _entries_now(self) -> int:
        return self._entries + len(self._rows) * self._num_done(self._clock.now_s)

    def _ends_s(self, num_steps: int) -> float:
        """When ``num_steps`` steps after the last change of the batch end."""
        rows = len(self._rows)
        cost = self._costs.decode
        first_s = cost.seconds(rows, self._entries)
        growth_s = rows * cost.entry_s * num_steps * (num_steps - 1) / 2
        return self._boundary_s + num_steps * first_s + growth_s

    def _num_done(self, now_s: float) -> int:
        """Number of steps since the last change of the batch that have ended by now."""
        rows = len(self._rows)
        if not rows or now_s <= self._boundary_s:
            return 0
        cost = self._costs.decode
        first_s, half_s = cost.seconds(rows, self._entries), rows * cost.entry_s / 2
        passed_s, slope_s = now_s - self._boundary_s, first_s - half_s
        root_s = math.sqrt(slope_s**2 + 4 * half_s * passed_s)
        done = int(2 * passed_s / (slope_s + root_s)) if slope_s + root_s else 0
        # The closed form is exact but for the last bits, which decide at a boundary.
        return done + (self._ends_s(done + 1) <= now_s + _TICK_S)

    def _call_at(self, moment_s: float) -> None:
        """Look at the batch again at a moment; an earlier appointment is void."""
        self._is_called += 1
        number = self._is_called
        self._clock.at(moment_s, lambda: self._change() if number == self._is_called else None)

    def _change(self) -> None:
        """Bring the batch to the present step: some end, some join, some must wait again."""
        done = self._num_done(self._clock.now_s)
        self._boundary_s = self._ends_s(done) if done else self._boundary_s
        self._steps += done
        self._entries += done * len(self._rows)
        self._computed.num_tokens += done * len(self._rows)
        self._end_rows()
        self._run_prompts()
        self._join_rows()
        if self._rows:
            self._call_at(self._ends_s(self._steps_to_go()))

    def _end_rows(self) -> None:
        while self._rows and self._rows[0][0] <= self._steps:
            request = heapq.heappop(self._rows)[2]
            self._leave(request)
            # Whatever an answer takes beside its stages delays its last token as it did its first.
            request.finished_s = self._boundary_s + self._costs.overhead_s
            length = request.arrival.num_answer
            self._answer_tokens = _FADE * self._answer_tokens + (1 - _FADE) * length
            self._finished(request)

    def _leave(self, request: Request) -> None:
        """Give the pages of a sequence back, and note what it has computed."""
        passed = self._steps - self._joined.pop(request)
        request.num_left -= passed
        request.entries += passed
        self._entries -= request.entries

    def _run_prompts(self) -> None:
        """Prefill the prompts that came; the sequences go on when all of them are done."""
        if not self._prompts:
            return
        came, self._prompts = self._prompts, []
        num_tokens = [request.arrival.num_prompt for request in came]
        work_s = self._costs.prefill.step_s + sum(map(self._costs.prefill.chunk_s, num_tokens))
        self._boundary_s = max(self._boundary_s, self._clock.now_s) + work_s
        self._num_prefilling += len(came)
        self._clock.at(self._boundary_s, lambda: self._begin(came))

    def _begin(self, prefilled: Sequence[Request]) -> None:
        """Have the answers to prompts that were prefilled here take part in the next step."""
        self._num_prefilling -= len(prefilled)
        for request in prefilled:
            request.first_s = self._clock.now_s + self._costs.overhead_s
            self._prefilled(request)
            if request.arrival.num_answer > 1:
                self._take(request)
        self._call_at(self._clock.now_s)

    def _join_rows(self) -> None:
        if not self._rows:
            self._boundary_s = max(self._boundary_s, self._clock.now_s)
        while len(self._rows) > 1 and self._entries + len(self._rows) > (self._costs.max_entries):
            self._put_aside()
        while self._waiting and len(self._rows) < self._costs.max_num_seqs:
            request = self._waiting[0]
            room = self._costs.max_entries - self._entries - len(self._rows)
            if self._rows and request.entries + 1 > room:
                return
            self._waiting.popleft()
            self._joined[request] = self._steps
            self._entries += request.entries
            row = (self._steps + request.num_left, next(self._numbers), request)
            heapq.heappush(self._rows, row)

    def _put_aside(self) -> None:
        youngest = max(self._rows, key=lambda row: row[1])
        self._rows.remove(youngest)
        heapq.heapify(self._rows)
        self._leave(youngest[2])
        self._waiting.appendleft(youngest[2])

    def _steps_to_go(self) -> int:
        """Number of steps until a sequence ends or pages run out."""
        to_end = self._rows[0][0] - self._steps
        room = (self._costs.max_entries - self._entries) // len(self._rows)
        return max(1, min(to_end, room) if len(self._rows) > 1 else to_end)
