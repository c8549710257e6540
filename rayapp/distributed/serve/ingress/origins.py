"""The nodes that prefilled learn when KV of an attempt is under way no more.

A replica that prefills takes room on its node (:mod:`rayapp.distributed.serve.node_room`), and
knows nothing of what becomes of KV that has left: the ingress owns it, so the ingress gives the
room back, at the moment when decode has copied or the attempt is over.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rayapp.distributed.serve.ingress.freeing import Freeing
from rayapp.distributed.serve.node_room import NodeRooms
from rayapp.engine.request import PromptRequests


@dataclass
class Origin:
    """The node on which an attempt is prefilled; empty until its first item has come."""

    node: str = ""


class Origins:
    """Gives back the room that attempts have on the nodes that prefill them.

    Args:
        prefill: Serve's handle of the prefill pool.
        within_s: Longest time to tell all replicas that an attempt is over.
        counts: True if nodes count the KV that is under way from them.
    """

    def __init__(self, prefill: Any, *, within_s: float, counts: bool) -> None:
        self._freeing = Freeing(prefill, within_s=within_s)
        self._rooms = NodeRooms()
        self._counts = counts

    @asynccontextmanager
    async def of(self, prompt: PromptRequests) -> AsyncGenerator[Origin, None]:
        """Note the origin of an attempt; its room there is given back as the context ends.

        If the attempt ends before anybody has answered, all replicas hear of it.
        """
        origin = Origin()
        try:
            yield origin
        finally:
            if self._counts and origin.node:
                self._rooms.give(origin.node, prompt.key)
            elif self._counts:
                await self._freeing.withdraw(prompt)
