"""Heals one unit at a time, on the dense model's states alone: trains a pair, or solves a fit.

The survivor gets the states that enter the first block of the pair at one stage's positions, and is
trained towards the states that leave the last block. In decode it attends as it will be served: to
the KV that the dense prefill writes for it, and to its own new entries. The modules that make keys
and values stay frozen, so both stages share one key space. Nothing depends on a candidate: a pair
is trained once for all of them. All of it is a project default (our reading of PDTrim,
:mod:`rayapp.pruning.candidates.healing`).
Shapes: B = lines, T = tokens, E = hidden size.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from rayapp.data.lines import TokenizedLine
from rayapp.errors import DataError, SearchError
from rayapp.models.architecture import text_config
from rayapp.models.fingerprints.fingerprint import canonical_name
from rayapp.models.products.joined import unpack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan, Stage
from rayapp.pruning.candidates.healing import HealedUnit, Pair, Unit
from rayapp.pruning.evaluator.block_runner import KV, BlockKVSlot
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.healing.closed_form import LinearFitter
from rayapp.pruning.settings.compute import CACHE_BYTES
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.training import DEFAULT_TRAINING, Training

logger = logging.getLogger(__name__)

FROZEN = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
"""Modules of a block that make its keys and values."""

HELD_BACK_EVERY = 8
"""One line in eight is not trained on, and judges the training."""

BATCH_TOKENS = 2048
"""Number of tokens that training runs at a time, padding included (project default)."""


@dataclass(frozen=True)
class _Batch:
    """One chunk at one stage's positions; ``prefix`` is the prompt's KV that decode reads."""

    input_BTE: torch.Tensor
    target_BTE: torch.Tensor
    valid_BT: torch.Tensor
    positions_BT: torch.Tensor
    mask: torch.Tensor | None
    prefix: KV | None

    @property
    def num_tokens(self) -> int:
        return int(self.valid_BT.sum())


class Healer:
    """Trains pairs of one dense model, and solves its fits.

    Args:
        model: The dense model, which is left as it is.
        lines: Lines of the ``heal`` split; at least ``HELD_BACK_EVERY`` of them.
        first_token: The stage that makes the first answer token, where the stages divide.
        training: Settings of the training.
        batch_tokens: Number of tokens that are run at a time, padding included.
        cache_bytes: Bound of the dense states kept between pairs, in bytes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lines: Sequence[TokenizedLine],
        *,
        first_token: Stage = "prefill",
        training: Training = DEFAULT_TRAINING,
        batch_tokens: int = BATCH_TOKENS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._model, self._training = model, training
        self._rate = training.first_rate(text_config(model.config).hidden_size)
        objective, share = Objective(first_token=first_token), cache_bytes // HELD_BACK_EVERY
        train, held_back = split(lines, batch_tokens)
        self._train = Evaluator(model, train, objective, cache_bytes=cache_bytes - share)
        self._held_back = Evaluator(model, held_back, objective, cache_bytes=share)
        self._fitter = LinearFitter(self._train, self._held_back, cache_bytes=share)

    def heal(self, unit: Unit) -> HealedUnit:
        """Train a pair, or solve a fit.

        Raises:
            DataError: There is no token at the unit's stage.
            SearchError: The dense model's own states are not finite.
        """
        return self._train_pair(unit) if isinstance(unit, Pair) else self._fitter.solve(unit)

    def _train_pair(self, pair: Pair) -> HealedUnit:
        """Train one pair; its tensors are the same wherever it is trained on one kind of machine.

        If training does not improve the survivor on the held-back lines, it stays as it was.

        Raises:
            SearchError: The dense model's own states are not finite.
        """
        rng = random.Random(f"{self._training.seed}/{pair}")
        train = _batches(self._train, pair, (rng, self._training))
        held_back = _batches(self._held_back, pair)
        survivor = _Survivor(self._model, pair)
        before = survivor.loss(held_back)
        if not math.isfinite(before):
            raise SearchError(
                f"healing {pair}: the untrained loss is {before}; states must be finite: check the "
                "model in its element type (float16 overflows), or use --dtype float32"
            )
        dense = survivor.tensors()
        self._fit(survivor, train, rng)
        survivor.round()
        after = survivor.loss(held_back)
        if not after < before:  # an infinite or undefined error is no improvement either
            logger.warning("healing %s: training did not help (%g, %g)", pair, before, after)
            return HealedUnit(pair, dense, before, before)
        return HealedUnit(pair, survivor.tensors(), before, after)

    def _fit(self, survivor: _Survivor, batches: list[_Batch], rng: random.Random) -> None:
        training = self._training
        optimizer = torch.optim.Adam(survivor.trained, lr=self._rate)
        steps = _steps(batches, training.step_tokens, rng)
        for step in range(training.steps):
            cosine = math.cos(math.pi * step / training.steps)
            for parameters in optimizer.param_groups:
                parameters["lr"] = self._rate * (1 + cosine) / 2
            optimizer.zero_grad()
            survivor.error(next(steps)).backward()
            optimizer.step()


