"""The prefill engine runs prompts; every one gives a KV segment, and a first token per answer.

Prompts enter as embeddings of their words and of the image tokens that are kept. A pass runs the
next tokens of any prompts, whole ones or chunks, and segments may share its memory; nothing is ever
padded.

Shapes: B = prompts that end with a pass, T = tokens of a pass, C = tokens of one prompt in it,
E = hidden size, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.engine.answer import Answer
from rayapp.engine.request import (
    GenerationRequest,
    PromptLogprobs,
    TokenBatch,
    TokenLogprobs,
)
from rayapp.engine.sampling import prompt_logprobs, sample
from rayapp.errors import PlanError, RequestError
from rayapp.kv.growing import Pass, PromptKV
from rayapp.kv.parts import Part, PartCutter
from rayapp.kv.segment import KVExtent, KVSegment
from rayapp.kv.select import num_prefilled, select_segment
from rayapp.models.passes.many_tokens import ManyTokensStack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.vision.cache import CacheCounts
from rayapp.vision.prompt import PromptEmbeddings, text_prompt
from rayapp.vision.reader import ImageReader

# Prompt tokens whose logits are in memory together, as many floats each as the vocabulary is large.
_SCORED_AT_ONCE = 128


@dataclass(frozen=True)
class PrefillOutput:
    """The result of one prefill: the first token of every answer, and the KV to send.

    ``firsts`` is empty if decode samples the first tokens (``first_token: decode``). ``segment`` is
    None if every answer ended with its first token (their ``finish_reason`` is set): then no KV
    travels. Where parts were cut before, it is the last of them. ``prompt_logprobs`` are those that
    the answers' requests ask for.
    """

    firsts: tuple[TokenBatch, ...]
    segment: KVSegment | None
    num_prompt_tokens: int
    prefill_s: float
    prompt_logprobs: PromptLogprobs = ()

    @property
    def first(self) -> TokenBatch | None:
        """The first token of the first answer; None if decode samples it."""
        return self.firsts[0] if self.firsts else None

    @property
    def finished(self) -> bool:
        """True if all answers are complete."""
        return _all_end(self.firsts)


@dataclass
class PrefillRun:
    """A prompt on its way through prefill: its embeddings, its answers, and its KV so far.

    ``cutter`` is there if parts of the KV may be cut before the prompt's end.
    """

    requests: tuple[GenerationRequest, ...]
    prompt: PromptEmbeddings
    answers: tuple[Answer, ...]
    kv: PromptKV
    extent: KVExtent
    begun_s: float
    cutter: PartCutter | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def num_best(self) -> int | None:
        """Alternatives to report beside every prompt token; None if nobody asks for them."""
        return self.requests[0].sampling.prompt_logprobs

    @property
    def num_left(self) -> int:
        """Number of tokens that are still to be run."""
        return self.kv.num_tokens - self.kv.num_done

    @property
    def num_parts_bytes(self) -> int:
        """Bytes, in the model's own type, of all KV that may leave in parts; 0 if it goes whole."""
        return 0 if self.cutter is None else self.cutter.num_bytes

    def hidden_CE(self, count: int) -> torch.Tensor:
        """Embeddings of the next ``count`` tokens."""
        return self.prompt.hidden_TE[self.kv.num_done : self.kv.num_done + count]

    def cut(self, *, least_bytes: int) -> Part | None:
        """Cut the next part of the KV, on any thread, while the rest of it is computed.

        The segment of :class:`PrefillOutput` then holds what follows the parts that were cut.

        Args:
            least_bytes: Bytes, in the model's own type, that make a part worth sending.

        Returns:
            The part, which shares the prompt's memory; None if it would be too small.
        """
        if self.cutter is None:
            return None
        return self.cutter.cut(self.kv, least_bytes=max(1, least_bytes))


def check_prunable(*, takes_images: bool) -> None:
    """Raise :class:`PlanError` if a plan prunes visual tokens of a model without images."""
    if not takes_images:
        raise PlanError(
            "the plan prunes visual tokens, but this model takes no images (or its image "
            "processor was not given); drop `visual_tokens`, or use another model"
        )


