"""The share of each block's attention that falls on the first and last entries of a prompt.

The share is measured on a block plan with all KV at hand, with the model's own queries and keys
(rotated, normalised, within sliding windows), and averaged over heads and tokens. Two kinds of
queries are measured:

- ``decode``: every token that decode runs. These read the KV that travels, so PDTrim's threshold
  rule (arXiv:2509.04467: blocks that concentrate on the first and last tokens send only those) is
  applied to them. Which queries the paper means is not public: project default.
- ``prompt``: the last token that prefill runs, the only query that a rule per prompt can look at
  before any KV is sent (SimLayerKV, arXiv:2410.13846).

Shapes: B = lines, P = prompt tokens, D = tokens that decode runs, Q = query heads, K = entries
attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.kv.cache import held_entries
from rayapp.models.attention import attention_weights, observed_attention
from rayapp.plan import STAGES, KVTransfer, Stage
from rayapp.pruning.candidates.candidate import ATTENTION, Candidate
from rayapp.pruning.candidates.healing import NO_HEALING, Healing
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.handoff import Handoff

_Seen = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True)
class BlockMass:
    """Shares of one block's attention, each between 0 and 1.

    Attributes:
        block: The block's number.
        first: Share of decode's queries on the first entries of the prompt.
        last: Share of decode's queries on the last entries of the prompt.
        new: Share of decode's queries on tokens that decode ran itself; no rule ever cuts those.
        prompt_first: Share of the last prompt token on the first entries; None if prefill does not
            attend in this block.
        prompt_last: Share of the last prompt token on the last entries.
    """

    block: int
    first: float
    last: float
    new: float
    prompt_first: float | None
    prompt_last: float | None

    @property
    def kept(self) -> float:
        """Share of decode's attention that is left after a cut to these entries."""
        return self.first + self.last + self.new


@torch.inference_mode()
def measure_attention_mass(
    evaluator: Evaluator, candidate: Candidate, rule: KVTransfer, healing: Healing = NO_HEALING
) -> tuple[BlockMass, ...]:
    """Mass of every block where decode attends, ascending; it costs about two evaluations.

    Args:
        evaluator: The evaluator of the model and the lines.
        candidate: The block plan; transfer rules are not applied.
        rule: Says which entries are the first and the last ones of a block's dense cache.
        healing: Says which removed blocks of the plan are healed.
    """
    blocks = evaluator.runner.num_blocks
    prefill, decode = (candidate.skips(stage, blocks) for stage in STAGES)
    sums = {block: _Sums() for block in range(blocks) if not decode[block] & ATTENTION}
    for chunk in range(len(evaluator.calibration.chunks)):
        inputs = evaluator.inputs(chunk)
        for block, block_sums in sums.items():
            window = evaluator.runner.windows[block]
            regions = _regions(inputs, rule, window)
            if not prefill[block] & ATTENTION:
                seen = _seen(evaluator, candidate, "prefill", chunk, block, healing)
                block_sums.add_prompt(_prompt_weights(inputs, seen, window), regions, inputs)
            query, keys, scaling = _seen(evaluator, candidate, "decode", chunk, block, healing)
            mask = evaluator.masks.decode(chunk, block)
            assert mask is not None, "decode always has one"
            weights_BDK = attention_weights(query, keys, mask, scaling).mean(dim=1)
            block_sums.add_decode(weights_BDK, regions, inputs)
    return tuple(block_sums.mass(block) for block, block_sums in sums.items())


def _seen(
    evaluator: Evaluator,
    candidate: Candidate,
    stage: Stage,
    chunk: int,
    block: int,
    healing: Healing,
) -> _Seen:
    """Queries and keys of one block's attention; the last observed call is the block's own."""
    seen: list[_Seen] = []

    def keep(query_BQTD: torch.Tensor, keys_BHKD: torch.Tensor, scaling: float) -> None:
        seen[:] = [(query_BQTD, keys_BHKD, scaling)]

    with observed_attention(keep):
        evaluator.attend(candidate, stage, chunk, block, healing)
    return seen[0]


def _regions(
    inputs: Handoff, rule: KVTransfer, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of a prompt's first and last entries, ``(B, P)`` each."""
    shape = (len(inputs.num_prefilled_B), inputs.prefill_ids_BP.shape[1])
    first_BP, last_BP = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, end in enumerate(inputs.num_prefilled_B.tolist()):
        num_held = held_entries(end, window)
        first, last = rule.counts(num_held)
        first_BP[row, end - num_held : end - num_held + first] = True
        last_BP[row, end - last : end] = True
    return first_BP, last_BP


def _prompt_weights(inputs: Handoff, seen: _Seen, window: int | None) -> torch.Tensor:
    """Weights ``(B, 1, P)`` of the last token that prefill ran; zeros if it ran none."""
    query_BQPD, keys_BHPD, scaling = seen
    last_B = inputs.num_prefilled_B - 1
    rows_B = torch.arange(len(last_B))
    query_BQ1D = query_BQPD[rows_B, :, last_B.clamp(min=0)][:, :, None]
    distance_BP = last_B[:, None] - torch.arange(keys_BHPD.shape[2])
    mask_BP = (distance_BP >= 0) & (distance_BP < (window or keys_BHPD.shape[2]))
    mask_B11P = mask_BP[:, None, None].to(keys_BHPD.device)
    return attention_weights(query_BQ1D, keys_BHPD, mask_B11P, scaling).mean(dim=1)


class _Sums:
    """Sums of one block's masses over tokens, float64."""

    def __init__(self) -> None:
        self._decode = torch.zeros(3, dtype=torch.float64)
        self._prompt = torch.zeros(2, dtype=torch.float64)
        self._num_decode = self._num_prompt = 0

    def add_decode(
        self, weights_BDK: torch.Tensor, regions: tuple[torch.Tensor, ...], inputs: Handoff
    ) -> None:
        """Add every real token that decode ran."""
        num_old = inputs.prefill_ids_BP.shape[1]
        valid_BD = inputs.valid_BC[:, -inputs.decode_ids_BD.shape[1] :]
        real_BDK = weights_BDK.cpu().double() * valid_BD[:, :, None]
        old_BDP = real_BDK[:, :, :num_old]
        parts = [(old_BDP * region_BP[:, None]).sum() for region_BP in regions]
        self._decode += torch.stack([*parts, real_BDK[:, :, num_old:].sum()])
        self._num_decode += int(valid_BD.sum())

    def add_prompt(
        self, weights_B1P: torch.Tensor, regions: tuple[torch.Tensor, ...], inputs: Handoff
    ) -> None:
        """Add the last prompt token of every line of which prefill ran one."""
        weights_BP = weights_B1P[:, 0].cpu().double()
        self._prompt += torch.stack([(weights_BP * region_BP).sum() for region_BP in regions])
        self._num_prompt += int((inputs.num_prefilled_B > 0).sum())

    def mass(self, block: int) -> BlockMass:
        """Means of the masses over tokens."""
        first, last, new = (self._decode / max(1, self._num_decode)).tolist()
        prompt: list[float | None] = [None, None]
        if self._num_prompt:
            prompt = [float(total) / self._num_prompt for total in self._prompt]
        return BlockMass(block, first, last, new, *prompt)
