"""Settings of a score: a model, lines, and an objective."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator

from rayapp.plan import KVTransfer, PruningPlan, Stage, VisualTokens, encoding_identity
from rayapp.pruning.settings.objective import Objective, ObjectiveKind, ScoreBy
from rayapp.settings import DTypeName, ModelName, Revision, Settings

CHUNK_TOKENS = 4096
"""Number of tokens of a chunk, padding included. Project default: with half as many, a block's
costs beside its products weigh on candidates that change decode alone."""


_CALIBRATION = Field(
    description="File of JSON lines, a prompt and a completion each, that scores are taken on."
)
CalibrationFile = Annotated[str, _CALIBRATION]
OptionalCalibrationFile = Annotated[str | None, _CALIBRATION]


class ScoreSettings(Settings):
    """The settings that scores depend on; only paths leave scores as they are."""

    model_config = ConfigDict(title="What is scored")

    model: ModelName
    revision: Revision = None
    calibration: CalibrationFile
    dtype: DTypeName = "auto"
    objective: ObjectiveKind = Field(
        default="kl",
        description="Objective that is minimised: the KL to the dense model (kl), or the negative "
        "log-likelihood of the completions (nll).",
    )
    score_by: ScoreBy = Field(
        default="task",
        description="Weights of a score: all tasks count alike (task), or all tokens (token).",
    )
    kl_top_k: int = Field(
        default=0,
        ge=0,
        description="Number of likeliest tokens that the KL compares, all others counting as one "
        "outcome; 0 compares the whole vocabulary.",
    )
    first_token_weight: float = Field(
        default=1.0,
        gt=0,
        description="Number of tokens that the first token of a completion counts as in a score; "
        "where prefill makes it, a mean over many tokens hides it.",
    )
    first_token: Stage = Field(
        default="prefill", description="Stage that makes the first token of an answer."
    )
    kv_transfer: dict[int, KVTransfer] = Field(
        default_factory=dict,
        description="Transfer rules by block, scored together with what is removed.",
    )
    visual_tokens: VisualTokens | None = Field(
        default=None,
        description="Visual tokens that are kept per image: a count (64), a share (0.25), or a "
        "rule as JSON, as a plan holds it.",
        json_schema_extra={"as_text": True},
    )
    chunk_tokens: int = Field(
        default=CHUNK_TOKENS,
        ge=1,
        description="Tokens that an evaluator runs at a time, padding included.",
    )

    @field_validator("visual_tokens", mode="before")
    @classmethod
    def _written(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError('give a count, a share, or JSON such as {"num_keep": 64}') from None
        return parsed if isinstance(parsed, dict) else {"num_keep": parsed}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a journal must agree on: all that change scores, without paths.

        Settings that are newer and unused are left out, so that older journals can be resumed.
        """
        unused = {name for name in ("revision", "visual_tokens") if getattr(self, name) is None}
        unused |= {"first_token_weight"} if self.first_token_weight == 1 else set()
        settings = self.model_dump(mode="json", exclude={"model", "calibration"} | unused)
        return settings | encoding_identity(self.kv_transfer)

    def scoring(self) -> Objective:
        """The objective of these settings, which candidates are compared by."""
        return Objective(
            kind=self.objective,
            score_by=self.score_by,
            first_token=self.first_token,
            kv_transfer=self.kv_transfer,
            kl_top_k=self.kl_top_k,
            first_token_weight=self.first_token_weight,
        )

    def following(self, plan: PruningPlan) -> ScoreSettings:
        """Settings for candidates that replace a plan and bring transfer rules of their own.

        The first token's stage and the visual tokens are those of the plan.
        """
        fixed = {"first_token": plan.first_token, "visual_tokens": plan.visual_tokens}
        return self.model_copy(update={**fixed, "kv_transfer": {}})
