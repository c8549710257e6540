"""Every exception that rayapp raises on purpose, as one tree.

A message states the value, the rule that it breaks and the remedy. The command line turns
:class:`InputError` into one line and exit code 2, every other :class:`RayappError` into one line
and exit code 1; the HTTP layer maps classes to status codes by ``status``.
"""


class RayappError(Exception):
    """The root of all errors that rayapp notices and can explain."""

    status = 500


class InputError(RayappError):
    """The user's input breaks a rule; rayapp itself works as intended."""

    status = 400


class PlanError(InputError):
    """A plan breaks a rule of its schema, or belongs to another model."""


class ModelError(InputError):
    """A model directory is missing, unreadable, unsafe, or of an unsupported architecture."""


class DataError(InputError):
    """A calibration or evaluation file is malformed; the message names file and line."""


class RequestError(InputError):
    """One HTTP request (or one call of ``generate``) asks for something outside its limits."""


class NotFoundError(InputError):
    """A request names a model that is not served here."""

    status = 404


class OverloadedError(RayappError):
    """There is no room for more requests at the moment; try again later.

    Args:
        message: The value, the limit and the remedy.
        retry_after_s: Seconds after which there may be room.
    """

    status = 429

    def __init__(self, message: str = "", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(RayappError):
    """A phase of a request outlived its deadline; its resources were freed."""

    status = 504


class CancelledRequestError(RayappError):
    """The client went away; the request's resources were freed."""

    status = 499


class UnavailableError(RayappError):
    """No replica of a stage answers at the moment."""

    status = 503


class PreemptedError(UnavailableError):
    """An answer gave its place to others; it goes on later with the tokens that it has."""


class TransferError(RayappError):
    """KV could not be delivered."""

    status = 502


class WireError(TransferError):
    """A KV message is corrupt or is not the one that was expected; it must not be used."""


class ClusterError(RayappError):
    """The Ray cluster cannot be reached, or cannot provide the placement or capacity needed."""


class SearchError(RayappError):
    """A search cannot go on; the scores so far are in its journal."""


class IntegrityError(RayappError):
    """An invariant of rayapp is broken, which is a bug; the message has the numbers."""
