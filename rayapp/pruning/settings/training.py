"""Settings of the training of survivors."""

from __future__ import annotations

from dataclasses import dataclass

RATE_X_WIDTH = 0.4
"""Default learning rate times hidden size. It was tuned on the test-bed (0.003 at 128), and is
carried to other widths as maximal update parametrisation does for Adam (arXiv:2203.03466)."""


@dataclass(frozen=True)
class Training:
    """The training of a pair.

    Attributes:
        steps: Number of steps of Adam; the learning rate follows a cosine down to zero.
        learning_rate: Learning rate of the first step; None is ``RATE_X_WIDTH / hidden size``.
        step_tokens: Smallest number of tokens at the stage's positions in a step, if there are
            enough.
        seed: Seed of the order of the data.
    """

    steps: int = 100
    learning_rate: float | None = None
    step_tokens: int = 256
    seed: int = 0

    def first_rate(self, hidden_size: int) -> float:
        """The learning rate of the first step."""
        return RATE_X_WIDTH / hidden_size if self.learning_rate is None else self.learning_rate


DEFAULT_TRAINING = Training()
