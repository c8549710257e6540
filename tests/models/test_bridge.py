"""A bridge stands for a span in prefill, in decode and in the engine's own decode step."""

from __future__ import annotations

import pytest
import torch

from rayapp.errors import PlanError
from rayapp.kv.cache import CaptureCache
from rayapp.models.blocks import apply_stage, signature_of
from rayapp.models.healed import Bridge, HealedWeights, attach, attached_bytes, normalised
from rayapp.models.loading import load_model
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.stack import BlockStack
from rayapp.plan import Mode, PruningPlan, StagePlan


def bridged(model, stages=("prefill", "decode"), block=2):
    """A plan without blocks 1 and 2, and with a bridge at the second of them."""
    torch.manual_seed(3)
    tensors = {
        f"layers.{block}.bridge.weight": torch.randn(48, 48) / 10,
        f"layers.{block}.bridge.bias": torch.randn(48),
    }
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in stages]
    weights = HealedWeights.of(dict(zip(stages, copies, strict=True)))
    gone = StagePlan(blocks={1: Mode.REMOVED, 2: Mode.REMOVED})
    plan = PruningPlan(model=signature_of(model), prefill=gone, decode=gone)
    return plan.with_healed(weights.digest), weights, tensors


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@torch.no_grad()
def test_it_adds_a_map_of_the_normalised_state(tiny_model, stage):
    model = tiny_model("llama")
    plan, weights, tensors = bridged(model)
    attach(model, weights)
    stack = BlockStack(model, plan, stage)
    hidden = torch.randn(2, 7, 48)
    found = stack.run(hidden, torch.arange(7)[None], CaptureCache.for_stack(stack), start=1, stop=3)
    unit = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    weight, bias = tensors.values()
    torch.testing.assert_close(found, hidden + unit @ weight.T + bias)
    assert attached_bytes(model) == 2 * 4 * (48 * 48 + 48)  # counted once for each stage


@torch.inference_mode()
def test_a_decode_step_has_it(tiny_model):
    model = tiny_model("qwen2")
    plan, weights, _ = bridged(model)
    attach(model, weights)
    stack = BlockStack(model, plan, "decode")
    hidden, at = torch.randn(3, 1, 48), torch.zeros(3, 1, dtype=torch.int64)
    plain = SingleTokenStack(stack)
    assert plain.is_plain
    found = plain.run(hidden, at, CaptureCache.for_stack(stack), {})
    torch.testing.assert_close(found, stack.run(hidden, at, CaptureCache.for_stack(stack), {}))
    bare = BlockStack(model, plan.with_healed(None), "decode")
    assert (found - bare.run(hidden, at, CaptureCache.for_stack(bare), {})).abs().max() > 0.1


def test_a_stage_reads_it_from_the_plan_and_counts_its_bytes(tmp_path, save_tiny):
    path = save_tiny(tmp_path, "llama")
    plan, weights, _ = bridged(load_model(path).model)
    weights.save(tmp_path / "plan")
    plan.save(tmp_path / "plan")
    plan = PruningPlan.load(tmp_path / "plan")
    bare = plan.with_healed(None)
    sizes = [load_model(path, plan=p, stage="decode").parameter_bytes for p in (plan, bare)]
    assert sizes[0] - sizes[1] == 4 * (48 * 48 + 48)


def test_a_block_that_runs_has_no_bridge(tiny_model):
    model = tiny_model("llama")
    plan, weights, _ = bridged(model, block=3)
    attach(model, weights)
    with pytest.raises(PlanError, match="block 3 has a bridge, which stands for blocks that do"):
        apply_stage(model, plan, "decode")


def test_other_shapes_and_names_are_refused(tiny_model):
    model = tiny_model("llama")
    for name, shape in (
        ("layers.9.bridge.weight", (48, 48)),
        ("layers.1.bridge.gain", (48,)),
        ("layers.1.bridge.weight", (48, 47)),
    ):
        weights = HealedWeights.of({"decode": {name: torch.zeros(shape)}})
        with pytest.raises(PlanError, match="healed tensor"):
            attach(model, weights)


def test_huge_states_are_normalised_in_float32():
    hidden = torch.full((1, 1, 8), 3e4, dtype=torch.float16)
    assert torch.equal(normalised(hidden, 1e-6), torch.ones(1, 1, 8))
    bridge = Bridge(8, 1e-6).to_empty(device="cpu").half()
    torch.nn.init.zeros_(bridge.weight)
    torch.nn.init.ones_(bridge.bias)
    assert torch.equal(bridge(hidden), hidden + 1)
