"""The work of replicas as the routers of this process know it, for others in the process.

Serve pickles a router's module by value, so whatever stands there has a copy per router that nobody
else sees. What routers share with admission stands here, in a module that is pickled by name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from rayapp.scaling.reports import Standing
from rayapp.scaling.routing import Known

_KNOWN: dict[str, Mapping[str, Known]] = {}
"""Knowledge of the replicas, by deployment."""
_STANDINGS: dict[str, Mapping[str, Standing]] = {}
"""The newest reports of the replicas, by deployment."""


def remember(
    deployment: str, known: Mapping[str, Known], standings: Mapping[str, Standing]
) -> None:
    """Take over what a router knows now.

    Args:
        deployment: Name of the deployment.
        known: Knowledge of its replicas by id.
        standings: Their newest reports.
    """
    _KNOWN[deployment], _STANDINGS[deployment] = known, standings


def standings_of(deployment: str) -> list[Standing]:
    """Return the newest reports of a deployment's replicas, as far as this process knows.

    Args:
        deployment: Name of the deployment.
    """
    return list(_STANDINGS.get(deployment, {}).values())


def least_work_s(deployment: str) -> float:
    """Seconds of work of the replica that has the least, as this process knows; 0 if it does not.

    Args:
        deployment: Name of the deployment.
    """
    known = _KNOWN.get(deployment, {})
    return min((one.left_s(time.time()) for one in tuple(known.values())), default=0.0)
