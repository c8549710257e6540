"""Gates against candidates and finite differences, the Hessian against enumerated labels and KL."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rayapp.data.lines import TokenizedLine
from rayapp.errors import SearchError
from rayapp.models.blocks import signature_of
from rayapp.models.likelihood import kl, log_softmax64
from rayapp.pruning.candidates.candidate import DENSE
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration, cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import teacher_forced
from rayapp.pruning.evaluator.objective import combine
from rayapp.pruning.measures.gate_hessian import GatedModel, GateHessian, measure_gate_hessian
from rayapp.pruning.settings.objective import Objective

BLOCKS, VOCABULARY = 3, 7


@pytest.fixture(scope="module")
def small(tiny_model):
    """A model in float64 whose labels can be enumerated, and lines of tasks of unequal weight."""
    shape = {"num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY}
    model = tiny_model("qwen3", **shape, eos_token_id=None, pad_token_id=None)
    rng = random.Random(1)
    lines = [
        TokenizedLine(
            tuple(rng.choices(range(VOCABULARY), k=prompt)),
            tuple(rng.choices(range(VOCABULARY), k=answer)),
            task,
        )
        for prompt, answer, task in [(1, 2, "a"), (5, 4, "b"), (3, 1, "b"), (6, 3, "b")]
    ]
    return model.double(), cut(lines, chunk_tokens=24)


def gradients_by_token(model, calibration: Calibration, first_token) -> list[np.ndarray]:
    """Gradients of every logit in the gates, ``(C, V, M)`` per line, one pass for every logit."""
    gated, found = GatedModel(model), {}
    for chunk in calibration.chunks:
        shape = (len(chunk.lines), 2, gated.num_parts)
        gates = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        logits = gated.logits(gates, chunk, first_token)
        for row, line in enumerate(chunk.lines):
            tokens = range(len(calibration.lines[line].continuation))
            found[line] = np.array(
                [
                    [
                        torch.autograd.grad(logits[row, c, v], gates, retain_graph=True)[0][row]
                        .flatten()
                        .numpy()
                        for v in range(VOCABULARY)
                    ]
                    for c in tokens
                ]
            )
    return [found[line] for line in range(len(calibration.lines))]


def dense_logits(model, calibration: Calibration) -> list[torch.Tensor]:
    plan = DENSE.plan(signature_of(model))
    with torch.no_grad():
        return [teacher_forced(model, plan, line) for line in calibration.lines]


def weighted(
    calibration: Calibration, per_line: list[np.ndarray], score_by: str, first: float = 1.0
) -> np.ndarray:
    """Means over tokens, the first as several, then over tasks if these weigh equally."""
    groups = {line.task if score_by == "task" else "" for line in calibration.lines}
    total = np.zeros_like(per_line[0])
    for group in groups:
        chosen = [i for i, line in enumerate(calibration.lines) if group in ("", line.task)]
        tokens = sum(len(calibration.lines[i].continuation) - 1 + first for i in chosen)
        total += sum(per_line[i] for i in chosen) / tokens / len(groups)
    return total


def enumerated(model, calibration: Calibration, objective: Objective) -> np.ndarray:
    """The sum over all tokens and labels of probability times the gradient's outer product."""
    per_line = []
    found = gradients_by_token(model, calibration, objective.first_token)
    for logits, grads_CVM in zip(dense_logits(model, calibration), found, strict=True):
        probs_CV = log_softmax64(logits).exp().numpy()
        scores_CVM = grads_CVM - np.einsum("cv,cvm->cm", probs_CV, grads_CVM)[:, None]
        heavy_CV = (
            probs_CV
            * np.array([objective.first_token_weight] + [1.0] * (len(probs_CV) - 1))[:, None]
        )
        per_line.append(np.einsum("cv,cvm,cvn->mn", heavy_CV, scores_CVM, scores_CVM))
    return weighted(calibration, per_line, objective.score_by, objective.first_token_weight)


