"""Steps of both stages at once: the next tokens of sequences and chunks of prompts in one pass.

A decode step reads all weights for a few rows, and so does a short chunk. Where both stages run the
same blocks in one replica, one pass reads them once for both (piggybacked decodes, Sarathi,
arXiv:2308.16369); only attention keeps them apart.
Shapes: B = running sequences, P = prompts that end with the pass, T = tokens of chunks, E = hidden
size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import TokenBatch
from rayapp.models.passes.many_tokens import TokensThenPrompts


class JointEngine:
    """Both engines of a replica, whose steps may share a pass.

    Args:
        prefill: The engine of prompts.
        decode: The engine of sequences, over the same weights.
    """

    def __init__(self, prefill: PrefillEngine, decode: DecodeEngine) -> None:
        self._prefill, self._decode = prefill, decode
        plan = decode.plan
        numbers = range(decode.stack.num_blocks)
        are_equal = all(plan.mode("prefill", n) == plan.mode("decode", n) for n in numbers)
        self.shares_passes = (
            plan.healed is None
            and are_equal
            and all(not writes or attends for writes, attends in _kinds(decode))
            and prefill.blocks.is_plain
        )

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
        if not (has_both and self.shares_passes):
            return self._decode.step(), self._prefill.advance(chunks, noted)
        logits_BV, firsts_PV = self._advance(chunks, noted)
        return self._decode.settle(logits_BV), self._prefill.outputs(chunks, firsts_PV)

    @torch.inference_mode()
    def _advance(
        self, chunks: Sequence[tuple[PrefillRun, int]], noted: Callable[[], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits ``(B, V)`` of the sequences, and ``(P, V)`` of prompts that ended."""
        chunks = [(run, count) for run, count in chunks if count]
        tokens_B1E, positions_B1 = self._decode.begin_tokens()
        row, hidden_TE = self._prefill.begin_pass(chunks, noted)
        num_tokens = len(tokens_B1E)
        hidden_1TE = self._prefill.blocks.run(
            torch.cat((tokens_B1E[:, 0], hidden_TE))[None],
            torch.cat((positions_B1[:, 0], row.positions_1T[0]))[None],
            TokensThenPrompts(num_tokens, self._decode.pages, row),
            row.masks,
            real_tokens=row.real_tokens,
        )
        rows_BE, chunks_TE = hidden_1TE[0].split((num_tokens, len(hidden_TE)))
        ended_PE = self._prefill.end_pass(chunks, row, chunks_TE)
        if ended_PE is not None:
            rows_BE = torch.cat((rows_BE, ended_PE))
        logits_RV = self._decode.stack.logits(rows_BE[:, None])[:, 0]
        return logits_RV[:num_tokens], None if ended_PE is None else logits_RV[num_tokens:]


def _kinds(decode: DecodeEngine) -> Sequence[tuple[bool, bool]]:
    """Whether each block writes KV, and whether it attends."""
    return list(zip(decode.stack.writes_kv, decode.stack.attends, strict=True))
