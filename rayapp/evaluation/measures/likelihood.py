"""NLL and KL of continuations, teacher-forced through the stages that serve.

The prompt runs through the plan's prefill stage, its KV is cut and encoded as it would travel, and
the continuation runs through the plan's decode stage. Unlike the search's evaluator, which reuses
states between candidates, this module runs the very stacks that the engines run, so the two check
one another.
Batches of equally long prompts run end to end (:mod:`rayapp.models.real_tokens`), so that examples
of many lengths cost no more than examples of one; and only states that predict a scored token meet
the head, a slice of them at a time.
Shapes: B = examples with prompts of equal length, T = prompt tokens, C = continuation tokens
(padded on the right), N = real tokens of all batches, E = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.kv.cache import BatchCache, CaptureCache, JoinedCaches, PrefixCache
from rayapp.kv.select import num_prefilled, select_prefix
from rayapp.models.likelihood import kl, nll, slice_tokens
from rayapp.models.real_tokens import RealTokens
from rayapp.models.stack import BlockStack, Masks
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
        first_B1E: States that predict the first answer token, if prefill makes them.
        last_B1: The last prompt token, if decode runs it.
    """

    prefix: PrefixCache
    positions_T: torch.Tensor
    first_B1E: torch.Tensor | None
    last_B1: torch.Tensor | None

    def repeated(self, counts_B: torch.Tensor) -> HandedOver:
        """Copy every prompt's row for each of its ``counts_B`` continuations; prefill ran once."""
        first, last = (
            None if rows is None else rows.repeat_interleave(counts_B.to(rows.device), dim=0)
            for rows in (self.first_B1E, self.last_B1)
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

    def hand_over(self, prompts_BT: torch.Tensor) -> HandedOver:
        """Prefill prompts, and give decode their KV as it would arrive."""
        return self.hand_over_all([prompts_BT])[0]

    @torch.inference_mode()
    def hand_over_all(self, batches: Sequence[torch.Tensor]) -> list[HandedOver]:
        """Prefill batches of prompts end to end, and hand over the KV of every batch."""
        by_prefill = self.plan.first_token == "prefill"
        caches = [CaptureCache.for_stack(self.prefill) for _ in batches]
        positions = [
            torch.arange(num_prefilled(self.plan, prompts_BT.shape[1])) for prompts_BT in batches
        ]
        run = [number for number, positions_T in enumerate(positions) if len(positions_T)]
        states: dict[int, torch.Tensor] = {}
        if run:
            ids = [batches[number][:, : len(positions[number])] for number in run]
            masks = [self.prefill.window_masks(positions[number][None]) for number in run]
            hidden = self._run(
                self.prefill, ids, [positions[n] for n in run], [caches[n] for n in run], masks
            )
            states = dict(zip(run, hidden, strict=True))
        return [
            HandedOver(
                select_prefix(self.plan, cache, positions_T),
                positions_T,
                states[number][:, -1:] if by_prefill else None,
                None if by_prefill else prompts_BT[:, -1:],
            )
            for number, (prompts_BT, positions_T, cache) in enumerate(
                zip(batches, positions, caches, strict=True)
            )
        ]

    @torch.inference_mode()
    def continued(self, handed: HandedOver, continuations_BC: torch.Tensor) -> torch.Tensor:
        """Logits of every continuation token, ``(B, C, V)``, teacher-forced through decode."""
        num_tokens = continuations_BC.shape[1]
        lengths_B = torch.full((len(continuations_BC),), num_tokens)
        states_NE = self.predicting_states([handed], [continuations_BC], [lengths_B])
        return self.decode.logits(states_NE.view(len(continuations_BC), num_tokens, -1))

    @torch.inference_mode()
    def predicting_states(
        self,
        handed: Sequence[HandedOver],
        batches: Sequence[torch.Tensor],
        lengths: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The states that predict every real continuation token, teacher-forced through decode.

        Args:
            handed: The start of decode, batch by batch.
            batches: Continuations ``(B, C)``, padded on the right.
            lengths: Numbers ``(B,)`` of real tokens of the continuations.

        Returns:
            States ``(N, E)`` in the order of batches, rows and tokens.
        """
        fed, starts, valid = [], [], []
        for each, continuations_BC, lengths_B in zip(handed, batches, lengths, strict=True):
            fed_BC = continuations_BC[:, :-1]
            if each.last_B1 is not None:
                fed_BC = torch.cat([each.last_B1, fed_BC], dim=1)
            fed.append(fed_BC)
            starts.append(len(each.positions_T))
            valid.append(torch.arange(continuations_BC.shape[1]) < lengths_B[:, None])
        masks = [
            each.prefix.masks(torch.arange(start, start + fed_BC.shape[1]))
            for each, start, fed_BC in zip(handed, starts, fed, strict=True)
        ]
        run = [number for number, fed_BC in enumerate(fed) if fed_BC.shape[1]]
        hidden = self._run(
            self.decode,
            [fed[n] for n in run],
            [torch.arange(starts[n], starts[n] + fed[n].shape[1]) for n in run],
            [handed[n].prefix for n in run],
            [masks[n] for n in run],
            [valid[n][:, valid[n].shape[1] - fed[n].shape[1] :] for n in run],
        )
        decoded = dict(zip(run, hidden, strict=True))
        rows = []
        for number, (each, valid_BC) in enumerate(zip(handed, valid, strict=True)):
            states = [] if each.first_B1E is None else [each.first_B1E]
            states += [decoded[number]] if number in decoded else []
            rows.append(torch.cat(states, dim=1)[valid_BC.to(states[0].device)])
        return torch.cat(rows)

    def _run(
        self,
        stack: BlockStack,
        ids: Sequence[torch.Tensor],
        positions: Sequence[torch.Tensor],
        caches: Sequence[BatchCache],
        masks: Sequence[Masks],
        valid: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """States ``(B, T, E)`` that leave a stage, batch by batch, with zeros for padding."""
        if not ids:
            return ()
        shapes = [(ids_BT.shape[0], ids_BT.shape[1]) for ids_BT in ids]
        tokens = RealTokens(valid) if valid is not None else RealTokens.full(*shapes)
        placed = [each.expand(shape) for each, shape in zip(positions, shapes, strict=True)]
        hidden_1NE = stack.run(
            stack.embed(tokens.joined(ids)),
            tokens.joined(placed),
            JoinedCaches(caches, tokens),
            {
                block: tuple(_on(each.get(block), stack.device) for each in masks)
                for block in range(stack.num_blocks)
            },
            real_tokens=tokens,
        )
        return tokens.apart(hidden_1NE)


def _on(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if mask is None else mask.to(device)


def likelihoods(
    dense: TwoStages, plan: TwoStages, lines: Sequence[TokenizedLine]
) -> Iterator[tuple[int, LineLikelihood]]:
    """Score every line with both; yields ``(index, sums)`` batch by batch, in no stated order."""
    for group in line_groups(lines):
        prompts, continuations = zip(*(padded(lines, batch) for batch in group), strict=True)
        lengths = [torch.tensor([len(lines[i].continuation) for i in batch]) for batch in group]
        dense_NE, plan_NE = (
            side.predicting_states(side.hand_over_all(prompts), continuations, lengths)
            for side in (dense, plan)
        )
        order = [index for batch in group for index in batch]
        ids_N = torch.tensor([token for index in order for token in lines[index].continuation])
        measured = _measured(dense, plan, dense_NE, plan_NE, ids_N)
        counts = torch.cat(lengths).tolist()
        for index, line in zip(order, zip(*(m.split(counts) for m in measured), strict=True),
                               strict=True):  # fmt: skip
            yield index, _sums(*line)


@torch.inference_mode()
def _measured(
    dense: TwoStages,
    plan: TwoStages,
    dense_NE: torch.Tensor,
    plan_NE: torch.Tensor,
    token_ids_N: torch.Tensor,
) -> list[torch.Tensor]:
    """The measures of :func:`_token_measures` from states, by slices that bound memory."""
    step = slice_tokens(dense.decode.vocab_size)
    parts = []
    for start in range(0, len(token_ids_N), step):
        rows = slice(start, start + step)
        dense_NV = dense.decode.logits(dense_NE[None, rows])[0]
        plan_NV = plan.decode.logits(plan_NE[None, rows])[0]
        parts.append(_token_measures(dense_NV, plan_NV, token_ids_N[rows]))
    return [torch.cat(measure) for measure in zip(*parts, strict=True)]


def _token_measures(
    dense_CV: torch.Tensor, plan_CV: torch.Tensor, token_ids_C: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """NLL of dense and plan, KL, and whether dense and plan find the token; all ``(C,)``."""
    return (
        nll(dense_CV, token_ids_C).cpu(),
        nll(plan_CV, token_ids_C).cpu(),
        kl(dense_CV, plan_CV).cpu(),
        dense_CV.argmax(-1).cpu() == token_ids_C,
        plan_CV.argmax(-1).cpu() == token_ids_C,
    )


def _sums(
    dense_nll_C: torch.Tensor,
    plan_nll_C: torch.Tensor,
    kl_C: torch.Tensor,
    dense_matches_C: torch.Tensor,
    plan_matches_C: torch.Tensor,
) -> LineLikelihood:
    return LineLikelihood(
        dense_nll=float(dense_nll_C.sum()),
        plan_nll=float(plan_nll_C.sum()),
        kl=float(kl_C.sum()),
        num_tokens=len(kl_C),
        dense_match=bool(dense_matches_C.all()),
        plan_match=bool(plan_matches_C.all()),
    )


def line_likelihood(
    dense_CV: torch.Tensor, plan_CV: torch.Tensor, continuation: Sequence[int]
) -> LineLikelihood:
    """Sums over the real tokens of one line, whose logits may be followed by padding's."""
    rows = slice(len(continuation))
    return _sums(*_token_measures(dense_CV[rows], plan_CV[rows], torch.tensor(continuation)))


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


def line_groups(lines: Sequence[TokenizedLine]) -> Iterator[list[list[int]]]:
    """Batches of :func:`equal_batches` that run end to end."""
    return joined_groups(equal_batches(lines), lambda batch: _padded_tokens(lines, batch))


def _padded_tokens(lines: Sequence[TokenizedLine], batch: Sequence[int]) -> int:
    longest = max(len(lines[index].continuation) for index in batch)
    return len(batch) * (len(lines[batch[0]].prompt) + longest)


def joined_groups(
    batches: Iterable[list[int]], num_tokens: Callable[[list[int]], int]
) -> Iterator[list[list[int]]]:
    """Batches that run end to end: as many in a row as ``BATCH_TOKENS`` allow, at least one."""
    group: list[list[int]] = []
    total = 0
    for batch in batches:
        size = num_tokens(batch)
        if group and total + size > BATCH_TOKENS:
            yield group
            group, total = [], 0
        group.append(batch)
        total += size
    if group:
        yield group
