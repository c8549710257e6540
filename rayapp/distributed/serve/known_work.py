"""The work of replicas as the routers of this process know it, for others in the process.

Serve pickles a router's module by value, so whatever stands there has a copy per router that nobody
else sees. What routers share with admission stands here, in a module that is pickled by name.
"""

from __future__ import annotations

from typing import Protocol

from rayapp.scaling.reports import Standing


class Knowing(Protocol):
    """A router, as far as others in its process ask it."""

    @property
    def standings(self) -> list[Standing]:
        """The newest reports of the replicas."""
        ...

    def wait_s(self, num_tokens: int) -> float:
        """Seconds until a request begins, after so many prompt tokens that come before."""
        ...


_ROUTERS: dict[str, Knowing] = {}
"""The latest router of every deployment."""


def remember(deployment: str, router: Knowing) -> None:
    """Ask a router from now on.

    Args:
        deployment: Name of its deployment.
        router: The router.
    """
    _ROUTERS[deployment] = router


def standings_of(deployment: str) -> list[Standing]:
    """Return the newest reports of a deployment's replicas, as far as this process knows.

    Args:
        deployment: Name of the deployment.
    """
    router = _ROUTERS.get(deployment)
    return [] if router is None else router.standings


def wait_s(deployment: str, num_tokens: int = 0) -> float:
    """Seconds until a deployment begins a request, as this process knows; 0 if it does not.

    Args:
        deployment: Name of the deployment.
        num_tokens: Prompt tokens that will come to it before.
    """
    router = _ROUTERS.get(deployment)
    return 0.0 if router is None else router.wait_s(num_tokens)
