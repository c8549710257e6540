"""Fits equal ``lstsq`` on the dense states, serve as they are scored, and never make KV worse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import DataError, SearchError
from rayapp.kv.cache import CaptureCache
from rayapp.models.blocks import find_decoder, signature_of
from rayapp.models.healed import HealedWeights, attach, normalised
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGES
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.fits import Fit
from rayapp.pruning.candidates.healing import NO_HEALING, Healing
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.naive import naive_scores, teacher_forced
from rayapp.pruning.healing import closed_form, least_squares
from rayapp.pruning.healing.healed_units import HealedUnits
from rayapp.pruning.healing.training import Healer
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.training import Training
from rayapp.pruning.storage import Storage
from tests.conftest import FAMILIES
from tests.pruning.conftest import draw_lines


def removing(prefill=(), decode=()):
    return Candidate(*(tuple(p for b in s for p in (2 * b, 2 * b + 1)) for s in (prefill, decode)))


CANDIDATES = [DENSE, removing([0, 2, 3], [2]), removing([4], [0, 1, 3])]
LINEAR = Healing(5, linear=True)
HEAL_LINES = draw_lines(24, seed=5)


def scorer_of(model, directory, first_token="prefill", training=None):
    calibration, objective = cut(draw_lines(5), chunk_tokens=96), Objective(first_token=first_token)
    healer = Healer(model, HEAL_LINES, first_token=first_token, training=training or Training())
    compute = LocalCompute(Evaluator(model, calibration, objective), healer)
    healed = HealedUnits(Storage(directory), {"data": "d"}, compute)
    return Scorer(calibration, objective, compute, weights="w", healed=healed)


def weights_of(scorer, healing, candidate):
    units = healing.units(candidate)
    return scorer.healed.weights(units) if units else None


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_stages_that_a_plan_serves(tiny_model, tmp_path, family):
    model = tiny_model(family)
    first_token = "decode" if family == "qwen2" else "prefill"
    scorer = scorer_of(model, tmp_path, first_token)
    bare = [score.value for score in scorer.score_many(CANDIDATES)]
    healing = replace(LINEAR, first_token=first_token)
    scorer.heal_with(healing)
    healed = [score.value for score in scorer.score_many(CANDIDATES)]
    wanted = naive_scores(
        model,
        scorer.calibration,
        scorer.objective,
        CANDIDATES,
        lambda candidate: weights_of(scorer, healing, candidate),
    )
    assert healed == pytest.approx([score.value for score in wanted], rel=1e-4, abs=1e-6)
    assert healed[0] == bare[0] == 0.0  # with nothing skipped, nothing changes
    assert all(abs(a - b) > 1e-3 for a, b in zip(bare[1:], healed[1:], strict=True))
    scorer.heal_with(NO_HEALING)  # states of healed candidates are not mixed up with others
    scorer._memo.clear()
    assert [score.value for score in scorer.score_many(CANDIDATES)] == bare


@pytest.mark.parametrize("first_token", STAGES)
def test_maps_of_served_states_serve_as_they_are_scored(tiny_model, tmp_path, first_token):
    model = tiny_model("qwen2")
    scorer = scorer_of(model, tmp_path, first_token)
    healing = replace(LINEAR, served=True, first_token=first_token)
    candidates = [removing([1, 3], [1, 3]), removing([], [1, 3])]
    assert len({fit.before for fit in healing.fits(candidates[0])}) == 4
    scorer.heal_with(healing)
    scores = scorer.score_many(candidates)
    wanted = naive_scores(
        model,
        scorer.calibration,
        scorer.objective,
        candidates,
        lambda candidate: weights_of(scorer, healing, candidate),
    )
    for score, other in zip(scores, wanted, strict=True):
        assert score.value == pytest.approx(other.value, rel=1e-4)


def test_served_states_are_those_of_the_healed_stage(tiny_model):
    model = tiny_model("llama")
    candidate = removing([0, 2])
    healing = replace(LINEAR, served=True)
    first, second = (f for f in healing.fits(candidate) if f.kind == "bridge")
    assert first.before == DENSE
    assert second.before == removing([0], [0])
    fitter = Healer(model, HEAL_LINES)._fitter
    units = [fitter.solve(fit) for fit in (first, second)]
    dense = Healer(model, HEAL_LINES)._fitter.solve(replace(second, before=DENSE))
    assert not torch.equal(*(u.tensors["layers.2.bridge.weight"] for u in (units[1], dense)))
    weights = HealedWeights.of({"prefill": units[0].tensors, "decode": {}})
    attach(model, weights)
    plan = removing([0], [0]).plan(signature_of(model)).with_healed(weights.digest)
    stack = BlockStack(model, plan, "prefill")
    line = HEAL_LINES[0]
    hidden = stack.embed(torch.tensor([line.prompt]))
    cache = CaptureCache.for_stack(stack)
    served = stack.run(hidden, torch.arange(len(line.prompt))[None], cache, stop=2)
    side = fitter._sides[0]
    chunk = next(n for n, c in enumerate(side.calibration.chunks) if 0 in c.lines)
    row = side.calibration.chunks[chunk].lines.index(0)
    found = side.state(second.before, "prefill", chunk, 2, healing)[row, : len(line.prompt)]
    torch.testing.assert_close(found, served[0], rtol=1e-4, atol=1e-4)


def test_pairs_and_maps_serve_together_as_they_are_scored(tiny_model, tmp_path):
    model = tiny_model("llama")
    scorer = scorer_of(model, tmp_path, training=Training(steps=1))
    healing = replace(Healing.of_all(5), linear=True)
    scorer.heal_with(healing)
    candidate = removing([1, 2], [3])
    kinds = {type(unit).__name__ for unit in healing.units(candidate)}
    assert kinds == {"Pair", "Fit"}
    (score,) = scorer.score_many([candidate])
    (wanted,) = naive_scores(
        model,
        scorer.calibration,
        scorer.objective,
        [candidate],
        lambda _: weights_of(scorer, healing, candidate),
    )
    assert score.value == pytest.approx(wanted.value, rel=1e-4)


def dense_states(model, lines, block):
    """The dense model's states that enter a block, at all tokens of all prompts."""
    states = []

    def keep(_module, inputs, kwargs):
        states.append(inputs[0] if inputs else kwargs["hidden_states"])

    hook = find_decoder(model).layers[block].register_forward_pre_hook(keep, with_kwargs=True)
    for line in lines:
        model(torch.tensor([line.prompt]))
    hook.remove()
    return torch.cat([state[0] for state in states])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_at_full_rank_and_without_a_ridge_a_fit_is_lstsq(tiny_model, family, monkeypatch):
    model = tiny_model(family)
    monkeypatch.setattr(closed_form, "best_map", unridged)
    monkeypatch.setattr(closed_form, "FIRST_TOKEN_WEIGHT", 1.0)
    solve = Healer(model, HEAL_LINES)._fitter.solve
    first, last = (dense_states(model, HEAL_LINES, block) for block in (1, 3))
    inputs = normalised(first, model.config.rms_norm_eps).double()
    with_one = torch.cat([inputs, torch.ones(len(inputs), 1).double()], dim=1)

    bridge = solve(Fit("prefill", "bridge", 1, 3, 2)).tensors
    wanted = torch.linalg.lstsq(with_one, (last - first).double()).solution.float()
    close(bridge["layers.2.bridge.weight"], wanted[:-1].T)
    close(bridge["layers.2.bridge.bias"], wanted[-1])

    block = find_decoder(model).layers[3]
    normed = block.input_layernorm(last)
    keys, values = block.self_attn.k_proj(normed), block.self_attn.v_proj(normed)
    if family == "qwen3":  # heads are normalised, so only the direction of a key counts
        keys = functional.normalize(keys.unflatten(1, (-1, 16)), dim=-1).flatten(1)
    targets = torch.cat([keys, values], dim=1).double()
    design = (with_one if family == "qwen2" else inputs) * 1.0
    wanted = torch.linalg.lstsq(design, targets).solution.float()
    refit = solve(Fit("prefill", "kv", 1, 3, 3)).tensors
    wanted_k, wanted_v = (wanted[:48] / block.input_layernorm.weight[:, None]).T.split(32)
    found_k = refit["layers.3.self_attn.k_proj.weight"]
    if family == "qwen3":
        found_k, wanted_k = (functional.normalize(w.view(2, -1)) for w in (found_k, wanted_k))
    close(found_k, wanted_k)
    close(refit["layers.3.self_attn.v_proj.weight"], wanted_v)
    assert ("layers.3.self_attn.k_proj.bias" in refit) == (family == "qwen2")


