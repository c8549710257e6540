"""The messages between ingress and replicas: small plain data, never from a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rayapp.engine.request import PromptLogprobs, PromptRequests, TokenBatch
from rayapp.errors import UnavailableError
from rayapp.kv.segment import KVExtent
from rayapp.kv.wire import Envelope, MessageSizes
from rayapp.plan import ModelSignature, PruningPlan


@dataclass(frozen=True)
class Reader:
    """Who reads the tokens of the answers that a call asks for.

    ``name`` is unique. ``actor`` is the name of the reader's actor, whose death ends what replicas
    hold for it; it is empty if the reader is no actor.
    """

    name: str = ""
    actor: str = ""


@dataclass(frozen=True)
class Address:
    """The replica of a pool that a call is for, and who calls.

    The router honours ``replica_id`` while that replica lives. A call without it goes to the one in
    ``preferred``, which has booked room for it, or if that has gone or is to be avoided, to the
    least busy replica that is not in ``avoid``, as long as there is another.
    """

    replica_id: str | None = None
    avoid: frozenset[str] = frozenset()
    preferred: str | None = None
    reader: Reader = Reader()


ANY = Address()


@dataclass(frozen=True)
class Versions:
    """The plan, weights and type of a replica; stages are paired only if all three are equal.

    ``dtype`` is the element type of the model. A plan does not name it, but KV of another type is
    different KV.
    """

    plan_fingerprint: str
    weights_fingerprint: str
    dtype: str

    @classmethod
    def of(cls, plan: PruningPlan, model: ModelSignature, dtype: torch.dtype) -> Versions:
        """Versions of a plan and the model that it is run on, computing in ``dtype``."""
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
class KVPart:
    """The small item before the message of a part of the KV, which leaves during the prefill.

    Args:
        place: The replica that prefills.
        part: Number of the part, counted from 0.
        extent: The lengths of the prompt.
        pack_s: Seconds that packing the part took.
    """

    place: Place
    part: int
    extent: KVExtent
    pack_s: float


@dataclass(frozen=True)
class PrefillAnswer:
    """The small item at the end of a prefill; the last message follows unless ``kv_bytes`` is None.

    Args:
        place: The replica that prefilled.
        firsts: The first token of every answer, in the order of the requests, if prefill samples
            them.
        kv_bytes: Bytes, in the model's own type, of the KV in the message that follows.
        queue_s: Seconds that the request waited for its turn.
        prefill_s: Seconds that the prefill took.
        num_visual_tokens_removed: Number of image tokens that were not run.
        prompt_logprobs: Log-probabilities of the prompt's tokens, if the requests ask for them.
    """

    place: Place
    firsts: tuple[TokenBatch, ...]
    kv_bytes: int | None
    queue_s: float
    prefill_s: float
    num_visual_tokens_removed: int = 0
    prompt_logprobs: PromptLogprobs = ()


@dataclass(frozen=True)
class Seating:
    """What decode needs to know to reserve slots and pages for KV that is still computed.

    Args:
        prompt: The requests for all answers, with their attempt.
        versions: The plan, weights and type that prefill and decode must have.
        extent: The lengths of the prompt.
        wait_s: Longest wait for a slot, and then for pages, seconds.
    """

    prompt: PromptRequests
    versions: Versions
    extent: KVExtent
    wait_s: float


@dataclass(frozen=True)
class Seat:
    """The answer of a decode replica that has booked room, or has reserved slots and pages.

    Args:
        place: The replica, to which the prompt's KV goes.
        wait_s: Seconds until there was room.
    """

    place: Place
    wait_s: float


@dataclass(frozen=True)
class Copied:
    """What became of a message of KV in a decode replica.

    Args:
        sizes: The sizes of the message.
        fetch_s: Seconds to fetch it.
        copy_s: Seconds to check it and copy it into pages.
    """

    sizes: MessageSizes
    fetch_s: float
    copy_s: float

    def __add__(self, other: Copied) -> Copied:
        return Copied(
            self.sizes + other.sizes, self.fetch_s + other.fetch_s, self.copy_s + other.copy_s
        )


@dataclass(frozen=True)
class Admission:
    """The answer of a decode replica that has all KV of a prompt, and computes answers to it.

    Args:
        place: The replica that decodes, from which the token stream is read.
        copied: What became of the message.
        wait_s: Seconds until a slot was free.
    """

    place: Place
    copied: Copied
    wait_s: float


TokenRow = tuple[Any, ...]
"""The fields of a :class:`TokenBatch` in their order: many of them travel in less time than many
objects."""


def row_of(batch: TokenBatch) -> TokenRow:
    """The fields of a batch, from which ``TokenBatch(*row)`` makes it again."""
    return (
        batch.request_id,
        batch.attempt,
        batch.first_index,
        batch.token_ids,
        batch.finish_reason,
        batch.logprobs,
        batch.prompt_logprobs,
    )


class MisdirectedError(UnavailableError):
    """A call reached another replica than the addressed one, which has gone."""


@dataclass(frozen=True)
class Refusal:
    """The answer of a replica with another plan, other weights or another type.

    It does not count as an attempt. While an update replaces replicas one by one, old and new ones
    meet; only equal ones may pair.
    """

    place: Place
    reason: str


def version_conflict(place: Place, ours: Versions, wanted: Versions) -> Refusal | None:
    """A refusal if the replica at ``place`` must not work on a request, None if it may."""
    if ours == wanted:
        return None
    return Refusal(
        place,
        f"replica {place.replica_id} runs {ours}, the request needs {wanted}; "
        "wait until the update is through",
    )


def check_address(ours: Place, address: Address) -> None:
    """Raise :class:`MisdirectedError` if a call was for another replica."""
    if address.replica_id not in (None, ours.replica_id):
        raise MisdirectedError(
            f"replica {address.replica_id} is gone, the call reached {ours.replica_id}: "
            "prefill again"
        )


@dataclass(frozen=True)
class Handover:
    """The data that decode needs beside the KV itself.

    Args:
        prompt: The requests for the answers that go on, with their attempt.
        versions: The plan, weights and type that prefill and decode must have.
        known: The tokens with which every answer begins, in the order of the requests: those that
            the client has, or else the one that prefill sampled.
        wait_s: Longest wait for a slot, seconds.
        part: Number of the message that comes with it; the parts before it have been copied.
    """

    prompt: PromptRequests
    versions: Versions
    known: tuple[tuple[int, ...], ...]
    wait_s: float
    part: int = 0

    @property
    def known_by_name(self) -> dict[str, tuple[int, ...]]:
        """The tokens with which every answer begins, by request id."""
        names = (request.request_id for request in self.prompt.requests)
        return dict(zip(names, self.known, strict=True))

    @property
    def envelope(self) -> Envelope:
        """The envelope of the message that comes with it."""
        return replace(self.versions.envelope(*self.prompt.key), part=self.part)

    @classmethod
    def after(
        cls,
        prompt: PromptRequests,
        versions: Versions,
        firsts: Sequence[TokenBatch],
        sent: Mapping[str, Sequence[int]],
        wait_s: float,
    ) -> Handover:
        """The handover that follows a prefill.

        Args:
            prompt: The requests that were prefilled.
            versions: The plan, weights and type that prefill and decode must have.
            firsts: First tokens, as in :class:`PrefillAnswer`; answers that end with theirs are
                left out.
            sent: Tokens that the client has already, by request id.
            wait_s: Longest wait for a slot, seconds.
        """
        sampled = {first.request_id: first for first in firsts}
        ended = [name for name, first in sampled.items() if first.finish_reason]
        going_on = prompt.on_attempt(prompt.attempt, ended).without_image_data
        known = [
            tuple(sent.get(name, ())) or (sampled[name].token_ids if name in sampled else ())
            for name in (request.request_id for request in going_on.requests)
        ]
        return cls(going_on, versions, tuple(known), wait_s)
