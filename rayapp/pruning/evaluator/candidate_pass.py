"""One candidate on one chunk, and the names of the states that it computes.

A state is named by exactly what it depends on, so candidates that agree on that share it:

- prefill's hidden state that enters block ``b``: the chunk and prefill's skips before ``b``; the
  skips of a survivor also say that it is healed, and for which neighbour, and those of a span's
  last block that it has a bridge;
- the KV of block ``b``: the same names, whether its projections were refit, and the rule whose
  encoding it went through, if any;
- decode's hidden state that enters block ``b``: decode's skips before ``b``, and prefill's skips
  before the last block under ``b`` where decode attended, with the transfer rules of the blocks
  where it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import ATTENTION, SEND_ALL_RULE, KVRule
from rayapp.pruning.candidates.fits import Fit, FitKind
from rayapp.pruning.evaluator.handoff import Handoff
from rayapp.pruning.evaluator.state_cache import Tensors

Key = tuple[object, ...]
"""The name of a state."""


@dataclass(frozen=True)
class CandidatePass:
    """One candidate on one chunk.

    Attributes:
        chunk: Number of the chunk.
        inputs: Tokens of both stages, and what is handed over between them.
        prefill: Skipped parts of every block in prefill.
        decode: The same in decode.
        rules: Transfer rules of all blocks; a block where decode does not attend has the rule that
            sends all.
        fits: Linear maps of a healed candidate, by stage, kind and block.
        held: States that the rest of the pass needs, whatever the bound of the cache.
    """

    chunk: int
    inputs: Handoff
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    rules: tuple[KVRule, ...]
    fits: Mapping[tuple[Stage, FitKind, int], Fit] = field(default_factory=dict)
    held: dict[Key, Tensors] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether the candidate is the dense model, all of whose KV is sent as it is."""
        cut = any(rule[1:] != SEND_ALL_RULE for rule in self.rules)
        return not any(self.prefill) and not any(self.decode) and not cut

    def refit(self, block: int) -> Fit | None:
        """The projections that write the block's KV in prefill, if they were refit."""
        return self.fits.get(("prefill", "kv", block))

    def kv_key(self, block: int) -> Key:
        """The name of a block's KV before any rule."""
        return ("kv", self.chunk, block, self.prefill[:block], self.refit(block))

    def decode_key(self, block: int) -> Key:
        """The name of decode's hidden state that enters a block."""
        attended = [b for b in range(block) if not self.decode[b] & ATTENTION]
        prefill = self.prefill[: attended[-1]] if attended else ()
        refits = tuple(filter(None, map(self.refit, attended)))
        return ("decode", self.chunk, self.decode[:block], prefill, refits, self.rules[:block])
