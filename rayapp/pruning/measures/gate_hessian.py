"""Curvature of the score in gates around the dense model: the effect of removals by gradients.

CBO (arXiv:2602.00161) multiplies the output of every part, before it joins the residual stream, by
a gate: 1 keeps the part, 0 removes it. Our gates are per **stage** and part, and one backward pass
through the continuation, the KV and the prompt gives the gradients of both stages, line by line:
every line has gates of its own. In one teacher-forced pass over prompt and continuation a token's
position decides which stage's gates it meets; an attention that is removed from prefill thus still
leaves the KV that decode reads.

The score is KL(dense || candidate). At the dense model its gradient vanishes and its Hessian is the
Fisher matrix ``J^T (diag(p) - p p^T) J``, summed over tokens, ``J`` of the logits in the gates and
``p`` the dense distribution. Labels drawn from ``p`` would estimate it, but if a model is sure,
rare labels carry all of it. Project default: its root times random signs goes backward instead,
which is unbiased as well and meets every label in every draw. ``labels="data"`` is the paper's
variant, the outer products ``A^T A`` of gradients of the data's own likelihood.

Transfer rules, healing and the objective's kind are ignored.
Shapes: B = lines, S = stages, P = parts (two per block), M = S x P gates, prefill's first, T =
prompt and continuation tokens, C = continuation tokens, V = vocabulary, U = units of a stage.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from rayapp.errors import SearchError
from rayapp.models.blocks import signature_of
from rayapp.models.likelihood import log_softmax64
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates.candidate import DENSE
from rayapp.pruning.evaluator.block_runner import BlockKVSlot
from rayapp.pruning.evaluator.calibration import Calibration, Chunk
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.settings.objective import Objective

Labels = Literal["expected", "data"]

DRAWS = 1
"""Number of backward passes over each line."""


@dataclass(frozen=True)
class GateHessian:
    """Second derivatives of the score in the gates, in nats per continuation token.

    ``rows`` is ``(M, M)``: the parts of prefill as candidates count them, then those of decode.
    """

    rows: tuple[tuple[float, ...], ...]

    def units(self, num_units: int) -> NDArray[np.float64]:
        """The Hessian over units, ``(2 U, 2 U)``: a block's gate is on both parts; they add up."""
        gates = len(STAGES) * num_units
        parts = len(self.rows) // gates
        return np.array(self.rows).reshape(gates, parts, gates, parts).sum(axis=(1, 3))


def measuring_cost(draws: int = DRAWS) -> int:
    """The cost of a measurement in evaluations: a backward pass is twice a forward pass."""
    return 1 + 2 * draws


def measure_gate_hessian(
    evaluator: Evaluator, *, draws: int = DRAWS, labels: Labels = "expected", seed: int = 0
) -> GateHessian:
    """The dense model's Hessian on the whole calibration set.

    Lines are weighted as scores weigh tasks and tokens.

    Args:
        evaluator: The evaluator whose model is measured; the model keeps the states of one chunk at
            a time for its backward pass.
        draws: Number of draws of random signs per line, which are averaged.
        labels: ``expected`` estimates the Hessian of the KL. ``data`` is the paper's ``A^T A`` of
            the data's labels, for which there is only one draw.
        seed: Seed of the signs, which depend on nothing else but the line's place.

    Raises:
        SearchError: A second derivative is not finite.
    """
    calibration, objective = evaluator.calibration, evaluator.objective
    model = GatedModel(evaluator.runner.model)
    weights = _line_weights(calibration, objective) / draws
    hessian_MM = np.zeros((model.num_gates, model.num_gates))
    for chunk in calibration.chunks:
        roots_B1 = np.sqrt(weights[list(chunk.lines)])[:, None]
        for grads_BM in _gradients(model, chunk, objective, draws, labels, seed):
            hessian_MM += (roots_B1 * grads_BM).T @ (roots_B1 * grads_BM)
    if not np.isfinite(hessian_MM).all():
        raise SearchError(
            "gradients of the dense model are not finite; check the model in its element type "
            "(float16 overflows), or use --dtype float32"
        )
    return GateHessian(tuple(map(tuple, hessian_MM.tolist())))


def _line_weights(calibration: Calibration, objective: Objective) -> NDArray[np.float64]:
    """Weight of every line's sum over tokens in a score."""
    tokens: dict[str, float] = {}
    pooled = objective.score_by == "token"
    groups = ["" if pooled else line.task for line in calibration.lines]
    for line, group in zip(calibration.lines, groups, strict=True):
        tokens[group] = tokens.get(group, 0) + objective.num_counted(len(line.continuation))
    return np.array([1 / (len(tokens) * tokens[group]) for group in groups])


