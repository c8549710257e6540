"""Plain data of requests: their prompt, the batches of their answers, and their timelines."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import IntegrityError, RequestError
from rayapp.plan import VisualTokens
from rayapp.vision.inputs import ImageInput
from rayapp.vision.prompt import check_places

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """A tokenized prompt and the parameters of its answer.

    ``request_id`` is made by the server, never by a client. The prompt has one placeholder per
    image. ``text_token_ids`` are the user's words, with which images are aligned. ``visual_tokens``
    replaces the plan's rule for this request: any method and any budget, up to all tokens.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    attempt: int = 0
    images: tuple[ImageInput, ...] = ()
    text_token_ids: tuple[int, ...] = ()
    visual_tokens: VisualTokens | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of the unpruned prompt, with all tokens of its images."""
        in_images = sum(image.num_tokens for image in self.images)
        return len(self.prompt_token_ids) - len(self.images) + in_images

    @property
    def without_image_data(self) -> GenerationRequest:
        """The same request for the decode stage, which never looks at an image."""
        if not self.images:
            return self
        return replace(self, images=tuple(image.without_data for image in self.images))

    def check_limits(
        self, *, max_model_len: int, vocab_size: int, image_token_id: int | None = None
    ) -> None:
        """Raise :class:`RequestError` if prompt or answer exceed the limits of the engines.

        Args:
            max_model_len: Limit of prompt and answer tokens together.
            vocab_size: Size of the vocabulary: token ids lie in ``0..vocab_size - 1``.
            image_token_id: The id of the image placeholder; None if the model takes no images.
        """
        self._check_images(image_token_id)
        length, limit = self.num_prompt_tokens, self.sampling.max_tokens
        if length == 0:
            raise RequestError("the prompt has no tokens; send at least one")
        if length + limit > max_model_len:
            raise RequestError(
                f"{length} prompt tokens and max_tokens={limit} need {length + limit} places, but "
                f"this model serves at most {max_model_len}; shorten the prompt or lower max_tokens"
            )
        if self.sampling.prompt_logprobs is not None and self.images:
            raise RequestError("prompt tokens of images have no log-probabilities; ask for none")
        if self.sampling.min_tokens > limit:
            raise RequestError(
                f"min_tokens={self.sampling.min_tokens} is more than max_tokens={limit}; lower "
                "min_tokens or raise max_tokens"
            )
        for words, ids in (
            ("token id", self.prompt_token_ids),
            ("logit_bias: token id", self.sampling.logit_bias),
        ):
            wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
            if wrong is not None:
                raise RequestError(
                    f"{words} {wrong} is not in the vocabulary; ids lie in 0..{vocab_size - 1}"
                )

    def _check_images(self, image_token_id: int | None) -> None:
        if image_token_id is not None:
            check_places(self.prompt_token_ids, image_token_id, len(self.images))
        elif self.images or self.visual_tokens is not None:
            raise RequestError(
                "this model takes no images: it is text-only; send text, or ask a model that does"
            )


@dataclass(frozen=True)
class PromptRequests:
    """The requests for all answers to one prompt, which is prefilled, sent and accounted once.

    ``name`` is made by the server. It stays the same over all attempts, while answers that have
    ended take no part in later ones.
    """

    name: str
    requests: tuple[GenerationRequest, ...]

    @classmethod
    def of(cls, requests: Sequence[GenerationRequest]) -> PromptRequests:
        """Join requests, named after the first; :class:`IntegrityError` if their prompts differ."""
        prompts = {(request.prompt_token_ids, request.visual_tokens) for request in requests}
        names = {request.request_id for request in requests}
        if len(prompts) != 1 or len(names) != len(requests):
            raise IntegrityError(
                f"{len(requests)} requests of {len(names)} names have {len(prompts)} prompts; "
                "answers share a prefill only if they share their prompt"
            )
        return cls(requests[0].request_id, tuple(requests))

    @property
    def prompt(self) -> GenerationRequest:
        """One of the requests, for what all have in common."""
        return self.requests[0]

    @property
    def attempt(self) -> int:
        """Number of the attempt, counted from 0."""
        return self.prompt.attempt

    @property
    def key(self) -> tuple[str, int]:
        """Name and attempt, which no other work has."""
        return self.name, self.attempt

    def needs_decode(self, first_token: str) -> bool:
        """False if prefill alone makes the answers, because it makes their only token.

        Args:
            first_token: The stage that samples the first token, as the plan says.
        """
        most = max(request.sampling.max_tokens for request in self.requests)
        return first_token == "decode" or most > 1

    @property
    def without_image_data(self) -> PromptRequests:
        """The same requests for the decode stage, which never looks at an image."""
        return replace(self, requests=tuple(r.without_image_data for r in self.requests))

    def on_attempt(self, attempt: int, ended: Collection[str] = ()) -> PromptRequests:
        """The requests whose answers have not ``ended`` (by request id), on another attempt."""
        going_on = [r for r in self.requests if r.request_id not in ended]
        return replace(self, requests=tuple(replace(r, attempt=attempt) for r in going_on))


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probability of an answer token, and the best ``(token id, logprob)`` pairs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


PromptLogprobs = tuple[TokenLogprobs | None, ...]
"""An entry per prompt token, None for the first, which nothing predicts; empty if nobody asked."""


@dataclass(frozen=True)
class TokenBatch:
    """Consecutive answer tokens of one request, the first of them at ``first_index`` of the answer.

    The end-of-sequence token is included if it was generated. ``finish_reason`` is set on the last
    batch. ``logprobs`` has one entry per token if the request wants log-probabilities, else none;
    ``prompt_logprobs`` comes with the first batch of a request that wants them.
    """

    request_id: str
    attempt: int
    first_index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs = ()


@dataclass
class Timeline:
    """Seconds on the monotonic clock of one process at which the phases of a request began.

    ``transfer`` has the fields of the ledger's record of its KV, if any travelled.
    """

    arrived_s: float = field(default_factory=time.monotonic)
    prefill_started_s: float | None = None
    prefill_finished_s: float | None = None
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    transfer: Mapping[str, Any] | None = None

    def phases(self) -> dict[str, tuple[float, float]]:
        """Begin and end of ``queue``, ``prefill``, ``handoff`` and ``decode``, where known."""
        return _known(
            {
                "queue": (self.arrived_s, self.prefill_started_s),
                "prefill": (self.prefill_started_s, self.prefill_finished_s),
                "handoff": (self.prefill_finished_s, self.admitted_s),
                "decode": (self.admitted_s, self.finished_s),
            }
        )

    def intervals(self) -> dict[str, float]:
        """Durations ``queue_s, prefill_s, handoff_s, decode_s, ttft_s, e2e_s`` with known ends."""
        wholes = {
            "ttft": (self.arrived_s, self.first_token_s),
            "e2e": (self.arrived_s, self.finished_s),
        }
        spans = {**self.phases(), **_known(wholes)}
        return {f"{name}_s": end - begin for name, (begin, end) in spans.items()}


def _known(
    spans: Mapping[str, tuple[float | None, float | None]],
) -> dict[str, tuple[float, float]]:
    """The spans whose begin and end are known."""
    return {
        name: (begin, end)
        for name, (begin, end) in spans.items()
        if begin is not None and end is not None
    }


def merged_by_answer(batches: Sequence[TokenBatch]) -> list[TokenBatch]:
    """Merge the batches of every answer; within an answer they are consecutive."""
    if len(batches) == 1:
        return [batches[0]]
    answers: dict[str, list[TokenBatch]] = {}
    for batch in batches:
        answers.setdefault(batch.request_id, []).append(batch)
    return [merged(of_one) for of_one in answers.values()]


def merged(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Merge consecutive batches of one attempt into one."""
    if len(batches) == 1:
        return batches[0]
    first, last = batches[0], batches[-1]
    return TokenBatch(
        request_id=first.request_id,
        attempt=first.attempt,
        first_index=first.first_index,
        token_ids=tuple(token for batch in batches for token in batch.token_ids),
        finish_reason=last.finish_reason,
        logprobs=tuple(entry for batch in batches for entry in batch.logprobs),
        prompt_logprobs=first.prompt_logprobs,
    )


def after(batch: TokenBatch, num_sent: int) -> TokenBatch | None:
    """The part of ``batch`` after the ``num_sent`` tokens that were sent; None if there is none."""
    skip = num_sent - batch.first_index
    if skip >= len(batch.token_ids):
        return None
    if skip <= 0:
        return batch
    return TokenBatch(
        request_id=batch.request_id,
        attempt=batch.attempt,
        first_index=num_sent,
        token_ids=batch.token_ids[skip:],
        finish_reason=batch.finish_reason,
        logprobs=batch.logprobs[skip:],
    )