class _Survivor:
    """The survivor in float32, apart from the model that it was copied from."""

    def __init__(self, model: PreTrainedModel, pair: Pair) -> None:
        self.pair = pair
        self._stack = BlockStack(model, PruningPlan(), pair.stage)
        self._block = self._stack.blocks[pair.survivor]
        unpack(self._block)
        self._dtype = self._stack.dtype
        self._names: dict[str, nn.Parameter] = {}
        for prefix, module in self._block.named_modules():
            for name, own in list(module._parameters.items()):
                if own is not None:
                    path = f"{prefix}.{name}"
                    copy = nn.Parameter(own.detach().float().clone(), not _is_frozen(path))
                    module._parameters[name] = copy
                    self._names[path] = copy

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self._names.values() if p.requires_grad]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The trained parameters by canonical name, in the model's element type."""
        block = f"layers.{self.pair.survivor}"
        return {
            canonical_name(f"{block}.{path}"): p.detach().to("cpu", self._dtype, copy=True)
            for path, p in self._names.items()
            if p.requires_grad
        }

    def round(self) -> None:
        """Round parameters to the model's element type, in which they will run."""
        with torch.no_grad():
            for parameter in self.trained:
                parameter.copy_(parameter.to(self._dtype))

    def error(self, batches: Iterable[_Batch]) -> torch.Tensor:
        """Relative mean squared error over the valid tokens: sum |y - t|^2 / sum |t|^2."""
        errors, sizes = zip(*(self._squares(batch) for batch in batches), strict=True)
        return torch.stack(errors).sum() / torch.stack(sizes).sum()

    @torch.no_grad()
    def loss(self, batches: Iterable[_Batch]) -> float:
        return float(self.error(batches))

    def _squares(self, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
        block = self.pair.survivor
        output_BTE = self._stack.run(
            batch.input_BTE.float(),
            batch.positions_BT,
            BlockKVSlot(prefix=batch.prefix and (batch.prefix[0].float(), batch.prefix[1].float())),
            {block: batch.mask},
            start=block,
            stop=block + 1,
        )
        target_NE = batch.target_BTE[batch.valid_BT].float()
        error_NE = output_BTE[batch.valid_BT] - target_NE
        return error_NE.square().sum(), target_NE.square().sum()


def _is_frozen(path: str) -> bool:
    return any(path.startswith(f"{module}.") for module in FROZEN)


def split(lines: Sequence[TokenizedLine], chunk_tokens: int) -> tuple[Calibration, Calibration]:
    """Lines to train on and lines that are held back."""
    held_back = lines[HELD_BACK_EVERY - 1 :: HELD_BACK_EVERY]
    train = [line for n, line in enumerate(lines, start=1) if n % HELD_BACK_EVERY]
    return cut(train, chunk_tokens=chunk_tokens), cut(held_back, chunk_tokens=chunk_tokens)


def _steps(
    batches: Sequence[_Batch], step_tokens: int, rng: random.Random
) -> Iterator[list[_Batch]]:
    """Groups of batches, one per training step; all batches come once before any comes again."""
    group: list[_Batch] = []
    while True:
        for batch in rng.sample(batches, len(batches)):
            group.append(batch)
            enough = sum(member.num_tokens for member in group) >= step_tokens
            if enough or len(group) == len(batches):
                yield group
                group = []


def _batches(
    evaluator: Evaluator, pair: Pair, drawn: tuple[random.Random, Training] | None = None
) -> list[_Batch]:
    """Chunks with tokens at the stage's positions; ``drawn`` limits them to training's need."""
    chunks = list(range(len(evaluator.calibration.chunks)))
    step_tokens, wanted = math.inf, math.inf
    if drawn is not None:
        rng, training = drawn
        chunks = rng.sample(chunks, len(chunks))
        step_tokens, wanted = training.step_tokens, training.steps * training.step_tokens
    batches, num_tokens = list[_Batch](), 0.0
    for chunk in chunks:
        if num_tokens < wanted:
            batch = _batch(evaluator, pair, chunk)
            num_tokens += min(batch.num_tokens, step_tokens)
            batches += [batch] * (batch.num_tokens > 0)
    if not batches:
        raise DataError(
            f"the heal data has no token at {pair.stage}'s positions; give longer prompts"
        )
    return batches


def _batch(evaluator: Evaluator, pair: Pair, chunk: int) -> _Batch:
    """Dense states of one chunk, in tensors that autograd may keep."""
    inputs, block = evaluator.inputs(chunk), pair.survivor
    if pair.stage == "prefill":
        positions_BT = inputs.prefill_positions_BP
        valid_BT = positions_BT < inputs.num_prefilled_B[:, None]
        mask, prefix = evaluator.masks.prefill(chunk, block), None
    else:
        positions_BT = inputs.decode_positions_BD
        valid_BT = inputs.valid_BC[:, -positions_BT.shape[1] :]
        mask = evaluator.masks.decode(chunk, block)
        keys, values = evaluator.dense_kv(chunk, block)
        prefix = (keys.clone(), values.clone())
    states = [evaluator.dense_state(pair.stage, chunk, b) for b in (pair.first, pair.last + 1)]
    return _Batch(
        states[0].clone(),
        states[1].clone(),
        valid_BT.to(states[0].device),
        positions_BT.clone(),
        None if mask is None else mask.clone(),
        prefix,
    )