def unridged(train, held_back, prior_IO, *, scale):
    moments = train + held_back
    return least_squares.Solved(moments.solved(prior_IO, 0.0), 0.0, 1.0, 0.0)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


def test_kv_read_from_its_own_state_is_the_dense_kv(tiny_model, monkeypatch):
    model = tiny_model("qwen2")
    monkeypatch.setattr(closed_form, "best_map", unridged)
    own = Healer(model, HEAL_LINES)._fitter.solve(Fit("prefill", "kv", 2, 2, 2))
    parameters = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    for name, tensor in own.tensors.items():
        torch.testing.assert_close(tensor, parameters[name], rtol=1e-3, atol=1e-3)


def test_a_pipeline_answers_as_a_plain_forward_pass_with_the_maps(tiny_model, tmp_path):
    model = tiny_model("llama")
    scorer = scorer_of(model, tmp_path)
    candidate = removing([1, 2], [3])
    scorer.heal_with(LINEAR)
    weights = weights_of(scorer, LINEAR, candidate)
    attach(model, weights)
    plan = candidate.plan(signature_of(model)).with_healed(weights.digest)
    prompt = list(range(20))
    (answer,) = LocalPipeline(model, None, plan).generate([prompt], SamplingParams(max_tokens=6))
    line = TokenizedLine(tuple(prompt), (*answer.token_ids,), "")
    logits = teacher_forced(model, plan, line)
    assert logits.argmax(dim=-1).tolist() == list(answer.token_ids)
    bare = teacher_forced(model, candidate.plan(signature_of(model)), line)
    assert (logits - bare).abs().max() > 1e-2


