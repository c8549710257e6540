"""Failures of a call: some mean that work was lost and may be done again, others are explained."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from rayapp.errors import RayappError, TransferError, UnavailableError

DIED = (RayError, RayServeException)


def replica_died(error: Exception) -> bool:
    """True if the replica is gone, False if its code raised."""
    return isinstance(error, DIED) and not isinstance(error, RayTaskError)


def explained(error: Exception) -> RayappError | None:
    """Translate an error of a call to one of ours; None for exceptions of other libraries."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayappError):
        return cause
    if replica_died(error):
        return UnavailableError(f"a replica was lost ({type(error).__name__}); ask again")
    return None


def is_lost(error: RayappError) -> bool:
    """True if prefilling again may help: a replica died, or KV was lost or refused."""
    return isinstance(error, TransferError | UnavailableError)
