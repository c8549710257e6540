"""Steps of both stages at once: the next tokens of sequences and chunks of prompts in one pass.

A decode step reads all weights for a few rows, and so does a short chunk. In a replica of both
stages one pass reads the weights once for both (piggybacked decodes, Sarathi, arXiv:2308.16369), in
all blocks that the plan has both stages run alike; only attention keeps them apart.
Shapes: B = running sequences, P = prompts that end with the pass, T = tokens of chunks, E = hidden
size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import TokenBatch
from rayapp.models.healed import healed_parameters
from rayapp.models.passes.joint import JointStack, blocks_alike
from rayapp.models.passes.many_tokens import TokensThenPrompts
from rayapp.plan import STAGES


class JointEngine:
    """Both engines of a replica, whose steps may share a pass.

    Args:
        prefill: The engine of prompts.
        decode: The engine of sequences, over the same weights.
    """

    def __init__(self, prefill: PrefillEngine, decode: DecodeEngine) -> None:
        self._prefill, self._decode = prefill, decode
        self._stack = None
        if prefill.blocks.is_plain and decode.blocks.is_plain:
            stack, plan = prefill.stack, prefill.plan
            healed = {stage: healed_parameters(stack.model, plan, stage) for stage in STAGES}
            alike = blocks_alike(plan, stack.num_blocks, healed)
            self._stack = JointStack(stack, prefill.blocks, decode.blocks, alike)

    @property
    def shares_passes(self) -> bool:
        """True if both kinds of work run in one pass; otherwise tokens come before the chunks."""
        return self._stack is not None

    def step(
        self,
        chunks: Sequence[tuple[PrefillRun, int]],
        noted: Callable[[], None] | None = None,
    ) -> tuple[list[TokenBatch], list[PrefillOutput]]:
        """Run a token of every running sequence, and the next tokens of prompts.

        Args:
            chunks: The arguments of :meth:`PrefillEngine.advance`.
            noted: Those of :meth:`PrefillEngine.advance`, too.

        Returns:
            New answer tokens, as :meth:`DecodeEngine.step` returns them, and the outputs of prompts
            that are complete.
        """
        self._decode.make_room()
        has_both = self._decode.running and any(count for _, count in chunks)
        if self._stack is None or not has_both:
            return self._decode.step(), self._prefill.advance(chunks, noted)
        logits_BV, firsts_PV = self._advance(self._stack, chunks, noted)
        return self._decode.settle(logits_BV), self._prefill.outputs(chunks, firsts_PV)

    @torch.inference_mode()
    def _advance(
        self,
        stack: JointStack,
        chunks: Sequence[tuple[PrefillRun, int]],
        noted: Callable[[], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits ``(B, V)`` of the sequences, and ``(P, V)`` of prompts that ended."""
        chunks = [(run, count) for run, count in chunks if count]
        tokens_B1E, positions_B1 = self._decode.begin_tokens()
        row, hidden_TE = self._prefill.begin_pass(chunks, noted)
        num_tokens = len(tokens_B1E)
        after_TE = stack.run(
            torch.cat((tokens_B1E[:, 0], hidden_TE)),
            torch.cat((positions_B1[:, 0], row.positions_1T[0])),
            TokensThenPrompts(num_tokens, self._decode.pages, row),
            row.masks,
            real_tokens=row.real_tokens,
        )
        rows_BE, chunks_TE = after_TE.split((num_tokens, len(hidden_TE)))
        ended_PE = self._prefill.end_pass(chunks, row, chunks_TE)
        if ended_PE is not None:
            rows_BE = torch.cat((rows_BE, ended_PE))
        logits_RV = self._decode.stack.logits(rows_BE[:, None])[:, 0]
        return logits_RV[:num_tokens], None if ended_PE is None else logits_RV[num_tokens:]
