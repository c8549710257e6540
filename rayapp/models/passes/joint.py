"""Both stages of one replica in one pass: a token of each of some sequences, then prompts.

A block that both stages run alike reads its weights once for all of them; elsewhere tokens and
prompts run one after the other, each by the block of its stage.
Shapes: T = tokens of a pass, B = sequences, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rayapp.models.healed import Tensors
from rayapp.models.passes.many_tokens import ManyTokensStack, TokensThenPrompts
from rayapp.models.passes.parts import signed
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.real_tokens import RealTokens
from rayapp.models.stack import BlockStack, Masks
from rayapp.plan import PruningPlan, Stage


class JointStack:
    """Runs the blocks of both stages of a plan, which are all plain.

    Args:
        stack: The blocks of the prefill stage.
        prompts: The same blocks as functions of prompts.
        tokens: The blocks of the decode stage as functions of single tokens.
        shared: Numbers of the blocks that both stages run alike (:func:`blocks_alike`).
    """

    def __init__(
        self,
        stack: BlockStack,
        prompts: ManyTokensStack,
        tokens: SingleTokenStack,
        shared: frozenset[int],
    ) -> None:
        assert prompts.is_plain
        self._stack, self._shared = stack, shared
        self._prompts, self._tokens = prompts.blocks, tokens.blocks or []

    def run(
        self,
        hidden_TE: torch.Tensor,
        positions_T: torch.Tensor,
        cache: TokensThenPrompts,
        masks: Masks,
        *,
        real_tokens: RealTokens,
    ) -> torch.Tensor:
        """Hidden states ``(T, E)`` after all blocks.

        Args:
            hidden_TE: Hidden states that enter block 0, those of the sequences first.
            positions_T: Position of every token.
            cache: The caches of both.
            masks: The masks of the prompts, as ``BlockStack.run`` takes them.
            real_tokens: The tokens of the prompts.
        """
        first = cache.num_tokens
        rotary = signed(self._stack.rotary(hidden_TE[None], positions_T[None]))
        cos_T1D, sin_T1D = (rows_1TD[0, :, None] for rows_1TD in rotary)
        of_tokens, of_prompts = (
            (cos_T1D[part], sin_T1D[part]) for part in (slice(first), slice(first, None))
        )
        hidden_TE = hidden_TE.clone()  # Blocks add to it in place.
        tokens_B1E, prompts_NE = hidden_TE[:first, None], hidden_TE[first:]
        for number, block in enumerate(self._prompts):
            assert block is not None
            mask = masks.get(number)
            if number in self._shared:
                block.run(hidden_TE, (cos_T1D, sin_T1D), cache, mask, real_tokens)
                continue
            after_B1E = self._tokens[number](tokens_B1E, of_tokens, None, cache.sequences)
            if after_B1E is not tokens_B1E:
                tokens_B1E.copy_(after_B1E)
            block.run(prompts_NE, of_prompts, cache.prompts, mask, real_tokens)
        return hidden_TE


def blocks_alike(
    plan: PruningPlan, num_blocks: int, healed: Mapping[Stage, Tensors]
) -> frozenset[int]:
    """Numbers of the blocks that both stages run in the same mode, with the model's own weights.

    Args:
        plan: The plan.
        num_blocks: Number of the model's blocks.
        healed: The healed tensors of every stage, by their canonical names.
    """
    names = [name for tensors in healed.values() for name in tensors]

    def are_alike(number: int) -> bool:
        mode = plan.mode("prefill", number)
        is_healed = any(name.startswith(f"layers.{number}.") for name in names)
        is_whole = mode.attends == mode.writes_kv  # KV without attention is prefill's alone.
        return mode is plan.mode("decode", number) and is_whole and not is_healed

    return frozenset(filter(are_alike, range(num_blocks)))
