"""The room that a decode replica's answers will take and give back, by its own measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rayapp.distributed.serve.replicas.admission.leases import Leases
from rayapp.distributed.serve.replicas.admission.slots import Slots
from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import GenerationRequest
from rayapp.kv.segment import KVExtent
from rayapp.kv.select import num_prefilled
from rayapp.scaling.meters import DecodeMeter


@dataclass(frozen=True)
class Room:
    """The room of a replica, taken and to be given back.

    Args:
        answers: Answers that hold slots.
        pages: Pages that they will come to.
        most_answers: Number of slots.
        most_pages: Number of pages.
        ending_per_s: Answers that end per second.
    """

    answers: int
    pages: float
    most_answers: int
    most_pages: int
    ending_per_s: float

    def holds(self, num_booked: int, booked_pages: float, pages: int, lead_s: float) -> bool:
        """Whether one more answer finds room beside those that are booked, ``lead_s`` from now.

        Args:
            num_booked: Answers that have been promised room, and hold no slot yet.
            booked_pages: Pages that they will come to.
            pages: Pages that the answer will come to.
            lead_s: Seconds until its KV comes.
        """
        answers = self.answers + num_booked
        if not answers:
            return True  # One answer alone always fits.
        ending = min(int(lead_s * self.ending_per_s), self.answers)
        freed = ending * self.pages / self.answers if ending else 0.0
        fits = self.pages + booked_pages + pages <= self.most_pages + freed
        return fits and answers < self.most_answers + ending


class Forecast:
    """Forecasts of the room that answers take.

    Args:
        engine: The engine; nothing of it is touched but its numbers.
        meter: The meter of its steps and answers.
        slots: The slots of answers.
        leases: The leases on them.
    """

    def __init__(
        self, engine: DecodeEngine, meter: DecodeMeter, slots: Slots, leases: Leases
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._slots = slots
        self._leases = leases

    def pages_of(self, request: GenerationRequest) -> int:
        """Pages that an answer and its prompt will come to, if it is as long as others were.

        Visual tokens that prefill will remove count, because their number is not known before.
        """
        sampling, num_prompt = request.sampling, request.num_prompt_tokens
        num_tokens = sampling.max_tokens
        if not sampling.ignore_eos:
            usual = max(sampling.min_tokens, math.ceil(self._meter.answer_tokens))
            num_tokens = min(num_tokens, usual)
        extent = KVExtent(num_prompt, num_prefilled(self._engine.plan, num_prompt))
        return self._engine.pages.num_pages_of(extent, num_tokens)

    def room(self) -> Room:
        """The room at present."""
        pages = sum(
            len(lease.seated) * self.pages_of(lease.prompt.prompt) for lease in self._leases.all()
        )
        return Room(
            answers=self._slots.num_held,
            pages=pages,
            most_answers=self._slots.num_usable,
            most_pages=self._engine.pages.num_pages,
            ending_per_s=self._ending_per_s(),
        )

    def _ending_per_s(self) -> float:
        """Answers that end per second while as many run as now; 0 before the first step."""
        rows, entries = self._slots.num_held, self._engine.usage * self._engine.num_kv_tokens
        lasts_s = self._meter.answer_tokens * self._meter.cost.seconds(rows, entries)
        return rows / lasts_s if lasts_s > 0.0 else 0.0
