"""The score computed without any reuse, built differently: the oracle of the evaluator.

Every line runs alone, on the stacks that ``apply_stage`` makes for the two stages. The prompt runs
in one pass, its KV goes through :func:`rayapp.kv.select.select_segment` and the codec of the wire,
and the continuation goes token by token into a growing cache that needs no mask. Shapes: H = KV
heads, N = entries, D = head dimension, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from rayapp.data.lines import TokenizedLine
from rayapp.kv.cache import CaptureCache
from rayapp.kv.quantize import decode, encode
from rayapp.kv.segment import KVSegment
from rayapp.kv.select import select_segment
from rayapp.models.blocks import signature_of
from rayapp.models.healed import HealedWeights, attach
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.objective import (
    Score,
    combine,
    line_sum,
    reference_of,
    token_values,
)
from rayapp.pruning.settings.objective import Objective


def naive_scores(
    model: PreTrainedModel,
    calibration: Calibration,
    objective: Objective,
    candidates: Sequence[Candidate],
    weights_of: Callable[[Candidate], HealedWeights | None] = lambda _: None,
) -> list[Score]:
    """Scores of ``candidates``, computed without sharing states between them or between lines.

    ``weights_of`` gives the healed tensors that a candidate is served with.
    """
    plan = DENSE.plan(signature_of(model), first_token=objective.first_token)
    dense = [teacher_forced(model, plan, line) for line in calibration.lines]
    return [_score(model, calibration, objective, c, weights_of(c), dense) for c in candidates]


@torch.inference_mode()
def _score(
    model: PreTrainedModel,
    calibration: Calibration,
    objective: Objective,
    candidate: Candidate,
    weights: HealedWeights | None,
    dense: Sequence[torch.Tensor],
) -> Score:
    plan = candidate.plan(
        signature_of(model), first_token=objective.first_token, kv_transfer=objective.kv_transfer
    )
    if weights is not None:
        attach(model, weights)
        plan = plan.with_healed(weights.digest)
    prefill, decoder = BlockStack(model, plan, "prefill"), BlockStack(model, plan, "decode")
    sums = {}
    for index, (line, dense_CV) in enumerate(zip(calibration.lines, dense, strict=True)):
        logits_CV = _logits(prefill, decoder, plan, line)
        ids_C = torch.tensor(line.continuation)
        reference = reference_of(objective, dense_CV[None])
        values = token_values(objective, reference, logits_CV[None], ids_C[None])
        sums[index] = line_sum(objective, values[0])
    return combine(objective, calibration, sums, name=str(candidate))


@torch.inference_mode()
def teacher_forced(model: PreTrainedModel, plan: PruningPlan, line: TokenizedLine) -> torch.Tensor:
    """Logits of every continuation token of one line, ``(C, V)``, as the two stages serve it."""
    prefill, decoder = BlockStack(model, plan, "prefill"), BlockStack(model, plan, "decode")
    return _logits(prefill, decoder, plan, line)


def _logits(
    prefill: BlockStack, decoder: BlockStack, plan: PruningPlan, line: TokenizedLine
) -> torch.Tensor:
    by_prefill = plan.first_token == "prefill"
    prompt = line.prompt if by_prefill else line.prompt[:-1]
    cache = CaptureCache.for_stack(prefill)
    placed = torch.tensor(line.positions or range(len(line.prompt) + 1))
    positions = placed[: len(prompt)]
    rows = []
    if prompt:
        hidden = prefill.run(prefill.embed(torch.tensor([prompt])), positions[None], cache)
        rows += [prefill.logits(hidden[:, -1:])[0, 0]] * by_prefill
    segment = select_segment(
        plan,
        cache,
        positions,
        line.num_prompt_tokens,
        num_visual_tokens_removed=line.num_removed,
        is_compact=line.num_removed > 0 and line.positions is None,
    )
    growing = _GrowingCache(segment, decoder)
    fed = line.continuation[:-1] if by_prefill else (line.prompt[-1], *line.continuation[:-1])
    for position, token in enumerate(fed, start=int(placed[len(prompt)])):
        growing.position = position
        embedded = decoder.embed(torch.tensor([[token]]))
        hidden = decoder.run(embedded, torch.tensor([[position]]), growing, {})
        rows.append(decoder.logits(hidden)[0, 0])
    return torch.stack(rows)


class _GrowingCache:
    """A cache of one sequence that grows token by token; it drops entries that left a window."""

    def __init__(self, segment: KVSegment, stack: BlockStack) -> None:
        self.position = 0
        self._windows = stack.windows
        self._entries = {}
        for entry in segment.blocks:
            keys, values = entry.keys_HND, entry.values_HND
            if entry.encoding != "model":
                shape = (keys.shape[0], keys.shape[1], keys.shape[2])
                keys, values = decode(
                    encode(keys, values, entry.encoding), entry.encoding, shape, keys.dtype
                )
            self._entries[entry.block] = (keys[None], values[None], entry.positions_N)

    def update(
        self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All entries within the window, the new one last."""
        keys, values, positions = self._entries[block]
        keys, values = torch.cat([keys, keys_BHTD], 2), torch.cat([values, values_BHTD], 2)
        positions = torch.cat([positions, torch.tensor([self.position])])
        window = self._windows[block]
        seen = positions > self.position - (window or self.position + 1)
        self._entries[block] = (keys[:, :, seen], values[:, :, seen], positions[seen])
        return self._entries[block][:2]
