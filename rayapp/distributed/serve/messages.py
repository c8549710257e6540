"""What ingress and replicas say to each other; plain data, small, never from a client."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.errors import UnavailableError
from rayapp.kv.wire import Envelope, MessageSizes
from rayapp.plan import ModelSignature, PruningPlan


@dataclass(frozen=True)
class Address:
    """Which replica of a pool a call is for; the router honours it where that replica lives.

    A call without ``replica_id`` goes to the least busy replica that is not in ``avoid``, as long
    as there is another.
    """

    replica_id: str | None = None
    avoid: frozenset[str] = frozenset()


ANY = Address()


@dataclass(frozen=True)
class Versions:
    """What a replica computes with; stages are paired only where all of it is equal.

    ``dtype`` is the element type of the model. A plan says nothing of it, but KV of another type is
    other KV.
    """

    plan_fingerprint: str
    weights_fingerprint: str
    dtype: str

    @classmethod
    def of(cls, plan: PruningPlan, model: ModelSignature, dtype: torch.dtype) -> Versions:
        """Of a plan and the model that it is run on, computing in ``dtype``."""
        name = str(dtype).removeprefix("torch.")
        return cls(plan.fingerprint, model.weights_fingerprint, name)

    def __str__(self) -> str:
        return f"plan {self.plan_fingerprint} on weights {self.weights_fingerprint} in {self.dtype}"

    def envelope(self, request_id: str, attempt: int) -> Envelope:
        """The envelope of one attempt's KV."""
        return Envelope(request_id, attempt, self.plan_fingerprint, self.weights_fingerprint)


@dataclass(frozen=True)
class Place:
    """A replica and the node that it runs on."""

    replica_id: str
    node: str


@dataclass(frozen=True)
class PrefillAnswer:
    """The first, small item of a prefill; the KV message follows unless ``kv_bytes`` is None.

    Args:
        place: Who prefilled.
        first: The first answer token where prefill samples it.
        kv_bytes: What the segment weighs in the model's own type.
        queue_s: Seconds that the request waited for its turn.
        prefill_s: Seconds that the prefill took.
        num_visual_tokens_removed: Tokens of images that were not run.
    """

    place: Place
    first: TokenBatch | None
    kv_bytes: int | None
    queue_s: float
    prefill_s: float
    num_visual_tokens_removed: int = 0


@dataclass(frozen=True)
class Admission:
    """Decode took a segment over.

    Args:
        place: Who decodes; the token stream is read there.
        sizes: What the message weighed.
        wait_s: Seconds until a slot was free.
        fetch_s: Seconds to fetch the message.
    """

    place: Place
    sizes: MessageSizes
    wait_s: float
    fetch_s: float


class MisdirectedError(UnavailableError):
    """The call reached another replica than the one it was for, which has gone."""


@dataclass(frozen=True)
class Refusal:
    """The replica runs another plan, other weights or another type; no attempt was spent.

    While an update replaces replicas one by one, old and new ones meet; only equal ones may pair.
    """

    place: Place
    reason: str


def version_conflict(place: Place, ours: Versions, wanted: Versions) -> Refusal | None:
    """Why the replica at ``place`` must not work on a request, None where it may."""
    if ours == wanted:
        return None
    return Refusal(
        place,
        f"replica {place.replica_id} runs {ours}, the request needs {wanted}; "
        "wait until the update is through",
    )


def check_address(ours: Place, address: Address) -> None:
    """Raise :class:`MisdirectedError` where a call was for another replica."""
    if address.replica_id not in (None, ours.replica_id):
        raise MisdirectedError(
            f"replica {address.replica_id} is gone, the call reached {ours.replica_id}: "
            "prefill again"
        )


@dataclass(frozen=True)
class Handover:
    """What decode needs beside the KV itself.

    Args:
        request: What is being answered, with its attempt.
        versions: What prefill and decode must have computed with.
        first: The first answer token where prefill sampled it.
        replay: Answer tokens that the client already has.
        wait_s: Longest wait for a slot, seconds.
    """

    request: GenerationRequest
    versions: Versions
    first: TokenBatch | None
    replay: tuple[int, ...]
    wait_s: float
