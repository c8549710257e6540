"""Influence: how much each block and part changes the hidden state, per stage, on the dense model.

Block Influence as in ShortGPT (arXiv:2403.03853) and PDTrim (arXiv:2509.04467): one minus the
cosine similarity of input and output, averaged over calibration tokens. Project default: prefill is
measured at prompt positions, decode at continuation positions; parts (attention, MLP) in the same
way, each by its own input and output. Shapes: B = lines, T = tokens, E = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import ATTENTION, MLP
from rayapp.pruning.evaluator.block_runner import BlockKVSlot
from rayapp.pruning.evaluator.evaluator import Evaluator


@dataclass(frozen=True)
class Influence:
    """One minus similarity by block, and by part as candidates count; lower is more redundant."""

    prefill_blocks: tuple[float, ...]
    prefill_parts: tuple[float, ...]
    decode_blocks: tuple[float, ...]
    decode_parts: tuple[float, ...]

    def units(self, stage: Stage, num_units: int) -> tuple[float, ...]:
        """Influence of every unit of a stage: its blocks, or its parts (twice as many)."""
        blocks = self.prefill_blocks if stage == "prefill" else self.decode_blocks
        parts = self.prefill_parts if stage == "prefill" else self.decode_parts
        return blocks if num_units == len(blocks) else parts


def pruning_set(influence: Influence, stage: Stage, num_units: int, d_t: float) -> frozenset[int]:
    """PDTrim's pruning set of one stage: units whose similarity reaches the threshold ``d_T``.

    The paper splits blocks into a pruning and a distillation set at ``d_T``. Project default, since
    its method section is not public: units of the pruning set may simply be removed; the others
    need a survivor that was trained to do their work (healing), and stay if there is none.
    """
    similarities = (1.0 - value for value in influence.units(stage, num_units))
    return frozenset(unit for unit, similarity in enumerate(similarities) if similarity >= d_t)


def distillation_set(
    influence: Influence, stage: Stage, num_units: int, d_t: float
) -> frozenset[int]:
    """PDTrim's distillation set of one stage: all units but those of :func:`pruning_set`."""
    return frozenset(range(num_units)) - pruning_set(influence, stage, num_units, d_t)


@torch.inference_mode()
def measure_influence(evaluator: Evaluator) -> Influence:
    """Influence of both stages on the whole calibration set; it costs one evaluation."""
    num_blocks = evaluator.runner.num_blocks
    prefill, decode = _Sums(num_blocks), _Sums(num_blocks)
    for chunk in range(len(evaluator.calibration.chunks)):
        _measure_chunk(evaluator, chunk, prefill, decode)
    return Influence(*prefill.means(), *decode.means())


def _measure_chunk(evaluator: Evaluator, chunk: int, prefill: _Sums, decode: _Sums) -> None:
    runner, inputs = evaluator.runner, evaluator.inputs(chunk)
    prompt_positions_BP = inputs.prefill_positions_BP
    entries_P = torch.arange(inputs.prefill_ids_BP.shape[1])
    prompt_valid_BP = entries_P < inputs.num_prefilled_B[:, None]
    decode_valid_BD = inputs.valid_BC[:, -inputs.decode_ids_BD.shape[1] :]
    prompt, answer = runner.embed(inputs.prefill_ids_BP), runner.embed(inputs.decode_ids_BD)
    for block in range(runner.num_blocks):
        mask = evaluator.masks.prefill(chunk, block)
        slot = BlockKVSlot()
        between = runner.run(block, MLP, prompt, prompt_positions_BP, mask, slot)
        after = runner.run(block, ATTENTION, between, prompt_positions_BP, None, BlockKVSlot())
        prefill.add(block, (prompt, between, after), prompt_valid_BP)
        prompt = after
        mask = evaluator.masks.decode(chunk, block)
        slot = BlockKVSlot(prefix=slot.written)
        positions_BD = inputs.decode_positions_BD
        between = runner.run(block, MLP, answer, positions_BD, mask, slot)
        after = runner.run(block, ATTENTION, between, positions_BD, None, BlockKVSlot())
        decode.add(block, (answer, between, after), decode_valid_BD)
        answer = after


class _Sums:
    """Sums of ``1 - cosine`` over tokens, float64."""

    def __init__(self, num_blocks: int) -> None:
        self._blocks = [0.0] * num_blocks
        self._parts = [0.0] * (2 * num_blocks)
        self._tokens = [0] * num_blocks

    def add(
        self,
        block: int,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        valid_BT: torch.Tensor,
    ) -> None:
        """Add one block on one chunk: states before it, between its parts, and after it."""
        before, between, after = (state[valid_BT.to(state.device)].double() for state in states)
        self._parts[2 * block] += _distance(before, between)
        self._parts[2 * block + 1] += _distance(between, after)
        self._blocks[block] += _distance(before, after)
        self._tokens[block] += len(before)

    def means(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means over tokens for all blocks and for all parts; 0 if there was no token."""
        counts = [max(1, tokens) for tokens in self._tokens]
        blocks = tuple(total / n for total, n in zip(self._blocks, counts, strict=True))
        return blocks, tuple(total / counts[i // 2] for i, total in enumerate(self._parts))


def _distance(before_NE: torch.Tensor, after_NE: torch.Tensor) -> float:
    return float((1.0 - torch.cosine_similarity(before_NE, after_NE, dim=-1)).sum())