@pytest.mark.parametrize(
    ("family", "first_token"),
    [("llama", "prefill"), ("mistral", "decode"), ("qwen2", "decode"), ("qwen3", "prefill")],
)
def test_gates_of_0_and_1_are_candidates(tiny_model, few, family, first_token):
    model, rng = tiny_model(family), random.Random(0)
    gated = GatedModel(model)
    for space in (Space(5, 1.5, 1, "part"), Space(5, 2, 2), Space(5, 0, 0)):
        candidate = space.draw(rng)
        plan = candidate.plan(signature_of(model), first_token=first_token)
        for chunk in few.chunks:
            gates = torch.ones(len(chunk.lines), 2, gated.num_parts)
            gates[:, 0, list(candidate.prefill)] = 0
            gates[:, 1, list(candidate.decode)] = 0
            with torch.no_grad():
                found = gated.logits(gates, chunk, first_token)
                for row, index in enumerate(chunk.lines):
                    line = few.lines[index]
                    wanted = teacher_forced(model, plan, line)
                    got = found[row, : len(line.continuation)]
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_gradients_are_finite_differences(small, first_token):
    model, calibration = small
    gated, step = GatedModel(model), 1e-3  # transformers' norms are float32 whatever the model is
    grads = gradients_by_token(model, calibration, first_token)
    for chunk in calibration.chunks:
        for gate in range(gated.num_gates):
            moved = []
            for sign in (1, -1):
                gates = torch.ones(len(chunk.lines), gated.num_gates, dtype=torch.float64)
                gates[:, gate] += sign * step
                with torch.no_grad():
                    parts = gates.view(len(gates), 2, -1)
                    moved.append(gated.logits(parts, chunk, first_token))
            slopes = ((moved[0] - moved[1]) / (2 * step)).numpy()
            for row, line in enumerate(chunk.lines):
                tokens = len(calibration.lines[line].continuation)
                np.testing.assert_allclose(
                    slopes[row, :tokens], grads[line][..., gate], atol=1e-3, rtol=1e-3
                )


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(Objective(), marks=pytest.mark.slow),
        pytest.param(Objective(first_token_weight=16), marks=pytest.mark.slow),
        Objective(score_by="token", first_token="decode"),
    ],
)
def test_the_hessian_is_the_expectation_over_enumerated_labels(small, objective):
    model, calibration = small
    wanted = enumerated(model, calibration, objective)
    evaluator = Evaluator(model, calibration, objective)
    errors = []
    for draws in (8, 200):
        found = np.array(measure_gate_hessian(evaluator, draws=draws).rows)
        errors.append(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert errors[1] < 0.15  # the error of sampling falls with the root of the draws
    assert errors[1] < errors[0] / 2


def test_the_hessian_of_the_datas_labels_is_the_papers(small):
    model, calibration = small
    per_line = []
    found = gradients_by_token(model, calibration, "prefill")
    for logits, grads_CVM, line in zip(
        dense_logits(model, calibration), found, calibration.lines, strict=True
    ):
        probs_CV = log_softmax64(logits).exp().numpy()
        labels_CM = grads_CVM[np.arange(len(grads_CVM)), list(line.continuation)]
        score_M = (labels_CM - np.einsum("cv,cvm->cm", probs_CV, grads_CVM)).sum(axis=0)
        per_line.append(np.outer(score_M, score_M))
    evaluator = Evaluator(model, calibration, Objective())
    rows = measure_gate_hessian(evaluator, labels="data").rows
    np.testing.assert_allclose(rows, weighted(calibration, per_line, "task"), rtol=1e-4, atol=1e-6)


def test_the_score_is_the_quadratic_form_near_the_dense_model(small):
    model, calibration = small
    gated, objective = GatedModel(model), Objective()
    hessian = enumerated(model, calibration, objective)
    dense = dense_logits(model, calibration)
    for seed in range(3):
        change = 1e-3 * torch.rand(2, gated.num_parts, generator=torch.manual_seed(seed)).double()
        sums = {}
        for chunk in calibration.chunks:
            with torch.no_grad():
                logits = gated.logits(
                    (1 - change).expand(len(chunk.lines), -1, -1), chunk, "prefill"
                )
            for row, line in enumerate(chunk.lines):
                sums[line] = float(kl(dense[line], logits[row, : len(dense[line])]).sum())
        score = combine(objective, calibration, sums, name="moved").value
        flat = change.flatten().numpy()
        assert score == pytest.approx(flat @ hessian @ flat / 2, rel=0.02)


def test_a_blocks_gate_is_on_both_of_its_parts():
    rows = tuple(tuple(float(8 * i + j) for j in range(8)) for i in range(8))
    hessian = GateHessian(rows)
    assert (hessian.units(4) == np.array(rows)).all()
    assert hessian.units(2).shape == (4, 4)
    assert hessian.units(2)[1, 2] == sum(rows[i][j] for i in (2, 3) for j in (4, 5))


def test_the_hessian_depends_on_seed_and_lines_not_on_chunks(tiny_model, calibration):
    model = tiny_model("llama")
    together = Evaluator(model, calibration, Objective())
    alone = Evaluator(model, cut(calibration.lines, chunk_tokens=1), Objective())
    found = np.array(measure_gate_hessian(together).rows)
    assert (found == np.array(measure_gate_hessian(together).rows)).all()
    assert found == pytest.approx(found.T)
    np.testing.assert_allclose(
        np.array(measure_gate_hessian(alone).rows), found, rtol=1e-3, atol=1e-6
    )
    assert not np.allclose(found, np.array(measure_gate_hessian(together, seed=1).rows), rtol=0.01)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_that_are_not_finite_are_refused(tiny_model, calibration):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(SearchError, match="not finite; check the model in its element type"):
        measure_gate_hessian(Evaluator(model, calibration, Objective()))
