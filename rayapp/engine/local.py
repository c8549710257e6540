"""The reference path in one process: prefill, wire, decode with continuous batching.

The service over two nodes must give the same answers token for token.
Shapes: C = answer tokens, V = vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.request import (
    FinishReason,
    GenerationRequest,
    Timeline,
    TokenBatch,
    TokenLogprobs,
)
from rayapp.engine.sampling_params import SamplingParams
from rayapp.engine.stages import Stages
from rayapp.engine.stopping import TextStream
from rayapp.errors import RequestError
from rayapp.kv.ledger import TransferRecord
from rayapp.plan import PruningPlan, VisualTokens
from rayapp.vision.inputs import ImageSource
from rayapp.vision.reader import ImageSupport

_NO_IMAGES = (
    "images were given, but this model is text-only or came without its image processor or "
    "tokenizer; use one that takes images"
)


@dataclass(frozen=True)
class ImagePrompt:
    """A prompt with images.

    Args:
        prompt: A text or token ids, with one placeholder per image.
        images: Encoded images (bytes) or files, in the order of the placeholders.
        text: The user's words, with which images are aligned; None takes the prompt itself.
        visual_tokens: Rule for visual tokens that replaces the plan's; None follows the plan.
    """

    prompt: str | Sequence[int]
    images: Sequence[ImageSource]
    text: str | Sequence[int] | None = None
    visual_tokens: VisualTokens | None = None


Prompt = str | Sequence[int] | ImagePrompt


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    ``token_ids`` include the end-of-sequence token if one was generated; ``text`` leaves special
    tokens out and ends before a stop string. ``transfer`` is None if no KV was sent because the
    first token was the last.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    timeline: Timeline
    transfer: TransferRecord | None


def with_images(text: str, images: Sequence[ImageSource], pipeline: LocalPipeline) -> ImagePrompt:
    """A prompt of words and images; the images come first unless the words have placeholders."""
    place = pipeline.placeholder
    prompt = with_places(text, place, len(images))
    return ImagePrompt(prompt, images, text.replace(place, ""))


def with_places(text: str, place: str, num_images: int) -> str:
    """A prompt text with a placeholder per image; they come first unless the words have them."""
    return text if place in text else f"{place}\n" * num_images + text


@dataclass
class _Run:
    """One request on its way through :meth:`LocalPipeline.generate`."""

    request: GenerationRequest
    timeline: Timeline
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    transfer: TransferRecord | None = None

    def add(self, batch: TokenBatch) -> None:
        """Add the tokens of one batch."""
        now_s = time.monotonic()
        self.token_ids.extend(batch.token_ids)
        self.logprobs.extend(batch.logprobs)
        self.timeline.first_token_s = self.timeline.first_token_s or now_s
        if batch.finish_reason:
            self.finish_reason, self.timeline.finished_s = batch.finish_reason, now_s


class LocalPipeline:
    """Both stages of a plan over one model, sharing its weights.

    Args:
        model: A dense Hugging Face model.
        tokenizer: The model's tokenizer, needed for text prompts, answer text and stop strings.
        plan: The plan; None runs the dense model.
        max_num_seqs: Number of sequences that decode at once.
        max_model_len: Limit of prompt and answer tokens together; None takes the model's limit.
        image_processor: The model's image processor, needed for prompts with images
            (:func:`rayapp.vision.llava.load_image_processor`).

    Raises:
        ModelError: The architecture is not supported.
        PlanError: The plan was made for another model, or prunes visual tokens of a text model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plan: PruningPlan | None = None,
        *,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        image_processor: Any = None,
    ) -> None:
        images = ImageSupport(image_processor) if image_processor else None
        self._stages = Stages(model, tokenizer, plan, max_model_len=max_model_len, images=images)
        self._tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.plan = self._stages.plan
        self.images = self._stages.images
        self.prefill = self._stages.prefill

    @property
    def placeholder(self) -> str:
        """The text that stands for an image in a prompt; :class:`RequestError` without images."""
        if self.images is None or self._tokenizer is None:
            raise RequestError(_NO_IMAGES)
        return str(self._tokenizer.convert_ids_to_tokens(self.images.intake.image_token_id))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),  # noqa: B008 - frozen
    ) -> list[Completion]:
        """Answer prompts in their order, with one set of parameters for all or one per prompt.

        Raises:
            RequestError: A prompt is empty or too long, or an image unreadable; nothing was run.
        """
        runs = [_Run(request, Timeline()) for request in self._requests(prompts, sampling)]
        decode = self._decode_engine([run.request for run in runs])
        by_id = {run.request.request_id: run for run in runs}
        waiting = deque(runs)
        while waiting or decode.num_running:
            while waiting and decode.num_free:
                run = waiting.popleft()
                run.transfer = self._stages.start(run.request, decode, run.timeline, run.add)
            for batch in decode.step():
                by_id[batch.request_id].add(batch)
        decode.check_integrity()
        return [self._completion(run) for run in runs]

    def answer_logits(
        self, prompt: Sequence[int] | ImagePrompt, answer_token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Logits ``(C, V)`` that predict every given answer token, computed on the serving path.

        Row ``i`` saw the prompt's KV as decode gets it, and answer tokens ``0..i-1``.
        """
        fed = tuple(answer_token_ids)[:-1]
        sampling = SamplingParams(max_tokens=len(fed) + 1, ignore_eos=True)
        request = self._request("answer-logits", prompt, sampling)
        first_V, segment = self.prefill.compute(request)
        rows = [] if first_V is None else [first_V]
        if len(rows) <= len(fed):
            decode = self._decode_engine([request])
            self._stages.hand_over(request, segment, decode, replay=fed)
            rows += [decode.advance()[0] for _ in range(len(fed) + 1 - len(rows))]
        return torch.stack(rows)

    def _requests(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[GenerationRequest]:
        if isinstance(prompts, str):
            raise RequestError("`prompts` is one string; pass a list of prompts")
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts but {len(each)} sampling parameters; pass one or as many"
            )
        requests = [
            self._request(f"local-{number}", prompt, params)
            for number, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        for request in requests:
            request.check_limits(
                max_model_len=self._stages.max_model_len,
                vocab_size=self._stages.vocab_size,
                image_token_id=self.images.intake.image_token_id if self.images else None,
            )
        return requests

    def _request(self, name: str, prompt: Prompt, sampling: SamplingParams) -> GenerationRequest:
        if not isinstance(prompt, ImagePrompt):
            return GenerationRequest(name, self._token_ids(prompt), sampling)
        if self.images is None:
            raise RequestError(_NO_IMAGES)
        token_ids, intake = self._token_ids(prompt.prompt), self.images.intake
        text = token_ids if prompt.text is None else self._token_ids(prompt.text, special=False)
        return GenerationRequest(
            name,
            token_ids,
            sampling,
            images=intake.take_all(prompt.images),
            text_token_ids=tuple(t for t in text if t != intake.image_token_id),
            visual_tokens=prompt.visual_tokens,
        )

    def _token_ids(self, prompt: str | Sequence[int], *, special: bool = True) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self._tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer; pass one, or pass token ids")
        return tuple(self._tokenizer(prompt, add_special_tokens=special)["input_ids"])

    def _decode_engine(self, requests: Sequence[GenerationRequest]) -> DecodeEngine:
        """Build a decode engine with room for the longest of the requests."""
        needs = [r.num_prompt_tokens + r.sampling.max_tokens for r in requests]
        return self._stages.decode_engine(
            max_num_seqs=max(1, min(self.max_num_seqs, len(requests))),
            max_model_len=max(needs, default=1),
        )

    def _completion(self, run: _Run) -> Completion:
        text = ""
        if self._tokenizer is not None:
            request = run.request
            stream = TextStream(
                self._tokenizer,
                request.sampling.stop,
                context=request.prompt_token_ids,
                min_tokens=request.sampling.min_tokens,
            )
            text = stream.push(run.token_ids) + stream.flush()
        return Completion(
            prompt_token_ids=run.request.prompt_token_ids,
            token_ids=tuple(run.token_ids),
            text=text,
            finish_reason=run.finish_reason or "length",
            logprobs=tuple(run.logprobs),
            timeline=run.timeline,
            transfer=run.transfer,
        )
