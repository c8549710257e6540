"""Any block of a model in any mode: one stack per mode, all sharing the model's weights.

Shapes: B = lines, T = tokens, E = hidden size, H = KV heads, K = entries, D = head dimension, V =
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from rayapp.models.blocks import signature_of
from rayapp.models.healed import attach
from rayapp.models.real_tokens import RealTokens
from rayapp.models.stack import BlockStack
from rayapp.plan import Mode, PruningPlan, StagePlan
from rayapp.pruning.candidates.candidate import ATTENTION, MLP
from rayapp.pruning.candidates.fits import Fit
from rayapp.pruning.candidates.healing import HealedUnit, Pair, Unit

KV = tuple[torch.Tensor, torch.Tensor]

RUN_MODES = {0: Mode.FULL, ATTENTION: Mode.MLP_ONLY, MLP: Mode.ATTENTION_ONLY}
"""The mode that runs the rest of a block, by its skipped parts; without a rest, nothing runs."""


@dataclass
class BlockKVSlot:
    """A cache for one block: the entries before the new ones, if any, and the new entries.

    With ``room``, the new entries overwrite the last ``room`` entries of ``prefix`` in place, and
    nothing is copied. Whoever shares such a prefix must not read those entries afterwards.

    ``tokens`` says which tokens of a batch stand in one row; their entries are kept as a batch.
    """

    prefix: KV | None = None
    written: KV | None = None
    room: int = 0
    tokens: RealTokens | None = None

    def update(self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor, block: int) -> Any:
        """Keys and values that the block attends to: the prefix, then its own new entries.

        Those of tokens in one row are given per batch, as attention wants them.
        """
        del block
        if self.tokens is None:
            return self._attended(keys_BHTD, values_BHTD)
        (keys_BHTD,) = self.tokens.heads_apart(keys_BHTD)
        (values_BHTD,) = self.tokens.heads_apart(values_BHTD)
        keys_BHKD, values_BHKD = self._attended(keys_BHTD, values_BHTD)
        return (keys_BHKD,), (values_BHKD,)

    def _attended(self, keys_BHTD: torch.Tensor, values_BHTD: torch.Tensor) -> KV:
        self.written = (keys_BHTD, values_BHTD)
        if self.prefix is None:
            return self.written
        keys_BHPD, values_BHPD = self.prefix
        if self.room:
            keys_BHPD[:, :, -self.room :] = keys_BHTD
            values_BHPD[:, :, -self.room :] = values_BHTD
            return self.prefix
        return torch.cat([keys_BHPD, keys_BHTD], dim=2), torch.cat(
            [values_BHPD, values_BHTD], dim=2
        )


def with_room(kv: KV, room: int) -> KV:
    """Copies of keys and values with ``room`` free entries behind them."""
    shape = list(kv[0].shape)
    shape[2] += room
    roomy = kv[0].new_zeros(shape), kv[1].new_zeros(shape)
    for old_BHPD, new_BHKD in zip(kv, roomy, strict=True):
        new_BHKD[:, :, : old_BHPD.shape[2]] = old_BHPD
    return roomy


class BlockRunner:
    """Runs single blocks of a dense model.

    Raises:
        ModelError: The architecture is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.signature = signature_of(model)
        modes = (*RUN_MODES.values(), Mode.KV_ONLY)
        self._stacks = {mode: BlockStack(model, self._uniform(mode), "prefill") for mode in modes}
        self._dense = self._stacks[Mode.FULL]
        self._healed: dict[Unit, BlockStack] = {}
        self._rotated: tuple[torch.Tensor, Any, tuple[torch.Tensor, torch.Tensor]] | None = None
        self.num_blocks = self._dense.num_blocks
        self.vocab_size = self._dense.vocab_size
        self.windows = self._dense.windows
        self.device = self._dense.device
        self.dtype = self._dense.dtype
        self.element_bytes = self.dtype.itemsize

    def _uniform(self, mode: Mode) -> PruningPlan:
        """A plan whose prefill runs all blocks in ``mode``; its decode, never run, needs no KV."""
        blocks = range(self.signature.num_blocks)
        return PruningPlan(
            model=self.signature,
            prefill=StagePlan(blocks=dict.fromkeys(blocks, mode)),
            decode=StagePlan(blocks=dict.fromkeys(blocks, Mode.REMOVED)),
        )

    def embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(B, T, E)`` that enter block 0."""
        return self._dense.embed(token_ids_BT)

    def logits(self, hidden_BTE: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, T, V)`` of hidden states that left the last block."""
        return self._dense.logits(hidden_BTE)

    def run(
        self,
        block: int,
        skipped: int,
        hidden_BTE: torch.Tensor,
        positions_BT: torch.Tensor,
        mask: torch.Tensor | None,
        slot: BlockKVSlot,
    ) -> torch.Tensor:
        """Run one block without its ``skipped`` parts; attention reads and writes ``slot``."""
        if skipped == ATTENTION | MLP:
            return hidden_BTE
        stack = self._stacks[RUN_MODES[skipped]]
        return self._run_one(stack, block, hidden_BTE, positions_BT, mask, slot)

    def _run_one(
        self,
        stack: BlockStack,
        block: int,
        hidden_BTE: torch.Tensor,
        positions_BT: torch.Tensor,
        mask: torch.Tensor | None,
        slot: BlockKVSlot,
    ) -> torch.Tensor:
        """Run one block of a stack; all blocks of a pass share the rotation of its positions."""
        key = (hidden_BTE.dtype, hidden_BTE.device)
        if self._rotated is None or self._rotated[0] is not positions_BT or self._rotated[1] != key:
            self._rotated = (positions_BT, key, stack.rotary(hidden_BTE, positions_BT))
        return stack.run(
            hidden_BTE,
            positions_BT,
            slot,
            {block: mask if slot.tokens is None or mask is None else (mask,)},
            start=block,
            stop=block + 1,
            rotary=self._rotated[2],
            real_tokens=slot.tokens,
        )

    def add_healed(self, healed: HealedUnit) -> None:
        """Make a unit of healing ready to run, as a plan would serve it."""
        weights = healed.weights
        attach(self.model, weights)
        plan = self._skipping(healed.unit) if isinstance(healed.unit, Fit) else PruningPlan()
        plan = plan.model_copy(update={"model": self.signature}).with_healed(weights.digest)
        self._healed[healed.unit] = BlockStack(self.model, plan, healed.unit.stage)

    def _skipping(self, fit: Fit) -> PruningPlan:
        """A plan that runs nothing of a fit's block but the fit."""
        gone = StagePlan(blocks={fit.block: Mode.REMOVED})
        if fit.kind == "kv":
            only_kv = StagePlan(blocks={fit.block: Mode.KV_ONLY})
            return PruningPlan(model=self.signature, prefill=only_kv)
        prefill = gone if fit.stage == "prefill" else StagePlan()
        return PruningPlan(model=self.signature, prefill=prefill, decode=gone)

    def run_healed(
        self,
        unit: Unit,
        hidden_BTE: torch.Tensor,
        positions_BT: torch.Tensor,
        mask: torch.Tensor | None,
        slot: BlockKVSlot,
    ) -> torch.Tensor:
        """Run the survivor of a pair, or a bridge; attention reads and writes ``slot``.

        The unit was added before.
        """
        stack = self._healed[unit]
        block = unit.survivor if isinstance(unit, Pair) else unit.block
        return self._run_one(stack, block, hidden_BTE, positions_BT, mask, slot)

    def write_kv(
        self,
        block: int,
        hidden_BTE: torch.Tensor,
        positions_BT: torch.Tensor,
        tokens: RealTokens | None = None,
        refit: Fit | None = None,
    ) -> KV:
        """Keys and values ``(B, H, T, D)`` of one block: bit for bit what attention writes.

        With ``refit``, which was added before, they are what its projections write.
        """
        slot = BlockKVSlot(tokens=tokens)
        stack = self._stacks[Mode.KV_ONLY] if refit is None else self._healed[refit]
        stack.run(hidden_BTE, positions_BT, slot, {}, start=block, stop=block + 1)
        assert slot.written is not None, f"kv_only wrote nothing in block {block}"
        return slot.written
