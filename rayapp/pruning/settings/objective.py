"""The objective: the measure that candidates are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rayapp.plan import KVTransfer, Stage

ObjectiveKind = Literal["kl", "nll"]
ScoreBy = Literal["task", "token"]


@dataclass(frozen=True)
class Objective:
    """The measure that candidates are compared by, and the part of the plan that all of them share.

    Attributes:
        kind: ``kl``: KL(dense || candidate) in nats per continuation token, against dense stages
            and uncut KV. ``nll``: negative log-likelihood of the continuation.
        score_by: ``task``: mean over tasks of the mean over tokens; ``token``: mean over all
            tokens.
        first_token: The stage that the first answer token's logits come from.
        kv_transfer: Rules for the KV between the stages, in the blocks where a candidate's decode
            attends.
        kl_top_k: Number of the dense model's likeliest tokens that the KL counts, for large
            vocabularies. All others are one outcome, so the KL is never above the exact one; 0 is
            exact.
        first_token_weight: Number of tokens that the first token of a continuation counts as. Where
            prefill makes it, it is all that prefill says itself, and one of many in a mean.
    """

    kind: ObjectiveKind = "kl"
    score_by: ScoreBy = "task"
    first_token: Stage = "prefill"
    kv_transfer: Mapping[int, KVTransfer] = field(default_factory=dict)
    kl_top_k: int = 0
    first_token_weight: float = 1.0

    def num_counted(self, num_tokens: int) -> float:
        """Number of tokens that a continuation of so many, one at least, counts as."""
        return num_tokens - 1 + self.first_token_weight
