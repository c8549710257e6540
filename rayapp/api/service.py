"""The interface between the HTTP layer and whatever generates tokens.

It has two implementations: the served one runs replicas on a Ray cluster, and its twin, engines in
one process, lives with the tests. Both must pass the same contract test.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from rayapp.engine.request import GenerationRequest, Timeline, TokenBatch
from rayapp.plan import PruningPlan
from rayapp.vision.cache import CacheCounts
from rayapp.vision.inputs import ImageIntake

Pool = Literal["prefill", "decode", "unified"]
Counts = dict[tuple[str, str, tuple[tuple[str, str], ...]], float]
"""Counters of one process, which only grow: by metric, sample and labels."""


class ReplicaHealth(BaseModel):
    """A replica's description of itself.

    ``dtype`` is the element type that it computes in; ``image_cache`` is set if it prefills images.
    ``kv_bytes`` are the bytes of its pages of KV, which hold ``kv_tokens`` tokens.
    """

    model_config = ConfigDict(frozen=True)

    pool: Pool
    replica_id: str
    node: str
    parameter_bytes: int
    kv_bytes: int = 0
    kv_tokens: int = 0
    plan_fingerprint: str
    weights_fingerprint: str
    dtype: str
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    image_cache: CacheCounts | None = None


class HealthReport(BaseModel):
    """A report whether the service can answer requests now, and which replicas would.

    ``ready`` is false until every pool has a replica that answers; until then ``reason`` says in
    one line which part is missing. ``decisions`` are the last ones about the sizes of pools, in
    words, oldest first.
    """

    model_config = ConfigDict(frozen=True)

    ready: bool
    reason: str = ""
    replicas: tuple[ReplicaHealth, ...] = ()
    decisions: tuple[str, ...] = ()

    def pools(self) -> dict[str, list[ReplicaHealth]]:
        """Group the replicas by pool, in ascending order of names."""
        names = sorted({replica.pool for replica in self.replicas})
        return {name: [r for r in self.replicas if r.pool == name] for name in names}


@dataclass(frozen=True)
class ServiceDescription:
    """The served model, plan and limits, known before any replica answers.

    Args:
        model_name: The name that requests must give as ``model``.
        max_model_len: Most tokens of prompt and answer together.
        vocab_size: Token ids lie in ``0..vocab_size - 1``.
        tokenizer: The model's tokenizer, with the chat template if there is one.
        plan: The plan that both stages follow.
        mode: Whether prefill and decode run in separate pools or in one.
        created: Unix time, seconds.
        images: The intake that checks and counts images; None if the model takes none.
    """

    model_name: str
    max_model_len: int
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    plan: PruningPlan = field(default_factory=PruningPlan)
    mode: Literal["disaggregated", "unified"] = "disaggregated"
    created: int = field(default_factory=lambda: int(time.time()))
    images: ImageIntake | None = None

    def check(self, request: GenerationRequest) -> None:
        """Raise :class:`RequestError` if the request exceeds the limits of this service."""
        request.check_limits(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            image_token_id=self.images.image_token_id if self.images else None,
        )


class Service(Protocol):
    """Turns token requests into token streams."""

    @property
    def description(self) -> ServiceDescription:
        """The description of the service, which never changes."""
        ...

    def generate(
        self, requests: Sequence[GenerationRequest], timelines: Sequence[Timeline] = ()
    ) -> AsyncGenerator[TokenBatch, None]:
        """Generate the tokens of all answers to one prompt as they appear; it is prefilled once.

        The batches of an answer come without gaps and without repetitions, and only the last one
        carries a ``finish_reason``; those of different answers come in any order. Nothing starts
        before the first item is awaited. Closing or cancelling the generator cancels all answers in
        whatever phase they are and frees their resources.

        Args:
            requests: One request per answer, all of the same prompt; the limits are checked here.
            timelines: Marks on this process's clock for every answer, filled as phases begin and
                end; the caller reads them afterwards. ``first_token_s`` and ``finished_s`` are the
                caller's.

        Raises:
            RequestError: If a request lies outside the limits (before the first item).
            OverloadedError: If every waiting place is taken (before the first item).
            DeadlineError: If a phase outlived its deadline.
            UnavailableError: If no replica of a stage answers.
        """
        ...

    def arriving(self, num_answers: int) -> AbstractContextManager[None]:
        """Hold places while the prompts of so many answers are read and tokenized.

        Raises:
            OverloadedError: If they would not find places.
        """
        ...

    def admitted(
        self, prompts: Sequence[Sequence[GenerationRequest]]
    ) -> AbstractContextManager[None]:
        """Admit the answers to several prompts together, or none of them.

        :meth:`generate` is called for every prompt within the context, and refuses none of them for
        want of room.

        Args:
            prompts: The requests for the answers to every prompt.

        Raises:
            OverloadedError: If there is no room for all.
            UnavailableError: If the service is about to end.
        """
        ...

    async def health(self) -> HealthReport:
        """Report which replicas answer; an unreachable pool is reported, never raised."""
        ...

    async def counted_elsewhere(self) -> Sequence[Counts]:
        """What the other processes that serve HTTP for this service have counted, ever."""
        ...

    async def transfers(self) -> dict[str, Any]:
        """The merged ledger: ``{"totals": {...}, "links": [...], "recent": [...]}``."""
        ...