def test_few_lines_are_told_and_no_lines_refused(tiny_model, caplog):
    model = tiny_model("llama")
    Healer(model, draw_lines(16))._fitter.solve(Fit("decode", "bridge", 1, 2, 1))
    assert "the ridge decides much of them; give 392 tokens or more as --heal-data" in caplog.text
    short = [TokenizedLine((n, n), (n,), "a") for n in range(16)]
    with pytest.raises(DataError, match="no token at decode's positions"):
        Healer(model, short)._fitter.solve(Fit("decode", "bridge", 1, 2, 1))


def test_states_that_are_not_finite_are_refused(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    fit = Fit("prefill", "bridge", 1, 2, 1)
    with pytest.raises(SearchError, match=r"healing prefill bridge 1 to 2: .* not finite"):
        Healer(model, HEAL_LINES)._fitter.solve(fit)


def test_a_record_is_json(tiny_model):
    healed = Healer(tiny_model("llama"), HEAL_LINES).heal(Fit("prefill", "kv", 1, 2, 2))
    record = json.loads(json.dumps(healed.record()))
    assert record["kind"] == "kv"
    assert record["relative_mse_after"] <= record["relative_mse_before"]


def test_the_language_model_inside_llava(llava, tmp_path):
    model, healing = llava("llava"), Healing(3, linear=True)
    scorer = scorer_of(model, tmp_path)
    scorer.heal_with(healing)
    candidate = removing([1, 2], [1])
    (score,) = scorer.score_many([candidate])
    (wanted,) = naive_scores(
        model,
        scorer.calibration,
        scorer.objective,
        [candidate],
        lambda _: weights_of(scorer, healing, candidate),
    )
    assert score.value == pytest.approx(wanted.value, rel=1e-4)
