"""Training of the text test-bed on a few CPU cores: one process per core, gradients averaged.

A run is a function of its ``Recipe``: batches are drawn from (seed, step, shard), so a run that was
killed goes on from its checkpoint with the same data, and one process computes what two would.
Rounding is not part of the promise: it depends on where buffers lie, and training amplifies it (two
replays of the same 50 steps differed by up to 0.007 nats per token). Every process has one thread,
because barriers between spinning threads are ruinous as soon as something else uses the cores.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from rayapp.testbed.checkpoint import read_checkpoint, write_checkpoint
from rayapp.testbed.muon import Exchange, Optimizer, RankExchange
from rayapp.testbed.network import Weights, hidden_states, initial_weights, logits_at
from rayapp.testbed.recipe import Recipe
from rayapp.testbed.rows import KINDS, draw_batch, standard_library_text
from rayapp.testbed.tasks import TASKS, Example, generate
from rayapp.testbed.tokens import END_ID, PAD_ID

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """The state of a run; the checkpoint has all of it.

    Attributes:
        recipe: The recipe; ``num_steps`` changes if a time limit shortens the run.
        weights: The weights in fp32.
        optimizer: The optimiser with its state.
        step: Number of steps taken.
        seconds: Wall-clock seconds spent so far, evaluations included.
        history: Lines of progress, oldest first.
    """

    recipe: Recipe
    weights: Weights
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a run logs, evaluates and saves, and how long it may take.

    Attributes:
        log_every: Number of steps between lines of progress.
        evaluate_every: Number of steps between exact-match readings on validation prompts.
        checkpoint_every: Number of steps between checkpoints.
        num_examples: Number of validation prompts per task and length class.
        minutes: Time limit in minutes: the decay begins so that the run ends then; None runs all
            steps.
    """

    log_every: int = 50
    evaluate_every: int = 400
    checkpoint_every: int = 200
    num_examples: int = 48
    minutes: float | None = None


def start_run(recipe: Recipe) -> Run:
    """A run before its first step."""
    optimizer = Optimizer(recipe.matrix_lr, recipe.vector_lr, recipe.weight_decay)
    return Run(recipe, initial_weights(recipe.shape, recipe.seed), optimizer)


