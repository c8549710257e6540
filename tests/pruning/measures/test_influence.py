from __future__ import annotations

import pytest
import torch

from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.influence import measure_influence
from rayapp.pruning.settings.objective import Objective


def by_hooks(model, calibration: Calibration) -> dict[str, list[float]]:
    """Block influence from hidden states of one forward over prompt and continuation."""
    sums = {"prefill": [0.0] * 5, "decode": [0.0] * 5}
    counts = {"prefill": 0, "decode": 0}
    for line in calibration.lines:
        states = []
        hooks = [
            block.register_forward_hook(
                lambda _m, inputs, output, states=states: states.append((inputs[0][0], output[0]))
            )
            for block in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([[*line.prompt, *line.continuation[:-1]]]))
        for hook in hooks:
            hook.remove()
        split = len(line.prompt)
        for stage, where in (("prefill", slice(0, split)), ("decode", slice(split, None))):
            counts[stage] += states[0][0][where].shape[0]
            for block, (before, after) in enumerate(states):
                cosine = torch.cosine_similarity(
                    before[where].double(), after[where].double(), dim=-1
                )
                sums[stage][block] += float((1 - cosine).sum())
    return {stage: [s / counts[stage] for s in sums[stage]] for stage in sums}


def test_influence_against_hooks_on_the_models_own_forward(tiny_model, calibration):
    model = tiny_model("qwen2")
    found = measure_influence(Evaluator(model, calibration, Objective()))
    wanted = by_hooks(model, calibration)
    assert found.prefill_blocks == pytest.approx(wanted["prefill"], rel=1e-4)
    assert found.decode_blocks == pytest.approx(wanted["decode"], rel=1e-4)
    assert len(found.prefill_parts) == len(found.decode_parts) == 10
    assert found.units("decode", 5) == found.decode_blocks
    assert found.units("prefill", 10) == found.prefill_parts


def test_a_part_that_does_nothing_has_no_influence(tiny_model, calibration):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[3].self_attn.o_proj.weight.zero_()
    found = measure_influence(Evaluator(model, calibration, Objective()))
    for parts in (found.prefill_parts, found.decode_parts):
        assert [i for i, value in enumerate(parts) if value < 1e-9] == [5, 6]
