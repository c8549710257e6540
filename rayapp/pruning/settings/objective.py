"""The objective: what candidates are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rayapp.plan import KVTransfer, Stage

ObjectiveKind = Literal["kl", "nll"]
ScoreBy = Literal["task", "token"]


@dataclass(frozen=True)
class Objective:
    """What candidates are compared by, and the part of the plan that all candidates share.

    Attributes:
        kind: ``kl``: KL(dense || candidate) in nats per continuation token, against dense stages
            and uncut KV. ``nll``: negative log-likelihood of the continuation.
        score_by: ``task``: mean over tasks of the mean over tokens; ``token``: mean over all
            tokens.
        first_token: The stage that the first answer token's logits come from.
        kv_transfer: Rules for the KV between the stages, used where a candidate's decode attends.
        kl_top_k: For large vocabularies: KL over the dense model's likeliest tokens, all others as
            one outcome; never above the exact one. 0 is exact.
    """

    kind: ObjectiveKind = "kl"
    score_by: ScoreBy = "task"
    first_token: Stage = "prefill"
    kv_transfer: Mapping[int, KVTransfer] = field(default_factory=dict)
    kl_top_k: int = 0
