"""The recipe of the vision test-bed, as data: a step depends on this and its number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from rayapp.errors import InputError
from rayapp.testbed.vision.model import Shape
from rayapp.testbed.vision.questions.patches import NUM_PATCHES


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training with its own schedule.

    Attributes:
        num_steps: Number of steps.
        num_scenes: Number of scenes of a step.
        warmup_steps: Number of steps over which the learning rates rise.
        decay_share: Share of the steps, at the end, over which the rates fall to zero.
        decay_power: Power of the fall: 1 is a straight line; above 1, more steps are taken at low
            rates.
        peak: Factor on the learning rates before they fall.
    """

    num_steps: int
    num_scenes: int
    warmup_steps: int
    decay_share: float
    decay_power: float = 1.0
    peak: float = 1.0

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates at a step of this stage."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.num_steps - step) / max(1.0, self.decay_share * self.num_steps)
        return self.peak * min(1.0, rise, max(0.0, fall) ** self.decay_power)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings that decide the weights of a run.

    First the tower and the projector learn the labels of patches, at first on windows of a quarter
    of the scene. Then the projector and the language model learn to answer, with the tower frozen,
    as in LLaVA's two stages: from all tokens of things and a little background, which makes steps
    cheap, and at last from any amount of background, so that no answer depends on its amount (if a
    model sees one amount only, it may count things by the attention that background leaves them).

    Attributes:
        seed: Seed of the first weights and of every batch.
        word_targets: Whether visual tokens are drawn to the language model's own words.
        tower: The first stage.
        window_share: Share of the first stage's steps that see windows of 12 x 12 patches.
        answers: The second stage.
        answer_tokens: Number of a picture's visual tokens that the second stage shows.
        lengths: The third stage.
        length_rounds: Number of rounds of the third stage; its rates rise anew in each.
        least_tokens: Least number of visual tokens that the third stage shows; up to all of them,
            uniform in the logarithm.
        question_tokens: Number of tokens of a scene's questions and answers in a step.
        end_weight: Weight of end markers in the loss; that of answers is 1.
        patch_weight: Weight of the patches' loss after the first stage.
        count_weight: Weight of the loss of visual tokens' counts after the first stage.
        matrix_lr: Learning rate of Muon.
        vector_lr: Learning rate of AdamW.
        weight_decay: Decoupled decay of the matrices.
        shape: Sizes of the model.
    """

    seed: int = 0
    word_targets: bool = True
    tower: Stage = Stage(2600, 8, 50, 0.3)
    window_share: float = 0.85
    answers: Stage = Stage(7000, 6, 100, 0.95, 2.0)
    answer_tokens: int = 128
    lengths: Stage = Stage(2400, 6, 50, 0.95, 1.0, 0.35)
    length_rounds: int = 2
    least_tokens: int = 72
    question_tokens: int = 128
    end_weight: float = 0.1
    patch_weight: float = 0.3
    count_weight: float = 1.0
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    weight_decay: float = 0.02
    shape: Shape = field(default_factory=Shape)

    def __post_init__(self) -> None:
        """Refuse stages without steps."""
        for name, stage in self.stages.items():
            if stage.num_steps < 1 or stage.num_scenes < 1:
                raise InputError(
                    f"{name} has {stage.num_steps} steps of {stage.num_scenes} scenes; "
                    "give it at least one of each"
                )

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages in order, with their names."""
        return {"tower": self.tower, "answers": self.answers, "lengths": self.lengths}

    @property
    def num_steps(self) -> int:
        """Number of steps of all stages."""
        lengths = self.length_rounds * self.lengths.num_steps
        return self.tower.num_steps + self.answers.num_steps + lengths

    def stage_at(self, step: int) -> tuple[str, int]:
        """The name of the stage that a step of the run belongs to, and the step within it."""
        if step < self.tower.num_steps:
            return "tower", step
        step -= self.tower.num_steps
        if step < self.answers.num_steps:
            return "answers", step
        return "lengths", (step - self.answers.num_steps) % self.lengths.num_steps

    def trains_tower(self, step: int) -> bool:
        """Whether a step of the run belongs to the first stage."""
        return step < self.tower.num_steps

    def shows_windows(self, step: int) -> bool:
        """Whether a step of the first stage sees windows."""
        return step < self.window_share * self.tower.num_steps

    def tokens_at(self, step: int, rng: random.Random) -> int:
        """Number of visual tokens that a step after the first stage shows."""
        if self.stage_at(step)[0] == "answers":
            return self.answer_tokens
        return round(self.least_tokens * (NUM_PATCHES / self.least_tokens) ** rng.random())

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates at a step of the run."""
        name, within = self.stage_at(step)
        return self.stages[name].rate_at(within)
