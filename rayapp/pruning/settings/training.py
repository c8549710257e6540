"""How survivors of a removal are trained."""

from __future__ import annotations

from dataclasses import dataclass

RATE_X_WIDTH = 0.4
"""Default learning rate times hidden size. Tuned on the test-bed (0.003 at 128), and carried to
other widths as maximal update parametrisation does for Adam (arXiv:2203.03466)."""


@dataclass(frozen=True)
class Training:
    """How a pair is trained.

    Attributes:
        steps: Steps of Adam; the learning rate follows a cosine down to zero.
        learning_rate: At the first step; None is ``RATE_X_WIDTH / hidden size``.
        step_tokens: Tokens at the stage's positions that a step sees at least, if there are.
        seed: Of the order of the data.
    """

    steps: int = 100
    learning_rate: float | None = None
    step_tokens: int = 256
    seed: int = 0

    def first_rate(self, hidden_size: int) -> float:
        """The learning rate of the first step."""
        return RATE_X_WIDTH / hidden_size if self.learning_rate is None else self.learning_rate


DEFAULT_TRAINING = Training()