class GatedModel:
    """A dense model whose parts are multiplied by gates; only weights are shared with the original.

    Raises:
        ModelError: The architecture is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._stack = BlockStack(model, DENSE.plan(signature_of(model)), "prefill")
        self.num_parts = 2 * self._stack.num_blocks
        self.num_gates = len(STAGES) * self.num_parts
        self._gates_BTP = torch.ones(0)
        for block, module in enumerate(self._stack.blocks):
            for offset, name in enumerate(("self_attn", "mlp")):
                hook = partial(self._gated, 2 * block + offset)
                module.get_submodule(name).register_forward_hook(hook)

    def _gated(self, part: int, _module: nn.Module, _inputs: object, output: Any) -> Any:
        changed, *others = output if isinstance(output, tuple) else (output,)
        changed = changed * self._gates_BTP[:, :, part, None].to(changed.device, changed.dtype)
        return (changed, *others) if others else changed

    def logits(self, gates_BSP: torch.Tensor, chunk: Chunk, first_token: Stage) -> torch.Tensor:
        """Logits of every continuation token, ``(B, C, V)``, under gates of both stages.

        Gates of 0 and 1 give the logits of the candidate that removes the parts at 0.
        """
        ids_BT = _joined(chunk)
        lengths_B1 = chunk.prompt_lengths_B[:, None]
        by_decode_BT = torch.arange(ids_BT.shape[1]) >= lengths_B1 - int(first_token == "decode")
        gates_BSP = gates_BSP.to(self._stack.device)
        self._gates_BTP = torch.where(
            by_decode_BT[:, :, None].to(gates_BSP.device), gates_BSP[:, 1, None], gates_BSP[:, :1]
        )
        positions_BT = _joined_positions(chunk, ids_BT.shape[1])
        hidden_BTE = self._stack.run(self._stack.embed(ids_BT), positions_BT, BlockKVSlot())
        predicting_BC = lengths_B1 - 1 + torch.arange(chunk.continuations_BC.shape[1])
        predicting_BC = predicting_BC.clamp(max=ids_BT.shape[1] - 1).to(hidden_BTE.device)
        rows_B1 = torch.arange(len(ids_BT), device=hidden_BTE.device)[:, None]
        return self._stack.logits(hidden_BTE[rows_B1, predicting_BC])


def _joined(chunk: Chunk) -> torch.Tensor:
    """Prompt and continuation without its last token, in one row, ``(B, T)``, padded right."""
    rows = [
        torch.cat([prompt_T[:num_prompt], continuation_C[: num_labels - 1]])
        for prompt_T, num_prompt, continuation_C, num_labels in zip(
            chunk.prompts_BT,
            chunk.prompt_lengths_B.tolist(),
            chunk.continuations_BC,
            chunk.continuation_lengths_B.tolist(),
            strict=True,
        )
    ]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _joined_positions(chunk: Chunk, num_tokens: int) -> torch.Tensor:
    """Positions of the joined rows, ``(B or 1, T)``; those of padding follow on."""
    if torch.equal(chunk.answer_positions_B, chunk.prompt_lengths_B):  # the positions have no gaps
        return torch.arange(num_tokens)[None]
    steps_T = torch.arange(num_tokens)
    lengths_B1, answers_B1 = chunk.prompt_lengths_B[:, None], chunk.answer_positions_B[:, None]
    prompt_BT = nn.functional.pad(chunk.positions_BT, (0, num_tokens))[:, :num_tokens]
    return torch.where(steps_T < lengths_B1, prompt_BT, answers_B1 + steps_T - lengths_B1)


@torch.enable_grad()
def _gradients(
    model: GatedModel, chunk: Chunk, objective: Objective, draws: int, labels: Labels, seed: int
) -> Iterator[NDArray[np.float64]]:
    """Gradients of every line, ``(B, M)``, draw by draw; all draws share the forward pass."""
    gates_BSP = torch.ones(len(chunk.lines), len(STAGES), model.num_parts, requires_grad=True)
    logits_BCV = model.logits(gates_BSP, chunk, objective.first_token)
    weight = objective.first_token_weight
    for draw in range(draws):
        backward_BCV = torch.zeros_like(logits_BCV)
        for row, num_labels in enumerate(chunk.continuation_lengths_B.tolist()):
            probs_CV = log_softmax64(logits_BCV[row, :num_labels].detach()).exp()
            if labels == "data":
                change_CV = _towards(chunk.continuations_BC[row, :num_labels], probs_CV)
            else:
                change_CV = _root(probs_CV, f"{seed}/{chunk.lines[row]}/{draw}")
            # Outer products of independent signs weigh as the square of what is multiplied here.
            change_CV[0] *= weight if labels == "data" else math.sqrt(weight)
            backward_BCV[row, :num_labels] = change_CV.to(backward_BCV.dtype)
        [grads_BSP] = torch.autograd.grad(
            logits_BCV, gates_BSP, backward_BCV, retain_graph=draw + 1 < draws
        )
        yield grads_BSP.flatten(1).double().numpy()


def _towards(labels_C: torch.Tensor, probs_CV: torch.Tensor) -> torch.Tensor:
    """Gradient of the labels' log-likelihood with respect to the logits."""
    return nn.functional.one_hot(labels_C.to(probs_CV.device), probs_CV.shape[-1]) - probs_CV


def _root(probs_CV: torch.Tensor, seed: str) -> torch.Tensor:
    """The product ``R signs`` with ``R R^T = diag(p) - p p^T``.

    The matrix is the Hessian of a token's KL in its logits.

    Signs are drawn on the CPU, so that devices agree.
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    drawn_CV = torch.randint(0, 2, probs_CV.shape, generator=generator, dtype=torch.int8)
    roots_CV = probs_CV.sqrt() * (2 * drawn_CV - 1).to(probs_CV.device)
    return roots_CV - probs_CV * roots_CV.sum(dim=-1, keepdim=True)
