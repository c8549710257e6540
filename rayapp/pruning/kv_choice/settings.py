"""Settings of a selection of KV, beside those of the score and of the compute."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from rayapp.errors import InputError
from rayapp.plan import CountOrShare, Encoding
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.settings import Settings

KVMethod = Literal["elimination", "mass"]

FIRST = 4
"""Number of entries that a cut keeps at the start: attention sinks (StreamingLLM,
arXiv:2309.17453)."""
RECENT = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a prompt that a cut may keep at its end (project default)."""
THRESHOLD = 0.9
"""Attention mass from which on a block is cut: SimLayerKV's value for Llama-3 (arXiv:2410.13846);
PDTrim's is not public."""


class KVSelectSettings(Settings):
    """Settings of a selection: the plan, the goal, and the transfer rules to choose from."""

    model_config = ConfigDict(title="Which KV is chosen")

    plan: str = Field(description="Plan directory, or its plan.json, whose KV travels.")
    out: str | None = Field(
        default=None,
        description="Directory for the new plan and kv.json; without it, that of the plan, in "
        "place.",
    )
    target_reduction: float | None = Field(
        default=None,
        gt=0,
        description="Goal: the best score with at least so many times fewer bytes than the dense "
        "model sends.",
    )
    max_kl: float | None = Field(
        default=None,
        ge=0,
        description="Goal instead: the fewest bytes with at most this KL to the dense model.",
    )
    encoding: Encoding = Field(
        default="model",
        description="Smallest encoding that KV may travel in; model never quantises.",
    )
    method: KVMethod = Field(
        default="elimination",
        description="Method of the choice: whole sets scored together (elimination), or PDTrim's "
        "threshold on attention (mass).",
    )
    threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of attention on first and last entries from which on the mass method "
        "cuts a block.",
    )
    first: CountOrShare = Field(
        default=FIRST,
        description="Entries that a cut keeps at the start of a prompt: a count (4), or a share "
        "(0.1).",
        json_schema_extra={"as_text": True},
    )
    last: tuple[CountOrShare, ...] = Field(
        default=RECENT,
        min_length=1,
        description="Entries that a cut may keep at the end of a prompt: counts or shares, of "
        "which the mass method uses the first; may be given several times.",
        json_schema_extra={"as_texts": True},
    )
    generation_size: int = Field(
        default=8,
        ge=1,
        description="Number of sets that are scored at a time, however many evaluators share them.",
    )
    evaluations: int | None = Field(
        default=None,
        ge=1,
        description="Most sets that elimination scores, those with one block cut or kept included; "
        "without it, until nothing improves.",
    )
    seed: int = Field(default=0, description="Seed of the sets that are drawn at random.")

    @field_validator("first", mode="before")
    @classmethod
    def _one_amount(cls, value: object) -> object:
        return _amount(value)

    @field_validator("last", mode="before")
    @classmethod
    def _many_amounts(cls, value: object) -> object:
        return tuple(map(_amount, value)) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_goal(self) -> KVSelectSettings:
        goals = [self.target_reduction, self.max_kl, self.threshold]
        given = sum(goal is not None for goal in goals)
        if self.method == "elimination" and (given != 1 or self.threshold is not None):
            raise ValueError(
                "elimination needs one goal: give either --target-reduction or --max-kl (and "
                "--threshold only with --method mass)"
            )
        if self.method == "mass" and (given > 1 or self.max_kl is not None):
            raise ValueError("mass takes either --threshold or --target-reduction, not both")
        if self.method == "mass" and self.evaluations is not None:
            raise ValueError("mass scores one set; drop --evaluations, or use elimination")
        if not all(self.first or last for last in self.last):
            raise ValueError("a cut keeps something: make first or every last at least 1")
        return self

    def identity(self, score: ScoreSettings) -> dict[str, Any]:
        """All settings that change the choice, without paths; records call ``last`` ``recent``."""
        unused = {"evaluations"} if self.evaluations is None else set()
        own = self.model_dump(mode="json", exclude={"plan", "out", "last"} | unused)
        lines = {"score_by": score.score_by, "chunk_tokens": score.chunk_tokens}
        return {**own, "recent": list(self.last), **lines, **unusual_scores(score)}

    def check(self, score: ScoreSettings) -> None:
        """Raise :class:`InputError` if the goal does not fit the objective."""
        if self.max_kl is not None and score.objective != "kl":
            raise InputError(
                f"max_kl={self.max_kl:g} with objective={score.objective}: scores are no KL then; "
                "use --objective kl, or give --target-reduction instead"
            )


def unusual_scores(score: ScoreSettings) -> dict[str, Any]:
    """Settings of the score that are not the default; records name only these."""
    names = {"dtype", "objective", "kl_top_k", "first_token_weight"}
    return score.model_dump(mode="json", include=names, exclude_defaults=True)


def _amount(value: object) -> object:
    """A count or a share, also if it is written as text."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        raise ValueError(
            f"{value} is neither a count (4) nor a share (0.25) of a prompt's entries"
        ) from None
