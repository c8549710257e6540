"""Solves the fits of healing in closed form: maps from the states of a stage to dense targets.

Inputs are states of root mean square 1, which is what every norm of the span rescales, and for
targets that have a bias a constant. All fits that read the same states share the sums of their
inputs' products, which are kept up to a bound: in float64 8 E^2 bytes per stage, block and side of
the data (2.7 MB at a hidden size of 576, 134 MB at 4,096). Sums with the targets are made for every
fit anew, from states that the evaluators cache.
Shapes: B = lines, T = tokens, N = valid tokens, E = hidden size, I = E + 1 inputs, O = outputs,
H = KV heads, D = head dimension.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch

from rayapp.errors import DataError, SearchError
from rayapp.models.blocks import find_decoder
from rayapp.models.healed import normalised
from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import DENSE
from rayapp.pruning.candidates.fits import Fit
from rayapp.pruning.candidates.healing import HealedUnit, Healing
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.healing.least_squares import Moments, best_map, products
from rayapp.pruning.healing.targets import BridgeTarget, KVTarget, Rows, Target

logger = logging.getLogger(__name__)

TOKENS_PER_INPUT = 8
"""Number of tokens per input below which the ridge decides much of a map (project default)."""

SINKS = 16
"""Number of first tokens of a prompt that tell nothing of answers: among them are those that draw
attention to themselves by huge states (project default)."""

FIRST_TOKEN_WEIGHT = 64.0
"""Number of tokens that the first token of a prompt counts as in prefill. All later tokens attend
to it, and its state is like no other. On a real model weights of 50 and of 1,000 serve alike, and
take a quarter off the KL that a weight of 1 leaves (project default)."""


class LinearFitter:
    """Solves fits of one dense model.

    Args:
        train: Runs the lines that are fitted.
        held_back: Runs the lines that choose the ridge.
        cache_bytes: Bound of the sums kept between fits, in bytes.
    """

    def __init__(self, train: Evaluator, held_back: Evaluator, *, cache_bytes: int) -> None:
        self._sides = (train, held_back)
        self._decoder = find_decoder(train.runner.model)
        first_token = train.objective.first_token
        num_blocks = train.runner.num_blocks
        self._healing = Healing(num_blocks, linear=True, served=True, first_token=first_token)
        self._epsilon: float = self._decoder.norm.variance_epsilon
        self._grams: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._warned = False
        self._ready: set[Fit] = set()

    @torch.no_grad()
    def solve(self, fit: Fit) -> HealedUnit:
        """Solve one fit; its tensors are the same wherever it is solved on one kind of machine.

        If no map improves on the judging lines, the block stays as it was.

        Raises:
            DataError: There is no token at the stage's positions.
            SearchError: The dense model's own states are not finite.
        """
        self._prepare(fit)
        block = self._decoder.layers[fit.block]
        target: Target = KVTarget(block) if fit.kind == "kv" else BridgeTarget()
        train, held_back = (self._moments(side, fit, target) for side in self._sides)
        self._check(fit, train, held_back)
        scale = float(held_back.targets_O.sum())
        solved = best_map(train, held_back, target.prior(train), scale=scale)
        if solved.ridge is None:
            logger.warning("healing %s: no map helped (%g)", fit, solved.error_before)
        dtype = block.input_layernorm.weight.dtype
        named = target.tensors(solved.map_IO).items()
        tensors = {f"layers.{fit.block}.{name}": t.to("cpu", dtype) for name, t in named}
        return HealedUnit(fit, tensors, solved.error_before, solved.error_after)

    def _prepare(self, fit: Fit) -> None:
        """Solve the fits that the states before a fit are made with, and let both sides run them.

        They are solved here even if they were solved elsewhere, since results are the same.
        """
        for needed in self._healing.fits(fit.before):
            if needed not in self._ready and fit.stage in (needed.stage, "decode"):
                healed = self.solve(needed)
                for side in self._sides:
                    side.add_healed(healed)
                self._ready.add(needed)

    def _check(self, fit: Fit, train: Moments, held_back: Moments) -> None:
        """Raise if a map cannot be solved, and warn once where there are few tokens for it."""
        sums = (train.inputs_II, train.cross_IO, held_back.inputs_II, held_back.cross_IO)
        if not all(bool(tensor.isfinite().all()) for tensor in sums):
            raise SearchError(
                f"healing {fit}: the dense model's states are not finite: check the model in its "
                "element type (float16 overflows), or use --dtype float32"
            )
        num_inputs, wanted = len(train.inputs_II), TOKENS_PER_INPUT * len(train.inputs_II)
        if train.num_tokens < wanted and not self._warned:
            self._warned = True
            logger.warning(
                "healing %s: %d tokens for maps of %d inputs, so the ridge decides much of them; "
                "give %d tokens or more as --heal-data",
                fit,
                train.num_tokens,
                num_inputs,
                wanted,
            )

    def _moments(self, side: Evaluator, fit: Fit, target: Target) -> Moments:
        """The sums of one fit over all tokens of a side."""
        rows = self._rows(side, fit)
        cross_IO = squares_O = torch.zeros((), dtype=torch.float64, device=rows[0].first_NE.device)
        for row, output_NO in zip(rows, target.outputs(rows), strict=True):
            weighted_NO = output_NO.to(torch.float64) * row.weights_N[:, None]
            cross_IO = cross_IO + products(self._inputs(row.first_NE, target), weighted_NO)
            squares_O = squares_O + (output_NO * weighted_NO).sum(dim=0)
        num_tokens = sum(len(row.first_NE) for row in rows)
        return Moments(self._gram(side, fit, target, rows), cross_IO, squares_O, num_tokens)

    def _rows(self, side: Evaluator, fit: Fit) -> list[Rows]:
        """Dense states at the stage's positions; where decode's are few, prompts' are added.

        The dense model makes states of both stages in the same way, but for the first tokens of a
        prompt, which no answer is like. Held-back lines judge decode by its own positions.
        """
        chunks = range(len(side.calibration.chunks))
        rows = [self._states(side, fit, chunk, fit.stage) for chunk in chunks]
        num_tokens = sum(len(row.first_NE) for row in rows if row)
        if not num_tokens:
            raise DataError(
                f"the heal data has no token at {fit.stage}'s positions; give longer prompts and "
                "completions"
            )
        few = num_tokens < TOKENS_PER_INPUT * self._decoder.norm.weight.shape[0]
        if fit.stage == "decode" and few and side is self._sides[0]:
            dense = replace(fit, before=DENSE)
            rows += [self._states(side, dense, c, "prefill", skipping=SINKS) for c in chunks]
        return [row for row in rows if row]

    def _states(
        self, side: Evaluator, fit: Fit, chunk: int, stage: Stage, *, skipping: int = 0
    ) -> Rows | None:
        """States of one chunk at a stage's positions that enter the fit's two blocks.

        Those of the first block are made as ``fit.before`` says, those of the last by the dense
        model. The first ``skipping`` tokens of prompts are left out; None if no others are there.
        """
        inputs = side.inputs(chunk)
        if stage == "prefill":
            steps_T = torch.arange(inputs.prefill_ids_BP.shape[1])
            valid_BT = (steps_T >= skipping) & (steps_T < inputs.num_prefilled_B[:, None])
            weights_T = torch.where(steps_T == 0, FIRST_TOKEN_WEIGHT, 1.0)
        else:
            valid_BT = inputs.valid_BC[
                :, inputs.valid_BC.shape[1] - inputs.decode_ids_BD.shape[1] :
            ]
            weights_T = torch.ones(valid_BT.shape[1])
        if not valid_BT.any():
            return None
        states = [
            side.state(fit.before, stage, chunk, fit.first, self._healing),
            side.dense_state(stage, chunk, fit.stop),
        ]
        weights_N, device = weights_T.expand(valid_BT.shape)[valid_BT], states[0].device
        first_NE, last_NE = (state_BTE[valid_BT.to(device)] for state_BTE in states)
        return Rows(first_NE, last_NE, weights_N.double().to(device))

    def _gram(
        self, side: Evaluator, fit: Fit, target: Target, rows: Sequence[Rows]
    ) -> torch.Tensor:
        """Sums of the inputs' products, which fits that read the same states share."""
        key = (self._sides.index(side), fit.stage, fit.first, fit.before, target.has_bias)
        if key not in self._grams:
            gram_II = torch.zeros((), dtype=torch.float64, device=rows[0].first_NE.device)
            for row in rows:
                inputs_NI = self._inputs(row.first_NE, target)
                gram_II = gram_II + products(inputs_NI, inputs_NI * row.weights_N[:, None])
            self._grams[key] = gram_II
        self._grams.move_to_end(key)
        while len(self._grams) > 1 and self._num_bytes > self._cache_bytes:
            self._grams.popitem(last=False)
        return self._grams[key]

    @property
    def _num_bytes(self) -> int:
        return sum(gram_II.nbytes for gram_II in self._grams.values())

    def _inputs(self, hidden_NE: torch.Tensor, target: Target) -> torch.Tensor:
        """The inputs of a map, made of states: ``(N, E)``, or with a constant ``(N, E + 1)``."""
        normed_NE = normalised(hidden_NE, self._epsilon)
        if not target.has_bias:
            return normed_NE
        return torch.cat([normed_NE, normed_NE.new_ones(len(normed_NE), 1)], dim=1)
