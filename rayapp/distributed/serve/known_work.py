"""The waits for replicas as the routers of this process know them, for others in the process.

Serve pickles a router's module by value, so whatever stands there has a copy per router that nobody
else sees. What routers share with admission stands here, in a module that is pickled by name.
"""

from __future__ import annotations

from collections.abc import Callable

_WAITS: dict[str, Callable[[int], float]] = {}
"""What the latest router of every deployment answers to :func:`wait_s`."""


def remember(deployment: str, waits_s: Callable[[int], float]) -> None:
    """Ask a router from now on.

    Args:
        deployment: Name of its deployment.
        waits_s: Tells the seconds until a request begins, from the prompt tokens that come before.
    """
    _WAITS[deployment] = waits_s


def wait_s(deployment: str, num_tokens: int = 0) -> float:
    """Seconds until a deployment begins a request, as this process knows; 0 if it does not.

    Args:
        deployment: Name of the deployment.
        num_tokens: Prompt tokens that will come to it before.
    """
    waits_s = _WAITS.get(deployment)
    return 0.0 if waits_s is None else waits_s(num_tokens)
