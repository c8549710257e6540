"""NLL and KL of continuations, teacher-forced through the stages that serve.

The prompt runs through the plan's prefill stage, its KV is cut and encoded as it would travel, and
the continuation runs through the plan's decode stage. Unlike the search's evaluator, which reuses
states between candidates, this module runs the very stacks that the engines run, so the two check
one another.
Shapes: B = examples with prompts of equal length, T = prompt tokens, C = continuation tokens
(padded on the right), V = vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.kv.cache import CaptureCache, PrefixCache
from rayapp.kv.select import num_prefilled, select_prefix
from rayapp.models.likelihood import kl, nll
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

BATCH_TOKENS = 4_096
"""Number of tokens of a batch (project default)."""


@dataclass(frozen=True)
class LineLikelihood:
    """Sums over the continuation tokens of one example, in nats.

    ``dense_match`` and ``plan_match`` say whether every continuation token, the end marker
    included, is the likeliest after the tokens before it. Greedy decoding reproduces the completion
    exactly in that case (near ties between two batch shapes aside).
    """

    dense_nll: float
    plan_nll: float
    kl: float
    num_tokens: int
    dense_match: bool
    plan_match: bool


@dataclass(frozen=True)
class HandedOver:
    """The start of decode: the KV that arrived, and the source of the first answer token.

    Attributes:
        prefix: The prompt's KV in decode.
        positions_T: Positions of the tokens that prefill ran.
        first_B1V: Logits of the first answer token, if prefill gives them.
        last_B1: The last prompt token, if decode runs it.
    """

    prefix: PrefixCache
    positions_T: torch.Tensor
    first_B1V: torch.Tensor | None
    last_B1: torch.Tensor | None

    def repeated(self, counts_B: torch.Tensor) -> HandedOver:
        """Copy every prompt's row for each of its ``counts_B`` continuations; prefill ran once."""
        first, last = (
            None if rows is None else rows.repeat_interleave(counts_B.to(rows.device), dim=0)
            for rows in (self.first_B1V, self.last_B1)
        )
        return HandedOver(self.prefix.repeated(counts_B), self.positions_T, first, last)


class TwoStages:
    """Both stages of a plan over one model, teacher-forced."""

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.plan = plan
        self.prefill = BlockStack(model, plan, "prefill")
        self.decode = BlockStack(model, plan, "decode")

    def logits(self, prompts_BT: torch.Tensor, continuations_BC: torch.Tensor) -> torch.Tensor:
        """Logits of every continuation token, ``(B, C, V)``."""
        return self.continued(self.hand_over(prompts_BT), continuations_BC)

    @torch.inference_mode()
    def hand_over(self, prompts_BT: torch.Tensor) -> HandedOver:
        """Prefill prompts, and give decode their KV as it would arrive."""
        num_tokens, by_prefill = prompts_BT.shape[1], self.plan.first_token == "prefill"
        num_run = num_prefilled(self.plan, num_tokens)
        cache, positions_T = CaptureCache.for_stack(self.prefill), torch.arange(num_run)
        first_B1V = None
        if num_run:
            hidden_BTE = self.prefill.embed(prompts_BT[:, :num_run])
            hidden_BTE = self.prefill.run(hidden_BTE, positions_T[None], cache)
            if by_prefill:
                first_B1V = self.prefill.logits(hidden_BTE[:, -1:])
        prefix = select_prefix(self.plan, cache, positions_T)
        return HandedOver(
            prefix, positions_T, first_B1V, None if by_prefill else prompts_BT[:, -1:]
        )

    @torch.inference_mode()
    def continued(self, handed: HandedOver, continuations_BC: torch.Tensor) -> torch.Tensor:
        """Logits of every continuation token, ``(B, C, V)``, teacher-forced through decode."""
        fed_BC = continuations_BC[:, :-1]
        if handed.last_B1 is not None:
            fed_BC = torch.cat([handed.last_B1, fed_BC], dim=1)
        parts = [] if handed.first_B1V is None else [handed.first_B1V]
        if fed_BC.shape[1]:
            parts.append(self._decode(handed, fed_BC))
        return torch.cat(parts, dim=1)

    def _decode(self, handed: HandedOver, fed_BC: torch.Tensor) -> torch.Tensor:
        """Logits after every token of ``fed_BC``, from the KV that arrived at decode."""
        start, prefix = len(handed.positions_T), handed.prefix
        positions_C = torch.arange(start, start + fed_BC.shape[1])
        masks = {b: mask.to(self.decode.device) for b, mask in prefix.masks(positions_C).items()}
        hidden_BCE = self.decode.embed(fed_BC)
        hidden_BCE = self.decode.run(hidden_BCE, positions_C[None], prefix, masks)
        return self.decode.logits(hidden_BCE)


def likelihoods(
    dense: TwoStages, plan: TwoStages, lines: Sequence[TokenizedLine]
) -> Iterator[tuple[int, LineLikelihood]]:
    """Score every line with both; yields ``(index, sums)`` batch by batch, in no stated order."""
    for batch in equal_batches(lines):
        prompts_BT, continuations_BC = padded(lines, batch)
        dense_BCV = dense.logits(prompts_BT, continuations_BC)
        plan_BCV = plan.logits(prompts_BT, continuations_BC)
        for row, index in enumerate(batch):
            yield index, line_likelihood(dense_BCV[row], plan_BCV[row], lines[index].continuation)


def line_likelihood(
    dense_CV: torch.Tensor, plan_CV: torch.Tensor, continuation: Sequence[int]
) -> LineLikelihood:
    """Sums over the real tokens of one line, whose logits may be followed by padding's."""
    ids_C = torch.tensor(continuation)
    dense_CV, plan_CV = dense_CV[: len(ids_C)], plan_CV[: len(ids_C)]
    return LineLikelihood(
        dense_nll=float(nll(dense_CV, ids_C).sum()),
        plan_nll=float(nll(plan_CV, ids_C).sum()),
        kl=float(kl(dense_CV, plan_CV).sum()),
        num_tokens=len(ids_C),
        dense_match=bool((dense_CV.argmax(-1).cpu() == ids_C).all()),
        plan_match=bool((plan_CV.argmax(-1).cpu() == ids_C).all()),
    )


def image_likelihoods(
    dense: LocalPipeline, plan: LocalPipeline, lines: Sequence[TokenizedImageLine]
) -> Iterator[LineLikelihood]:
    """Score lines about images one by one, through the path that serves both sides."""
    for line in lines:
        dense_CV, plan_CV = (
            side.answer_logits(line.image_prompt, line.continuation) for side in (dense, plan)
        )
        yield line_likelihood(dense_CV, plan_CV, line.continuation)


def padded(
    lines: Sequence[TokenizedLine], batch: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts ``(B, T)`` of equal length, and continuations ``(B, C)``, padded on the right."""
    prompts_BT = torch.tensor([lines[i].prompt for i in batch])
    longest = max(len(lines[i].continuation) for i in batch)
    continuations_BC = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, index in enumerate(batch):
        ids = lines[index].continuation
        continuations_BC[row, : len(ids)] = torch.tensor(ids)
    return prompts_BT, continuations_BC


def equal_batches(lines: Sequence[TokenizedLine]) -> Iterator[list[int]]:
    """Indices of lines with prompts of equal length: only continuations are padded."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, line in enumerate(lines):
        by_length[len(line.prompt)].append(index)
    for length in sorted(by_length):
        group = by_length[length]
        size = max(1, BATCH_TOKENS // (length + max(len(lines[i].continuation) for i in group)))
        for start in range(0, len(group), size):
            yield group[start : start + size]
