"""How the vision test-bed is trained, as data: a step depends on this and its number alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from rayapp.errors import InputError
from rayapp.testbed.vision.model import Shape
from rayapp.testbed.vision.patches import NUM_PATCHES


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training with its own schedule.

    Attributes:
        num_steps: Steps.
        num_scenes: Scenes of a step.
        warmup_steps: Steps over which the learning rates rise.
        decay_share: Share of the steps, at the end, over which they fall to zero.
        decay_power: 1 falls in a straight line; above 1, more steps are taken at low rates.
    """

    num_steps: int
    num_scenes: int
    warmup_steps: int
    decay_share: float
    decay_power: float = 1.0

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates at a step of this stage."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.num_steps - step) / max(1.0, self.decay_share * self.num_steps)
        return min(1.0, rise, max(0.0, fall) ** self.decay_power)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights of a run.

    First the tower and the projector learn what patches show, at first on windows of a quarter of
    the scene; then the projector and the language model learn to answer, the tower frozen, as in
    LLaVA's two stages.

    Attributes:
        seed: Seed of the first weights and of every batch.
        word_targets: Whether visual tokens are drawn to the language model's own words.
        tower: The first stage.
        window_share: Share of its steps that see windows of 12 x 12 patches.
        answers: The second stage.
        sparse_tokens: Visual tokens that the second stage shows at first, those of things and some
            of the background, which makes its steps cheap.
        sparse_share: Share of its steps that show so few; the others show all.
        question_tokens: Tokens of questions and answers of a scene in a step.
        end_weight: Weight of end markers in the loss; that of answers is 1.
        patch_weight: Weight of the patches' loss in the second stage.
        count_weight: Weight of what visual tokens have counted, in the second stage.
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
    sparse_tokens: int = 128
    sparse_share: float = 0.85
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
        for name, stage in (("tower", self.tower), ("answers", self.answers)):
            if stage.num_steps < 1 or stage.num_scenes < 1:
                raise InputError(
                    f"{name} has {stage.num_steps} steps of {stage.num_scenes} scenes; "
                    "give it at least one of each"
                )

    @property
    def num_steps(self) -> int:
        """Steps of both stages."""
        return self.tower.num_steps + self.answers.num_steps

    def trains_tower(self, step: int) -> bool:
        """Whether a step of the run belongs to the first stage."""
        return step < self.tower.num_steps

    def shows_windows(self, step: int) -> bool:
        """Whether a step of the first stage sees windows."""
        return step < self.window_share * self.tower.num_steps

    @property
    def sparse_steps(self) -> int:
        """Steps of the second stage that show few visual tokens; they come first."""
        return round(self.sparse_share * self.answers.num_steps)

    def tokens_at(self, step: int) -> int:
        """Visual tokens that a step of the second stage shows."""
        sparse = step - self.tower.num_steps < self.sparse_steps
        return self.sparse_tokens if sparse else NUM_PATCHES

    def rate_at(self, step: int) -> float:
        """Factor on the learning rates at a step of the run."""
        if self.trains_tower(step):
            return self.tower.rate_at(step)
        return self.answers.rate_at(step - self.tower.num_steps)