class PrefillEngine:
    """Runs prompts in chunks, and chunks of several prompts together.

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
        self.blocks = ManyTokensStack(stack)
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
        """Prefill one prompt in one pass.

        Raises:
            RequestError: The prompt is empty or too long, or has ids outside the vocabulary or an
                image that cannot be read.
            PlanError: The request's own ``visual_tokens`` cannot be applied.
        """
        run = self.begin(request)
        (output,) = self.advance([(run, run.num_left)])
        return output

    def begin(
        self, request: GenerationRequest, *others: GenerationRequest, in_parts: bool = False
    ) -> PrefillRun:
        """Embed a prompt, to be prefilled by calls of :meth:`advance`; raises as :meth:`run`.

        Args:
            request: The request to prefill.
            others: Requests for other answers to the same prompt, which get first tokens of their
                own from the same logits.
            in_parts: True if parts of the KV may leave before the prompt's end.
        """
        begun_s = time.monotonic()
        for each in (request, *others):
            self._check(each)
        run = self._begin((request, *others), self.embed(request), begun_s)
        if in_parts and self._may_travel(run):
            run.cutter = PartCutter(self.plan, self.stack, run.extent)
        return run

    def run_embedded(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[PromptEmbeddings]
    ) -> list[PrefillOutput]:
        """Prefill embedded requests in one pass; the results equal :meth:`run` up to rounding.

        Args:
            requests: Requests within the limits.
            prompts: The embeddings of :meth:`embed`.

        Returns:
            One output per request; its seconds are those of the pass, without the embedding.

        Raises:
            RequestError: A request lies outside the limits.
        """
        begun_s = time.monotonic()
        for request in requests:
            self._check(request)
        runs = [
            self._begin((request,), prompt, begun_s)
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        return self.advance([(run, run.num_left) for run in runs])

    def _begin(
        self, requests: tuple[GenerationRequest, ...], prompt: PromptEmbeddings, begun_s: float
    ) -> PrefillRun:
        num_run = num_prefilled(self.plan, prompt.num_tokens)
        answers = tuple(Answer(r, self._eos_token_ids, self._tokenizer) for r in requests)
        kv = PromptKV(self.stack, prompt.positions_T[:num_run])
        extent = KVExtent(
            prompt.num_prompt_tokens,
            num_run,
            prompt.num_visual_tokens_removed,
            prompt.is_compact,
        )
        run = PrefillRun(requests, prompt, answers, kv, extent, begun_s)
        if run.num_best is not None:
            run.prompt_logprobs.append(None)  # Nothing predicts the first token.
        return run

    @property
    def num_writing(self) -> int:
        """Number of blocks that write KV."""
        return sum(self.stack.writes_kv)

    def advance(
        self,
        chunks: Sequence[tuple[PrefillRun, int]],
        noted: Callable[[], None] | None = None,
    ) -> list[PrefillOutput]:
        """Run the next tokens of several prompts in one pass.

        Args:
            chunks: Every prompt with the number of its tokens to run, at most those that are left.
            noted: Called within the pass whenever one more block has written its KV. The engine
                waits for it, so it may only take note.

        Returns:
            The outputs of the prompts that are complete, in the order of ``chunks``.
        """
        return self.outputs(chunks, self._advance(chunks, noted))

    def outputs(
        self, chunks: Sequence[tuple[PrefillRun, int]], logits_BV: torch.Tensor | None
    ) -> list[PrefillOutput]:
        """The outputs of the prompts that a pass completed, by the logits after their last tokens.

        Args:
            chunks: The chunks of the pass.
            logits_BV: The logits, in the order of the prompts; None if decode samples from them.
        """
        ended = [run for run, _ in chunks if not run.num_left]
        firsts: Sequence[tuple[TokenBatch, ...]] = [()] * len(ended)
        if logits_BV is not None and self.plan.first_token == "prefill":
            firsts = _sample(ended, logits_BV)
        ended_s = time.monotonic()
        return [
            PrefillOutput(
                firsts=of_run,
                segment=None if _all_end(of_run) else self._segment(run),
                num_prompt_tokens=run.requests[0].num_prompt_tokens,
                prefill_s=ended_s - run.begun_s,
                prompt_logprobs=tuple(run.prompt_logprobs),
            )
            for run, of_run in zip(ended, firsts, strict=True)
        ]

    @torch.inference_mode()
    def _advance(
        self,
        chunks: Sequence[tuple[PrefillRun, int]],
        noted: Callable[[], None] | None = None,
    ) -> torch.Tensor | None:
        """Run a pass; return the logits ``(B, V)`` after the last token of every ended prompt."""
        chunks = [(run, count) for run, count in chunks if count]
        if not chunks:
            return None
        row, hidden_TE = self.begin_pass(chunks, noted)
        hidden_1TE = self.blocks.run(
            hidden_TE[None], row.positions_1T, row, row.masks, real_tokens=row.real_tokens
        )
        last_BE = self.end_pass(chunks, row, hidden_1TE[0])
        return None if last_BE is None else self.stack.logits(last_BE[:, None])[:, 0]

    def begin_pass(
        self, chunks: Sequence[tuple[PrefillRun, int]], noted: Callable[[], None] | None = None
    ) -> tuple[Pass, torch.Tensor]:
        """The cache of a pass over chunks that all have tokens, and their embeddings ``(T, E)``.

        Args:
            chunks: The arguments of :meth:`advance`.
            noted: Those of :meth:`advance`, too.
        """
        kvs, counts = [run.kv for run, _ in chunks], [count for _, count in chunks]
        hidden_TE = torch.cat([run.hidden_CE(count) for run, count in chunks])
        return Pass(kvs, counts, self.stack, noted, self.stack.device), hidden_TE

    def end_pass(
        self, chunks: Sequence[tuple[PrefillRun, int]], row: Pass, hidden_TE: torch.Tensor
    ) -> torch.Tensor | None:
        """Take note of a pass that has run.

        Args:
            chunks: The chunks of the pass.
            row: Its cache.
            hidden_TE: The hidden states after all blocks.

        Returns:
            The hidden states ``(B, E)`` after the last token of every prompt that ended, if logits
            are to follow.
        """
        row.finish()
        runs, counts = [run for run, _ in chunks], [count for _, count in chunks]
        for run, hidden_CE in zip(runs, hidden_TE.split(counts), strict=True):
            if run.num_best is not None:
                self._score_prompt(run, hidden_CE, run.num_best)
        ends = torch.tensor(counts).cumsum(0) - 1
        last_B = ends[[not run.num_left for run in runs]].to(hidden_TE.device)
        if self.plan.first_token == "decode" or not last_B.numel():
            return None
        return hidden_TE[last_B]

    def _score_prompt(self, run: PrefillRun, hidden_CE: torch.Tensor, num_best: int) -> None:
        """Add the log-probabilities of the tokens that follow those of a chunk."""
        token_ids = run.requests[0].prompt_token_ids
        following = token_ids[len(run.prompt_logprobs) : len(run.prompt_logprobs) + len(hidden_CE)]
        for start in range(0, len(following), _SCORED_AT_ONCE):
            part = following[start : start + _SCORED_AT_ONCE]
            logits_TV = self.stack.logits(hidden_CE[start : start + len(part), None])[:, 0]
            run.prompt_logprobs += prompt_logprobs(logits_TV, part, num_best)

    def _may_travel(self, run: PrefillRun) -> bool:
        """Whether an answer may go on after what prefill samples of it."""
        longest = max(request.sampling.max_tokens for request in run.requests)
        return self.plan.first_token == "decode" or longest > 1

    @torch.inference_mode()
    def _segment(self, run: PrefillRun) -> KVSegment:
        if run.cutter is not None:
            return run.cutter.rest(run.kv).segment()
        prompt = run.prompt
        return select_segment(
            self.plan,
            run.kv.captured(),
            run.kv.positions_T,
            prompt.num_prompt_tokens,
            num_visual_tokens_removed=prompt.num_visual_tokens_removed,
            is_compact=prompt.is_compact,
        )

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

    def compute(self, request: GenerationRequest) -> tuple[torch.Tensor | None, KVSegment]:
        """Logits ``(V,)`` of answer token 0 (None if decode computes them), and the segment."""
        run = self.begin(request)
        logits_BV = self._advance([(run, run.num_left)])
        return None if logits_BV is None else logits_BV[0], self._segment(run)


def _all_end(firsts: Sequence[TokenBatch]) -> bool:
    """True if the prompt's answers all end with their first token."""
    return bool(firsts) and all(first.finish_reason for first in firsts)


def _sample(runs: Sequence[PrefillRun], logits_BV: torch.Tensor) -> list[tuple[TokenBatch, ...]]:
    """Sample the first token of every answer, those of one prompt from the same logits."""
    rows = [row for row, run in enumerate(runs) for _ in run.requests]
    requests = [request for run in runs for request in run.requests]
    answers = [answer for run in runs for answer in run.answers]
    params = [request.sampling for request in requests]
    if len(rows) > len(runs):
        logits_BV = logits_BV[rows]
    adjustments = [answer.adjustment for answer in answers]
    tokens, logprobs = sample(logits_BV, params, [0] * len(rows), adjustments)
    firsts = [
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
    ordered = iter(firsts)
    return [tuple(next(ordered) for _ in run.requests) for run in runs]
