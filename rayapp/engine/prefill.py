"""Prefill: one prompt at a time through the prefill stage, to a first token and a KV segment.

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
from rayapp.kv.cache import CaptureCache
from rayapp.kv.segment import KVSegment
from rayapp.kv.select import num_prefilled, select_segment
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan


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


class PrefillEngine:
    """Runs prompts one by one.

    Args:
        stack: The prefill stage.
        plan: What travels, and which stage samples the first token.
        max_model_len: Most tokens of prompt and answer together.
        eos_token_ids: Tokens that end an answer.
        tokenizer: Needed for requests with stop strings.
    """

    def __init__(
        self,
        stack: BlockStack,
        plan: PruningPlan,
        *,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.stack = stack
        self.plan = plan
        self.max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer = tokenizer

    def run(self, request: GenerationRequest) -> PrefillOutput:
        """Prefill one prompt.

        Raises:
            RequestError: The prompt is empty, too long, or has ids outside the vocabulary.
        """
        begun_s = time.monotonic()
        request.check_limits(max_model_len=self.max_model_len, vocab_size=self.stack.vocab_size)
        answer = Answer(request, self._eos_token_ids, self._tokenizer)
        logits_V, segment = self.compute(request.prompt_token_ids)
        first = None if logits_V is None else _sample(request, answer, logits_V)
        finished = first is not None and first.finish_reason is not None
        return PrefillOutput(
            first=first,
            segment=None if finished else segment,
            num_prompt_tokens=request.num_prompt_tokens,
            prefill_s=time.monotonic() - begun_s,
        )

    @torch.inference_mode()
    def compute(self, prompt_token_ids: tuple[int, ...]) -> tuple[torch.Tensor | None, KVSegment]:
        """Logits ``(V,)`` of answer token 0, None where decode computes them; and the segment."""
        stack, num_tokens = self.stack, len(prompt_token_ids)
        num_run = num_prefilled(self.plan, num_tokens)
        cache = CaptureCache.for_stack(stack)
        positions_T = torch.arange(num_run)
        logits_V = None
        if num_run:
            token_ids_1T = torch.tensor([prompt_token_ids[:num_run]])
            hidden_1TE = stack.run(stack.embed(token_ids_1T), positions_T[None], cache)
            if num_run == num_tokens:
                logits_V = stack.logits(hidden_1TE[:, -1:])[0, 0]
        return logits_V, select_segment(self.plan, cache, positions_T, num_tokens)


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
