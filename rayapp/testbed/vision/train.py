"""Training of the vision test-bed on one CPU core.

A run is a function of its ``Recipe`` up to rounding: scenes and questions are drawn from (seed,
step), so a run that was killed goes on from its checkpoint with the same data. Every step draws new
scenes, so the accuracy in a line of progress is that on scenes never seen before.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from rayapp.testbed.checkpoint import read_checkpoint, write_checkpoint
from rayapp.testbed.vision.attention import attend_packed
from rayapp.testbed.vision.losses import Readings, answer_step_loss, tower_step_loss
from rayapp.testbed.vision.model import new_model
from rayapp.testbed.vision.optimizer import Optimizer
from rayapp.testbed.vision.recipe import Recipe
from rayapp.testbed.vision.tower import Heads, new_heads

_LOG = logging.getLogger(__name__)
_LOG_EVERY = 25
_CHECKPOINT_EVERY = 50


@dataclass(slots=True)
class Run:
    """The state of a run; the checkpoint has all of it.

    Attributes:
        recipe: The recipe.
        model: The model in fp32.
        heads: The throw-away weights.
        optimizer: The optimiser of the stage that ``step`` belongs to, with its state.
        step: Number of steps taken.
        seconds: Wall-clock seconds spent so far.
        cpu_seconds: Seconds of CPU time spent so far.
        history: Lines of progress, oldest first.
    """

    recipe: Recipe
    model: LlavaForConditionalGeneration
    heads: Heads
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def _optimizer(
    recipe: Recipe, model: LlavaForConditionalGeneration, heads: Heads, step: int
) -> Optimizer:
    """The optimiser of a stage: of tower, projector and words, or of all but the tower."""
    first = recipe.trains_tower(step)
    weights: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        is_tower, is_language = ".vision_tower." in name, ".language_model." in name
        is_words = name.endswith("embed_tokens.weight")
        chosen = (not is_language or is_words) if first else not is_tower
        weight.requires_grad_(chosen)
        if chosen:
            weights[name] = weight
    return Optimizer(
        {**weights, **heads},
        matrix_lr=recipe.matrix_lr,
        vector_lr=recipe.vector_lr,
        weight_decay=recipe.weight_decay,
    )


def start_run(recipe: Recipe) -> Run:
    """A run before its first step."""
    model = attend_packed(new_model(recipe.shape, recipe.seed))
    heads = new_heads(recipe.shape, recipe.seed)
    return Run(recipe, model, heads, _optimizer(recipe, model, heads, 0))


def save_checkpoint(run: Run, directory: Path) -> None:
    """Write the run's checkpoint; an older one is replaced only once the new one is complete."""
    state = {
        "recipe": run.recipe,
        "model": run.model.state_dict(),
        "heads": {name: head.detach() for name, head in run.heads.items()},
        "optimizer": run.optimizer.state,
        "step": run.step,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "history": run.history,
    }
    write_checkpoint(state, directory)


def load_checkpoint(directory: Path, recipe: Recipe | None = None) -> Run:
    """Read a run's own checkpoint (a pickle, so only one that this recipe wrote).

    Args:
        directory: Directory of the run.
        recipe: The recipe to go on with; None keeps the checkpoint's.

    Returns:
        The run, as it was after its last checkpoint.
    """
    state = read_checkpoint(directory)
    run = start_run(recipe or state["recipe"])
    run.model.load_state_dict(state["model"])
    for name, head in state["heads"].items():
        run.heads[name].data.copy_(head)
    run.step = state["step"]
    run.optimizer = _optimizer(run.recipe, run.model, run.heads, run.step)
    if run.step != run.recipe.tower.num_steps:
        run.optimizer.state = state["optimizer"]
    run.seconds, run.cpu_seconds = state["seconds"], state["cpu_seconds"]
    run.history = state["history"]
    return run


def take_step(run: Run, seen: Readings) -> None:
    """Take one step of the stage that it belongs to."""
    recipe, step = run.recipe, run.step
    if step == recipe.tower.num_steps:
        run.optimizer = _optimizer(recipe, run.model, run.heads, step)
    step_loss = tower_step_loss if recipe.trains_tower(step) else answer_step_loss
    step_loss(run.model, run.heads, recipe, step, seen).backward()  # type: ignore[no-untyped-call]
    run.optimizer.step(recipe.rate_at(step))
    run.step += 1


class _Clock:
    """The seconds of the run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before = run.seconds, run.cpu_seconds
        self.started = time.monotonic(), time.process_time()
        self.last = (run.step, run.seconds)

    def read(self) -> None:
        self.run.seconds = self.before[0] + time.monotonic() - self.started[0]
        self.run.cpu_seconds = self.before[1] + time.process_time() - self.started[1]

    def step_s(self) -> float:
        """Seconds per step since the last call."""
        self.read()
        step, seconds = self.run.step, self.run.seconds
        mean = (seconds - self.last[1]) / max(1, step - self.last[0])
        self.last = (step, seconds)
        return mean


def _report(run: Run, clock: _Clock, seen: Readings) -> None:
    """Write one line of progress."""
    step_s = clock.step_s()
    means = seen.take()
    run.history.append({"step": run.step, "seconds": run.seconds, **means})
    _LOG.info(
        "step %d of %d (%s), rate %.2f, %.2f s/step, %.0f CPU-s so far, %.1f min left, %s",
        run.step,
        run.recipe.num_steps,
        run.recipe.stage_at(run.step - 1)[0],
        run.recipe.rate_at(run.step - 1),
        step_s,
        run.cpu_seconds,
        (run.recipe.num_steps - run.step) * step_s / 60,
        " ".join(f"{name} {value:.3f}" for name, value in means.items()),
    )


def train(run: Run, directory: Path) -> Run:
    """Train until the recipe's last step, on one thread.

    Args:
        run: A fresh run, or one from ``load_checkpoint``.
        directory: The directory of checkpoints; made if missing.

    Returns:
        The finished run.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    directory.mkdir(parents=True, exist_ok=True)
    clock, seen = _Clock(run), Readings()
    while run.step < run.recipe.num_steps:
        take_step(run, seen)
        last = run.step == run.recipe.num_steps
        if run.step % _LOG_EVERY == 0 or last or run.step == run.recipe.tower.num_steps:
            _report(run, clock, seen)
        if run.step % _CHECKPOINT_EVERY == 0 or last:
            clock.read()
            save_checkpoint(run, directory)
    return run
