"""One chunk as the two stages see it: the tokens that they run, and the entries decode may read.

Prompts are padded on the right, so entry ``k`` of a prefix lies at position ``k``, padding comes
last, and no real token ever attends to it. Entries that a transfer rule drops stay in place and are
masked, which gives the same result as not sending them, without a gather per rule.
Shapes: B = lines, P = prompt tokens that prefill runs (padded), C = continuation tokens (padded),
D = tokens that decode runs, K = P + D entries, N = real tokens of all lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from rayapp.kv.cache import held_entries
from rayapp.models.real_tokens import RealTokens
from rayapp.plan import KVTransfer, Stage
from rayapp.pruning.evaluator.calibration import Chunk


@dataclass(frozen=True)
class Handoff:
    """Inputs of both stages for one chunk.

    Attributes:
        prefill_ids_BP: Ids of the tokens that prefill runs; P is 0 if decode runs a prompt's only
            token.
        num_prefilled_B: Number of real entries that prefill leaves.
        prefill_positions_BP: Positions of prefill's tokens; a single row if no line has gaps.
        decode_ids_BD: Ids of the tokens that decode runs, teacher-forced.
        decode_positions_BD: Positions of decode's tokens.
        first_from_prefill: Whether the first answer token's logits come from prefill.
        valid_BC: Which continuation tokens are real.
    """

    prefill_ids_BP: torch.Tensor
    num_prefilled_B: torch.Tensor
    prefill_positions_BP: torch.Tensor
    decode_ids_BD: torch.Tensor
    decode_positions_BD: torch.Tensor
    first_from_prefill: bool
    valid_BC: torch.Tensor

    @cached_property
    def prefill_tokens(self) -> RealTokens:
        """The real tokens among those that prefill runs."""
        return RealTokens(
            [torch.arange(self.prefill_ids_BP.shape[1]) < self.num_prefilled_B[:, None]]
        )

    @cached_property
    def prefill_positions_1N(self) -> torch.Tensor:
        """Positions of prefill's real tokens."""
        positions_BP = self.prefill_positions_BP.expand(len(self.prefill_ids_BP), -1)
        return self.prefill_tokens.joined([positions_BP])

    @cached_property
    def decode_tokens(self) -> RealTokens:
        """The real tokens among those that decode runs."""
        num_steps = self.decode_ids_BD.shape[1]
        return RealTokens([self.valid_BC[:, self.valid_BC.shape[1] - num_steps :]])

    @cached_property
    def decode_positions_1N(self) -> torch.Tensor:
        """Positions of decode's real tokens."""
        return self.decode_tokens.joined([self.decode_positions_BD])

    @cached_property
    def predicting_N(self) -> torch.Tensor:
        """Places of the states that predict the continuations' tokens, line by line.

        Places count through the real tokens of prefill, then through those of decode.
        """
        after_B = self.num_prefilled_B.cumsum(0)
        num_new_B = self.valid_BC.sum(dim=1) - int(self.first_from_prefill)
        steps_N = torch.arange(int(num_new_B.sum())) + self.num_prefilled_B.sum()
        rows = [
            torch.cat([last[None], steps]) if self.first_from_prefill else steps
            for last, steps in zip(after_B - 1, steps_N.split(num_new_B.tolist()), strict=True)
        ]
        return torch.cat(rows)

    def prefill_mask(self, window: int | None) -> torch.Tensor | None:
        """Mask of prompt tokens in a block with this sliding window; None is the causal mask."""
        num_tokens = self.prefill_ids_BP.shape[1]
        if window is None or window >= num_tokens:
            return None
        distance_PP = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None]
        return ((distance_PP >= 0) & (distance_PP < window))[None, None]

    def sent_entries(self, rule: KVTransfer, window: int | None) -> list[torch.Tensor]:
        """Indices of the entries that travel from a block, ascending, one row per line."""
        entries = []
        for num_prefilled in self.num_prefilled_B.tolist():
            num_held = held_entries(num_prefilled, window)
            first, last = rule.counts(num_held)
            index_N = torch.arange(num_prefilled - num_held, num_prefilled)
            entries.append(torch.cat([index_N[:first], index_N[num_held - last :]]))
        return entries

    def decode_mask(self, rule: KVTransfer, window: int | None) -> torch.Tensor:
        """Mask of continuation tokens in a block, ``(B, 1, D, K)``; True means visible."""
        num_entries = self.prefill_ids_BP.shape[1]
        sent_BP = torch.zeros((len(self.num_prefilled_B), num_entries), dtype=torch.bool)
        for row, index_N in enumerate(self.sent_entries(rule, window)):
            sent_BP[row, index_N] = True
        new_BD = self.decode_positions_BD
        old_BP = self.prefill_positions_BP.expand(len(new_BD), -1)
        distance_BDK = new_BD[:, :, None] - torch.cat([old_BP, new_BD], dim=1)[:, None, :]
        there_BK = torch.cat([sent_BP, torch.ones_like(new_BD, dtype=torch.bool)], dim=1)
        allowed_BDK = (distance_BDK >= 0) & there_BK[:, None, :]
        if window is not None:
            allowed_BDK &= distance_BDK < window
        return allowed_BDK[:, None]


def handoff(chunk: Chunk, first_token: Stage) -> Handoff:
    """Inputs of both stages; either of them may make the first answer token."""
    by_prefill = first_token == "prefill"
    prompt_lengths_B, continuations_BC = chunk.prompt_lengths_B, chunk.continuations_BC
    num_prefilled_B = prompt_lengths_B if by_prefill else prompt_lengths_B - 1
    decode_ids_BD = continuations_BC[:, :-1]
    if not by_prefill:
        last_B1 = chunk.prompts_BT.gather(1, num_prefilled_B[:, None])
        decode_ids_BD = torch.cat([last_B1, decode_ids_BD], dim=1)
    num_entries = int(num_prefilled_B.max())
    first_B = chunk.answer_positions_B if by_prefill else chunk.answer_positions_B - 1
    steps_D = torch.arange(decode_ids_BD.shape[1])
    steps_C = torch.arange(continuations_BC.shape[1])
    return Handoff(
        prefill_ids_BP=chunk.prompts_BT[:, :num_entries],
        num_prefilled_B=num_prefilled_B,
        prefill_positions_BP=chunk.positions_BT[:, :num_entries],
        decode_ids_BD=decode_ids_BD,
        decode_positions_BD=first_B[:, None] + steps_D,
        first_from_prefill=by_prefill,
        valid_BC=steps_C < chunk.continuation_lengths_B[:, None],
    )