def save_checkpoint(run: Run, directory: Path) -> None:
    """Write the run's checkpoint; an older one is replaced only once the new one is complete."""
    state = {
        "recipe": run.recipe,
        "weights": {name: weight.detach() for name, weight in run.weights.items()},
        "optimizer": run.optimizer.state,
        "step": run.step,
        "seconds": run.seconds,
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
    for name, weight in state["weights"].items():
        run.weights[name].data.copy_(weight)
    run.optimizer.state = state["optimizer"]
    run.optimizer.num_steps = run.step = state["step"]
    run.seconds, run.history = state["seconds"], state["history"]
    return run


@dataclass(slots=True)
class Losses:
    """Sums of the answer loss by kind since the last line of progress; fp32, ``(1 + kinds,)``."""

    nats: torch.Tensor = field(default_factory=lambda: torch.zeros(1 + len(KINDS)))
    tokens: torch.Tensor = field(default_factory=lambda: torch.zeros(1 + len(KINDS)))

    def add(self, losses_N: torch.Tensor, kinds_N: torch.Tensor) -> None:
        """Add the losses of ``N`` supervised tokens."""
        self.nats.index_add_(0, kinds_N, losses_N)
        self.tokens.index_add_(0, kinds_N, torch.ones_like(losses_N))

    def take(self) -> dict[str, float]:
        """Mean loss of every kind seen, in nats per token; the sums start over."""
        means = (self.nats / self.tokens).tolist()
        seen = {kind: round(means[1 + i], 4) for i, kind in enumerate(KINDS) if self.tokens[1 + i]}
        self.nats.zero_()
        self.tokens.zero_()
        return seen


class Trainer:
    """One process's part of a run.

    Args:
        run: The run, which is the same in every process.
        exchange: How processes average gradients and share the optimiser's work.
        rank: Number of this process.
        num_ranks: Number of processes; it divides ``recipe.num_shards``.
    """

    def __init__(self, run: Run, exchange: Exchange, rank: int, num_ranks: int) -> None:
        self.run = run
        self.exchange = exchange
        self.shards = range(rank, run.recipe.num_shards, num_ranks)
        self.text: np.ndarray = standard_library_text(held_out=False)
        weights = run.recipe.kind_weights
        self.kind_weights = torch.tensor([0.0, *(weights[kind] for kind in KINDS)])
        self.losses = Losses()

    def _loss(self, step: int, shard: int) -> torch.Tensor:
        recipe = self.run.recipe
        phase = recipe.phase_at(step)
        draw = random.Random(f"{recipe.seed}/{step}")
        length = draw.choices(list(phase.lengths), list(phase.lengths.values()))[0]
        batch = draw_batch(
            random.Random(f"{recipe.seed}/{step}/{shard}"),
            length,
            phase.context_of(length),
            recipe.tokens_per_shard,
            recipe.task_mix,
            self.text,
            recipe.text_share,
        )
        mask_BT = batch.kinds_BT > 0
        logits_NV = logits_at(
            self.run.weights, batch.inputs_BT, mask_BT, recipe.shape, torch.bfloat16
        )
        losses_N = functional.cross_entropy(logits_NV, batch.targets_BT[mask_BT], reduction="none")
        kinds_N = batch.kinds_BT[mask_BT]
        self.losses.add(losses_N.detach(), kinds_N)
        weights_N = self.kind_weights[kinds_N]
        return (losses_N * weights_N).sum() / weights_N.sum()

    def step(self) -> None:
        """Take one step."""
        run = self.run
        for shard in self.shards:
            (self._loss(run.step, shard) / len(self.shards)).backward()  # type: ignore[no-untyped-call]
        gradients = {name: weight.grad for name, weight in run.weights.items()}
        averaged = self.exchange.average({k: g for k, g in gradients.items() if g is not None})
        run.optimizer.update(run.weights, averaged, run.recipe.rate_at(run.step), self.exchange)
        for weight in run.weights.values():
            weight.grad = None
        run.step += 1


def argmax_matches(
    weights: Weights,
    recipe: Recipe,
    examples: list[Example],
    dtype: torch.dtype = torch.bfloat16,
) -> list[bool]:
    """Whether greedy decoding would write each answer and its end marker.

    One teacher-forced pass suffices: greedy decoding is right exactly if the best token is right at
    every position of the answer, given the right tokens before it.

    Args:
        weights: Weights of the network.
        recipe: Its recipe.
        examples: Questions; taken by length here, some 4,096 tokens at a time.
        dtype: Dtype of the computation.

    Returns:
        One flag per example, in order.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    matches = [False] * len(examples)
    while order:
        rows = max(1, 4096 // (len(examples[order[0]].prompt) + 16))
        group, order = order[:rows], order[rows:]
        ids = [[*(examples[i].prompt + examples[i].completion).encode(), END_ID] for i in group]
        width = max(map(len, ids))
        ids_BT = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in ids])
        with torch.no_grad():
            hidden = hidden_states(weights, ids_BT[:, :-1], recipe.shape, dtype).float()
            best_BT = functional.linear(hidden, weights["embed_tokens"]).argmax(-1)
        for row, index in enumerate(group):
            start, end = len(examples[index].prompt), len(ids[row])
            matches[index] = bool(
                (best_BT[row, start - 1 : end - 1] == ids_BT[row, start:end]).all()
            )
    return matches


def validation_scores(run: Run, count: int, rank: int, num_ranks: int) -> dict[str, float]:
    """Exact match per task on short and long validation prompts, shared out over the ranks."""
    names = [f"{task}/{length}" for length in ("short", "long") for task in TASKS]
    right = torch.zeros(len(names))
    for index, name in enumerate(names):
        task, length = name.split("/")
        mine = generate(task, "validation", count, 0, length=length)[rank::num_ranks]
        right[index] = sum(argmax_matches(run.weights, run.recipe, mine))
    if num_ranks > 1:
        torch.distributed.all_reduce(right)
    return {name: round(right[index].item() / count, 3) for index, name in enumerate(names)}


class _Clock:
    """The seconds of the run, and its time limit."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before = run.seconds
        self.started = time.monotonic()
        self.last = (run.step, run.seconds)

    def read(self) -> float:
        self.run.seconds = self.before + time.monotonic() - self.started
        return self.run.seconds

    def step_s(self) -> float:
        """Seconds per step since the last call."""
        step, seconds = self.run.step, self.read()
        mean = (seconds - self.last[1]) / max(1, step - self.last[0])
        self.last = (step, seconds)
        return mean

    def shorten(self, minutes: float, step_s: float) -> None:
        """Begin the decay now if waiting would overrun the limit; rank 0 decides for all."""
        recipe = self.run.recipe
        end = max(self.run.step, recipe.warmup_steps) + recipe.decay_steps
        late = self.run.seconds + recipe.decay_steps * step_s >= minutes * 60
        flag = torch.tensor([float(late and end < recipe.num_steps)])
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(flag, src=0)
        if flag.item():
            self.run.recipe = dataclasses.replace(recipe, num_steps=end)
            _LOG.info("time limit: the run will end at step %d", end)


def _report(trainer: Trainer, clock: _Clock, pace: Pace) -> None:
    """Write one line of progress, and keep a time limit."""
    run = trainer.run
    step_s = clock.step_s()
    if pace.minutes is not None:
        clock.shorten(pace.minutes, step_s)
    tokens = run.recipe.tokens_per_shard * run.recipe.num_shards
    _LOG.info(
        "step %d of %d, rate %.2f, %.0f tokens/s, %.1f min left, nats/token %s",
        run.step,
        run.recipe.num_steps,
        run.recipe.rate_at(run.step),
        tokens / step_s,
        (run.recipe.num_steps - run.step) * step_s / 60,
        trainer.losses.take(),
    )


def _train_loop(run: Run, directory: Path, pace: Pace, rank: int, num_ranks: int) -> None:
    exchange = RankExchange() if num_ranks > 1 else Exchange()
    trainer = Trainer(run, exchange, rank, num_ranks)
    clock = _Clock(run)
    while run.step < run.recipe.num_steps:
        trainer.step()
        last = run.step == run.recipe.num_steps
        if run.step % pace.log_every == 0:
            _report(trainer, clock, pace)
        if run.step % pace.evaluate_every == 0 or last:
            scores = validation_scores(run, pace.num_examples, rank, num_ranks)
            clock.read()
            run.history.append({"step": run.step, "seconds": run.seconds, **scores})
            _LOG.info("step %d exact match %s", run.step, scores)
        if rank == 0 and (run.step % pace.checkpoint_every == 0 or last):
            clock.read()
            save_checkpoint(run, directory)


def _rank_main(
    rank: int, num_ranks: int, run: Run, directory: Path, pace: Pace, log_level: int
) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if num_ranks > 1:
        logging.basicConfig(
            level=log_level if rank == 0 else logging.WARNING,
            format="%(asctime)s %(message)s",
            datefmt="%H:%M:%S",
        )
        meeting = (directory.resolve() / "ranks").as_uri()
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=num_ranks
        )
    for name, weight in run.weights.items():
        run.weights[name] = weight.detach().clone().requires_grad_()
    _train_loop(run, directory, pace, rank, num_ranks)
    if num_ranks > 1:
        torch.distributed.destroy_process_group()


def train(run: Run, directory: Path, *, num_ranks: int = 2, pace: Pace | None = None) -> Run:
    """Train until the recipe's last step.

    Args:
        run: A fresh run, or one from ``load_checkpoint``.
        directory: The directory of checkpoints; made if missing.
        num_ranks: Number of processes, of one thread each; it must divide ``recipe.num_shards``.
        pace: How often to log, evaluate and save.

    Returns:
        The finished run, read back from its checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ranks").unlink(missing_ok=True)
    level = logging.getLogger().getEffectiveLevel()
    arguments = (num_ranks, run, directory, pace or Pace(), level)
    if num_ranks == 1:
        _rank_main(0, *arguments)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        spawn(_rank_main, arguments, nprocs=num_ranks)
    return load_checkpoint(directory)
