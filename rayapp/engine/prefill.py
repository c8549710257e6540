"""The prefill engine runs prompts and gives a first token and a KV segment per prompt.

Prompts enter as embeddings of their words and of the image tokens that are kept. Prompts with
equally many tokens to run may share a pass, and their segments its memory; nothing is ever padded.

Shapes: B = prompts of a pass, T = prompt tokens run, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.engine.answer import Answer
from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.engine.sampling import choose_tokens, token_logprobs
from rayapp.errors import IntegrityError, PlanError, RequestError
from rayapp.kv.cache import CaptureCache
from rayapp.kv.segment import KVSegment
from rayapp.kv.select import num_prefilled, select_segment
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.vision.prompt import PromptEmbeddings, text_prompt
from rayapp.vision.reader import CacheCounts, ImageReader


@dataclass(frozen=True)
class PrefillOutput:
    """The result of one prefill: the first token and the KV to send.

    ``first`` is None if decode samples the first token (``first_token: decode``). ``segment`` is
    None if the answer ended with its first token (``first.finish_reason`` is set): then no KV
    travels.
    """

    first: TokenBatch | None
    segment: KVSegment | None
    num_prompt_tokens: int
    prefill_s: float

    @property
    def finished(self) -> bool:
        """True if the answer is complete."""
        return self.first is not None and self.first.finish_reason is not None


def check_prunable(*, takes_images: bool) -> None:
    """Raise :class:`PlanError` if a plan prunes visual tokens of a model without images."""
    if not takes_images:
        raise PlanError(
            "the plan prunes visual tokens, but this model takes no images (or its image "
            "processor was not given); drop `visual_tokens`, or use another model"
        )


class PrefillEngine:
    """Runs prompts one by one, or prompts of equal length together.

    Args:
        stack: The blocks of the prefill stage.
        plan: The plan, which says what travels and which stage samples the first token.
        max_model_len: Limit of prompt and answer tokens together.
        eos_token_ids: Tokens that end an answer.
        tokenizer: The model's tokenizer, needed for requests with stop strings.
        images: The reader of images in prompts; None serves text only.

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

    @property
    def image_cache(self) -> CacheCounts | None:
        """State of the cache of encoded images, None without images; any thread may read it."""
        return self._images.cache.counts if self._images else None

    def run(self, request: GenerationRequest) -> PrefillOutput:
        """Prefill one prompt.

        Raises:
            RequestError: The prompt is empty or too long, or has ids outside the vocabulary or an
                image that cannot be read.
            PlanError: The request's own ``visual_tokens`` cannot be applied.
        """
        begun_s = time.monotonic()
        self._check(request)
        return self._outputs([request], [self.embed(request)], begun_s)[0]

    def run_embedded(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[PromptEmbeddings]
    ) -> list[PrefillOutput]:
        """Prefill embedded requests in one pass; the results equal :meth:`run` up to rounding.

        Args:
            requests: Requests within the limits.
            prompts: The embeddings of :meth:`embed`, with equally many tokens to run.

        Returns:
            One output per request; its seconds are those of the pass, without the embedding.

        Raises:
            RequestError: A request lies outside the limits.
            IntegrityError: The prompts have unequal numbers of tokens to run.
        """
        begun_s = time.monotonic()
        for request in requests:
            self._check(request)
        return self._outputs(requests, prompts, begun_s)

    def _outputs(
        self,
        requests: Sequence[GenerationRequest],
        prompts: Sequence[PromptEmbeddings],
        begun_s: float,
    ) -> list[PrefillOutput]:
        answers = [Answer(request, self._eos_token_ids, self._tokenizer) for request in requests]
        logits_BV, segments = self.compute_batch(prompts)
        firsts: Sequence[TokenBatch | None] = [None] * len(requests)
        if logits_BV is not None:
            firsts = _sample(requests, answers, logits_BV)
        prefill_s = time.monotonic() - begun_s
        return [
            PrefillOutput(
                first=first,
                segment=None if first is not None and first.finish_reason else segment,
                num_prompt_tokens=request.num_prompt_tokens,
                prefill_s=prefill_s,
            )
            for request, first, segment in zip(requests, firsts, segments, strict=True)
        ]

    def _check(self, request: GenerationRequest) -> None:
        request.check_limits(
            max_model_len=self.max_model_len,
            vocab_size=self.stack.vocab_size,
            image_token_id=self._image_token_id,
        )

    @torch.inference_mode()
    def embed(self, request: GenerationRequest) -> PromptEmbeddings:
        """The embeddings to run for a request within the limits; raises as :meth:`run` does."""
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

    def compute(self, prompt: PromptEmbeddings) -> tuple[torch.Tensor | None, KVSegment]:
        """Logits ``(V,)`` of answer token 0 (None if decode computes them), and the segment."""
        logits_BV, segments = self.compute_batch([prompt])
        return None if logits_BV is None else logits_BV[0], segments[0]

    @torch.inference_mode()
    def compute_batch(
        self, prompts: Sequence[PromptEmbeddings]
    ) -> tuple[torch.Tensor | None, list[KVSegment]]:
        """Run :meth:`compute` for several prompts at their own positions; logits ``(B, V)``.

        Raises:
            IntegrityError: The prompts have unequal numbers of tokens to run.
        """
        lengths = {prompt.num_tokens for prompt in prompts}
        if len(lengths) != 1:
            raise IntegrityError(
                f"prompts of {sorted(lengths)} tokens to run cannot share a pass; group them"
            )
        num_tokens = lengths.pop()
        num_run = num_prefilled(self.plan, num_tokens)
        positions_BT = torch.stack([prompt.positions_T[:num_run] for prompt in prompts])
        cache, logits_BV = CaptureCache.for_stack(self.stack), None
        if num_run:
            hidden_BTE = torch.stack([prompt.hidden_TE[:num_run] for prompt in prompts])
            hidden_BTE = self.stack.run(hidden_BTE, positions_BT, cache)
            if num_run == num_tokens:
                logits_BV = self.stack.logits(hidden_BTE[:, -1:])[:, 0]
        segments = [
            select_segment(
                self.plan,
                self._row(cache, number),
                positions_BT[number],
                prompt.num_prompt_tokens,
                num_visual_tokens_removed=prompt.num_visual_tokens_removed,
                is_compact=prompt.is_compact,
            )
            for number, prompt in enumerate(prompts)
        ]
        return logits_BV, segments

    def _row(self, cache: CaptureCache, number: int) -> CaptureCache:
        """The KV of one prompt of a pass; it shares memory with ``cache``."""
        row = CaptureCache.for_stack(self.stack)
        for block in cache.blocks:
            keys_BHND, values_BHND = cache.entries(block)
            row.update(keys_BHND[number : number + 1], values_BHND[number : number + 1], block)
        return row


def _sample(
    requests: Sequence[GenerationRequest], answers: Sequence[Answer], logits_BV: torch.Tensor
) -> list[TokenBatch]:
    """Sample the first token of every answer."""
    params = [request.sampling for request in requests]
    tokens = choose_tokens(logits_BV, params, [0] * len(requests))
    logprobs = token_logprobs(logits_BV, tokens, params)
    return [
        TokenBatch(
            request_id=request.request_id,
            attempt=request.attempt,
            first_index=0,
            token_ids=(token,),
            finish_reason=answer.take(token),
            logprobs=() if logprob is None else (logprob,),
        )
        for request, answer, token, logprob in zip(requests, answers, tokens, logprobs, strict=True)
    ]
