"""What a request changes in the logits before a token is chosen: bias, a least length, penalties.

The order is vLLM's: bias, then the least length, then the penalties for repetition, frequency and
presence. Only rows that ask for something are changed, and log-probabilities are always those of
the model.
Shapes: B = sequences, V = vocabulary, U = different tokens of a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch

from rayapp.engine.request import GenerationRequest


class Adjustment:
    """The changes that one request asks for, and the tokens of its answer, on which they depend.

    Replaying an answer's tokens rebuilds the state.

    Args:
        request: The request that is answered.
        ends: Tokens that end the answer, which come no earlier than ``min_tokens``.
    """

    def __init__(self, request: GenerationRequest, ends: Collection[int]) -> None:
        self._sampling = request.sampling
        self._ends = sorted(ends)
        self._counts: Counter[int] = Counter()
        # Kept as a tensor, because a long prompt has many tokens and every step needs them all.
        self._seen_U = torch.tensor(sorted(set(request.prompt_token_ids)))

    @classmethod
    def of(cls, request: GenerationRequest, ends: Collection[int]) -> Adjustment | None:
        """The changes that a request asks for, None if it takes the logits as they are."""
        return cls(request, ends) if request.sampling.adjusts_logits else None

    def take(self, token_id: int) -> None:
        """Add a token of the answer."""
        self._counts[token_id] += 1
        if not (self._seen_U == token_id).any():
            self._seen_U = torch.cat((self._seen_U, torch.tensor([token_id])))

    def apply(self, logits_V: torch.Tensor) -> None:
        """Change the logits of the next token in place."""
        sampling, device = self._sampling, logits_V.device
        if sampling.logit_bias:
            ids = torch.tensor([*sampling.logit_bias], device=device)
            logits_V[ids] += torch.tensor([*sampling.logit_bias.values()], device=device)
        if self._ends and self._counts.total() < sampling.min_tokens:
            logits_V[self._ends] = -torch.inf
        if sampling.repetition_penalty != 1.0:
            ids = self._seen_U.to(device)
            before_U, factor = logits_V[ids], sampling.repetition_penalty
            logits_V[ids] = torch.where(before_U > 0, before_U / factor, before_U * factor)
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            ids = torch.tensor([*self._counts], device=device)
            times_U = torch.tensor([*self._counts.values()], device=device)
            logits_V[ids] -= sampling.frequency_penalty * times_U + sampling.presence_penalty


def adjusted(logits_BV: torch.Tensor, adjustments: Sequence[Adjustment | None]) -> torch.Tensor:
    """The logits from which tokens are chosen: the given ones, or a changed copy in float32."""
    if not any(adjustments):
        return logits_BV
    copy_BV = logits_BV.to(torch.float32, copy=True)
    for logits_V, adjustment in zip(copy_BV, adjustments, strict=True):
        if adjustment is not None:
            adjustment.apply(logits_V)
    return copy_BV
