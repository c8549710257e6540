"""What a process holds for another one that has died is freed at once, not when its time is up.

Ray tells a caller that its replica has died, but no replica that its caller has: a call goes on for
nobody. Serve's replicas are named actors, and the name of a dead one is unknown, so asking for it
now and then tells. A process that is no actor (a test, a script) is not watched; its leases end by
themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
"""Seconds between two looks at the callers (project default): freed within 2 s, as promised."""
_NAMESPACE = "serve"


def is_alive(actor: str) -> bool:
    """True unless the cluster knows no actor of this name; it may block for a round trip."""
    try:
        ray.get_actor(actor, namespace=_NAMESPACE)
    except ValueError:
        return False
    return True


def this_actor() -> str:
    """The name of the actor that this process is; empty if it is none."""
    if not ray.is_initialized():
        return ""
    return ray.get_runtime_context().get_actor_name() or ""


class Callers:
    """Watches the processes for which this one holds something.

    Args:
        is_alive: Tells whether an actor lives, by its name.
    """

    def __init__(self, is_alive: Callable[[str], bool] = is_alive) -> None:
        self._is_alive = is_alive
        self._ends: dict[str, dict[object, Callable[[], object]]] = {}
        self._watching: asyncio.Task[None] | None = None

    def hold(self, actor: str, end: Callable[[], object]) -> Callable[[], None]:
        """Call ``end`` once the actor of this name has died, unless the result is called first.

        The result may be called more than once. A process without a name is not watched.
        """
        if not actor:
            return lambda: None
        key = object()
        self._ends.setdefault(actor, {})[key] = end
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        return lambda: self._release(actor, key)

    @contextmanager
    def holding(self, actor: str, end: Callable[[], object]) -> Iterator[None]:
        """Call ``end`` if the actor of this name dies within the context."""
        release = self.hold(actor, end)
        try:
            yield
        finally:
            release()

    def _release(self, actor: str, key: object) -> None:
        ends = self._ends.get(actor, {})
        ends.pop(key, None)
        if not ends:
            self._ends.pop(actor, None)

    async def _watch(self) -> None:
        """Look at all callers until there are none left."""
        while self._ends:
            await asyncio.sleep(PERIOD_S)
            for actor in tuple(self._ends):
                try:
                    lives = await asyncio.to_thread(self._is_alive, actor)
                except Exception as error:  # noqa: BLE001 - it says nothing of the caller
                    logger.debug("whether %s lives is not known: %r", actor, error)
                    continue
                if not lives:
                    self._bury(actor)
        self._watching = None

    def _bury(self, actor: str) -> None:
        ends = self._ends.pop(actor, {})
        if ends:
            logger.warning("%s has died; freeing what %d calls of it hold", actor, len(ends))
        for end in ends.values():
            end()
