"""Bookings: a decode replica's promise of room for prompts that are still to be prefilled.

A prompt is prefilled only once it has one, so no prefill is paid for whose KV would have nowhere to
go. The promise is a forecast, neither a slot nor pages: these would stand idle while the prompt is
prefilled. As many answers are promised room beyond what is free as will have ended by then.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rayapp.distributed.serve.replicas.admission.forecast import Room
from rayapp.distributed.serve.replicas.admission.slots import Slots
from rayapp.engine.request import PromptRequests

_FADE = 0.8
"""Weight of earlier prompts in the time that KV takes to come (project default)."""


@dataclass(frozen=True, eq=False)
class Booking:
    """Room for one answer to a prompt; the others to it come in as room is made."""

    prompt: PromptRequests
    pages: int
    began_s: float = field(default_factory=time.monotonic)
    releases: list[Callable[[], None]] = field(default_factory=list)


class Bookings:
    """The bookings of one replica, given in the order in which they were asked for.

    Args:
        slots: The slots, whose news says that room may have been made.
        room: Tells the room at present, which bookings are not part of.

    Attributes:
        slots: The slots.
        num_waiting: Prompts that wait for a booking.
    """

    def __init__(self, slots: Slots, room: Callable[[], Room]) -> None:
        self.slots = slots
        self.num_waiting = 0
        self._room = room
        self._held: dict[tuple[str, int], Booking] = {}
        self._turn = asyncio.Lock()
        self._lead_s = 0.0

    def __len__(self) -> int:
        return len(self._held)

    async def take(self, prompt: PromptRequests, pages: int) -> Booking:
        """Wait until there will be room for one more answer once its KV comes, and book it.

        Args:
            prompt: The requests for all answers, with their attempt.
            pages: Pages that one answer will come to.
        """
        self.num_waiting += 1
        try:
            async with self._turn:
                while not self._holds(pages):
                    await self.slots.news.wait()
                booking = self._held[prompt.key] = Booking(prompt, pages)
                return booking
        finally:
            self.num_waiting -= 1

    def _holds(self, pages: int) -> bool:
        booked = sum(booking.pages for booking in self._held.values())
        return self._room().holds(len(self._held), booked, pages, self._lead_s)

    @property
    def num_short(self) -> int:
        """Prompts that wait because of admitted answers; 0 while only booked ones are in the way.

        Booked prompts are in prefill, so it is prefill then that is short of replicas.
        """
        room = self._room()
        usual = math.ceil(room.pages / room.answers) if room.answers else 0
        return 0 if room.holds(0, 0.0, usual, 0.0) else self.num_waiting

    def note_arrival(self, prompt: PromptRequests) -> None:
        """Learn how long the KV of a booked prompt took to come."""
        booking = self._held.get(prompt.key)
        if booking is not None:
            lead_s = time.monotonic() - booking.began_s
            self._lead_s = _FADE * (self._lead_s or lead_s) + (1.0 - _FADE) * lead_s

    def end(self, booking: Booking) -> None:
        """End a booking; a second call is harmless."""
        if self._held.get(booking.prompt.key) is booking:
            del self._held[booking.prompt.key]
            for release in booking.releases:
                release()
            self.slots.tell()

    def end_of(self, prompt: PromptRequests) -> None:
        """End the booking of an attempt, if it has one: it holds a slot now, or never will."""
        booking = self._held.get(prompt.key)
        if booking is not None:
            self.end(booking)

    def cancel(self, name: str, attempt: int) -> None:
        """End the bookings of this attempt and of earlier ones."""
        for booking in tuple(self._held.values()):
            if booking.prompt.name == name and booking.prompt.attempt <= attempt:
                self.end(booking)
