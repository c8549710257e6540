"""Prefill: one prompt at a time through the prefill stage, to a first token and a KV segment.

Prompts enter as embeddings: those of their tokens, and of the image tokens that are kept.

Shapes: T = prompt tokens run, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.engine.answer import Answer
from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.engine.sampling import choose_tokens, token_logprobs
from rayapp.errors import PlanError, RequestError
from rayapp.kv.cache import CaptureCache
from rayapp.kv.segment import KVSegment
from rayapp.kv.select import num_prefilled, select_segment
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.vision.prompt import PromptEmbeddings, text_prompt
from rayapp.vision.reader import ImageReader


@dataclass(frozen=True)
class PrefillOutput:
    """What a prefill leaves behind.

    ``first`` is None where decode samples the first token (``first_token: decode``). ``segment`` is
    None where the answer ended with its first token (``first.finish_reason`` is set): nothing
    travels.
    """

    first: TokenBatch | None
    segment: KVSegment | None
    num_prompt_tokens: int
    prefill_s: float

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.first is not None and self.first.finish_reason is not None


def check_prunable(*, takes_images: bool) -> None:
    """Raise :class:`PlanError` where a plan that prunes visual tokens has none to prune."""
    if not takes_images:
        raise PlanError(
            "the plan prunes visual tokens, but this model takes no images (or its image "
            "processor was not given); drop `visual_tokens`, or use another model"
        )


class PrefillEngine:
    """Runs prompts one by one.

    Args:
        stack: The prefill stage.
        plan: What travels, and which stage samples the first token.
        max_model_len: Most tokens of prompt and answer together.
        eos_token_ids: Tokens that end an answer.
        tokenizer: Needed for requests with stop strings.
        images: Reads the images of prompts; None serves text only.

    Raises:
        PlanError: The plan prunes visual tokens in a way that this model does not allow.
    """

    def __init__(
        self,
        stack: BlockStack,
        plan: PruningPlan,
        *,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        images: ImageReader | None = None,
    ) -> None:
        self.stack = stack
        self.plan = plan
        self.max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer
        self._images = images
        self._image_token_id = images.intake.image_token_id if images else None
        if plan.visual_tokens is not None:
            check_prunable(takes_images=images is not None)
        if plan.visual_tokens is not None and images is not None:
            images.check_rule(plan.visual_tokens)

    def run(self, request: GenerationRequest) -> PrefillOutput:
        """Prefill one prompt.

        Raises:
            RequestError: The prompt is empty, too long, has ids outside the vocabulary, or an image
                that cannot be read.
            PlanError: The request's own ``visual_tokens`` cannot be applied.
        """
        begun_s = time.monotonic()
        request.check_limits(
            max_model_len=self.max_model_len,
            vocab_size=self.stack.vocab_size,
            image_token_id=self._image_token_id,
        )
        answer = Answer(request, self._eos_token_ids, self._tokenizer)
        logits_V, segment = self.compute(self.embed(request))
        first = None if logits_V is None else _sample(request, answer, logits_V)
        finished = first is not None and first.finish_reason is not None
        return PrefillOutput(
            first=first,
            segment=None if finished else segment,
            num_prompt_tokens=request.num_prompt_tokens,
            prefill_s=time.monotonic() - begun_s,
        )

    @torch.inference_mode()
    def embed(self, request: GenerationRequest) -> PromptEmbeddings:
        """What is run of a request that lies within the limits; raises as :meth:`run` does."""
        token_ids = request.prompt_token_ids
        if self._images is None or not request.images:
            return text_prompt(token_ids, self.stack.embed)
        if self.plan.first_token == "decode" and token_ids[-1] == self._image_token_id:
            raise RequestError(
                "the prompt ends with an image, but under this plan decode runs its last token; "
                "put text after the image"
            )
        rule = request.visual_tokens or self.plan.visual_tokens
        return self._images.embed(token_ids, request.images, rule, request.text_token_ids)

    @torch.inference_mode()
    def compute(self, prompt: PromptEmbeddings) -> tuple[torch.Tensor | None, KVSegment]:
        """Logits ``(V,)`` of answer token 0, None where decode computes them; and the segment."""
        stack = self.stack
        num_run = num_prefilled(self.plan, prompt.num_tokens)
        cache = CaptureCache.for_stack(stack)
        positions_T = prompt.positions_T[:num_run]
        logits_V = None
        if num_run:
            hidden_1TE = stack.run(prompt.hidden_TE[None, :num_run], positions_T[None], cache)
            if num_run == prompt.num_tokens:
                logits_V = stack.logits(hidden_1TE[:, -1:])[0, 0]
        segment = select_segment(
            self.plan,
            cache,
            positions_T,
            prompt.num_prompt_tokens,
            num_visual_tokens_removed=prompt.num_visual_tokens_removed,
            is_compact=prompt.is_compact,
        )
        return logits_V, segment


def _sample(request: GenerationRequest, answer: Answer, logits_V: torch.Tensor) -> TokenBatch:
    params = [request.sampling]
    tokens = choose_tokens(logits_V[None], params, [0])
    logprobs = token_logprobs(logits_V[None], tokens, params)
    return TokenBatch(
        request_id=request.request_id,
        attempt=request.attempt,
        first_index=0,
        token_ids=tuple(tokens),
        finish_reason=answer.take(tokens[0]),
        logprobs=tuple(entry for entry in logprobs if entry is not None),
    )
