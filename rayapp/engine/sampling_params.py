"""Sampling parameters of an answer as plain data, without torch."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from rayapp.settings import Strict


class SamplingParams(Strict):
    """Settings that choose the tokens of an answer and end it.

    The noise of answer token ``i`` depends only on ``(seed, i)``, so a replayed request continues
    as it would have without the interruption.
    """

    model_config = ConfigDict(title="How answers are sampled")

    max_tokens: int = Field(default=16, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(
        default=0.0,
        ge=0.0,
        le=100.0,
        description="Temperature of sampling; 0 takes the likeliest token.",
    )
    top_k: int = Field(
        default=0, ge=0, description="Likeliest tokens that are sampled from; 0 keeps all."
    )
    top_p: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="Probability of the likeliest tokens that are sampled from; 1 keeps all.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the sampling noise.")
    stop: tuple[str, ...] = Field(
        default=(), description="Text that ends an answer before it; may be given several times."
    )
    min_tokens: int = Field(
        default=0,
        ge=0,
        description="Tokens before which neither the model nor a stop text ends an answer.",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="Taken from the logits of tokens that the answer has.",
    )
    frequency_penalty: float = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="Taken from a token's logit for every time that the answer has it.",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0.0,
        le=10.0,
        description="Divides the logits of tokens of prompt and answer, or multiplies negative "
        "ones (CTRL, arXiv:1909.05858); 1 changes nothing.",
    )
    logit_bias: dict[int, float] = Field(
        default_factory=dict, description="Added to the logits of tokens, by token id."
    )
    ignore_eos: bool = Field(
        default=False, description="Go on where the model would end its answer."
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Best alternatives that are reported beside each token; none without.",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Best alternatives that are reported beside each prompt token; none without.",
    )

    @property
    def adjusts_logits(self) -> bool:
        """True if tokens are chosen from other logits than the model's."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1.0)
        return bool(self.min_tokens or self.logit_bias or any(penalties))
