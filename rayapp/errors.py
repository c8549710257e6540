"""Every exception that rayapp raises on purpose, as one tree.

A message states the value, the rule that it breaks and the remedy. The command line turns
:class:`InputError` into one line and exit code 2, every other :class:`RayappError` into one line
and exit code 1; the HTTP layer maps classes to status codes by ``status``.
"""


class RayappError(Exception):
    """The root: something that rayapp noticed and can explain."""

    status = 500


class InputError(RayappError):
    """The user's input breaks a rule; nothing of ours is wrong."""

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
    """Every waiting place is taken; try again later."""

    status = 429


class DeadlineError(RayappError):
    """A phase of a request outlived its deadline; what it held was freed."""

    status = 504


class CancelledRequestError(RayappError):
    """The client went away; what the request held was freed."""

    status = 499


class UnavailableError(RayappError):
    """No replica of a stage answers at the moment."""

    status = 503


class TransferError(RayappError):
    """KV could not be delivered."""

    status = 502


class WireError(TransferError):
    """A KV message is corrupt or is not the one that was expected; it must not be used."""


class ClusterError(RayappError):
    """The Ray cluster cannot satisfy what was asked: placement, capacity, or reachability."""


class SearchError(RayappError):
    """A search cannot go on; what was scored so far is in its journal."""


class IntegrityError(RayappError):
    """Our own invariant is broken: a bug. The message holds the numbers."""
