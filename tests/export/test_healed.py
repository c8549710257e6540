"""Healed tensors of a plan stand in the checkpoint of their stage."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rayapp.errors import PlanError
from rayapp.export import export_stage
from rayapp.models.healed import HealedWeights
from rayapp.plan import PruningPlan


def healed_plan(plan, directory, **stages):
    """The plan with these healed tensors, as it is read from its directory."""
    healed = HealedWeights.of(stages)
    healed.save(directory)
    plan.with_healed(healed.digest, directory).save(directory)
    return PruningPlan.load(directory)


def healed_tensors(path, block=2):
    tensors = load_file(path / "model.safetensors")
    names = (f"layers.{block}.mlp.up_proj.weight", f"layers.{block}.input_layernorm.weight")
    torch.manual_seed(3)
    return {n: t + 0.1 * torch.randn_like(t) for n in names for t in [tensors[f"model.{n}"]]}


def test_healed_tensors_replace_those_of_their_stage(
    save_tiny, tmp_path, plan_for, stage_logits, plain_logits
):
    path = save_tiny(tmp_path, "llama")
    bare = plan_for(path, prefill=[1], decode=[1])
    plan = healed_plan(bare, tmp_path / "plan", decode=healed_tensors(path))
    for stage in ("prefill", "decode"):
        record = export_stage(path, tmp_path / "plan", stage, tmp_path / stage)
        assert record.healed == plan.healed
        assert torch.equal(plain_logits(tmp_path / stage), stage_logits(path, plan, stage))
    dense = stage_logits(path, bare, "decode")
    assert torch.equal(plain_logits(tmp_path / "prefill"), dense)
    assert not torch.equal(plain_logits(tmp_path / "decode"), dense)
    with pytest.raises(PlanError, match=r"2 tensors are healed apart.*layers\.2.*--shared"):
        export_stage(path, plan, "unified", tmp_path / "unified")


@pytest.mark.slow
def test_unified_where_both_stages_are_healed_alike(
    save_tiny, tmp_path, plan_for, stage_logits, plain_logits
):
    path = save_tiny(tmp_path, "qwen3", tie_word_embeddings=True)
    alike = healed_tensors(path)
    plan = plan_for(path, prefill=[0], decode=[0])
    copies = {name: tensor.clone() for name, tensor in alike.items()}
    plan = healed_plan(plan, tmp_path / "plan", prefill=alike, decode=copies)
    export_stage(path, plan, "unified", tmp_path / "out")
    for stage in ("prefill", "decode"):
        assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, stage))


def test_healed_tensors_take_the_checkpoints_type(testbed_path, tmp_path, plan_for):
    tensors = {n: t.float() for n, t in healed_tensors(testbed_path, 7).items()}
    plan = healed_plan(plan_for(testbed_path, decode=[5]), tmp_path / "plan", decode=tensors)
    export_stage(testbed_path, plan, "decode", tmp_path / "out")
    for name, tensor in tensors.items():
        moved = f"model.{name.replace('.7.', '.6.')}"
        found = load_file(tmp_path / "out" / "model.safetensors")[moved]
        assert torch.equal(found, tensor.bfloat16())


def test_healed_tensors_that_do_not_fit_are_refused(save_tiny, tmp_path, plan_for):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, decode=[1])
    for number, tensors in enumerate(
        (
            healed_tensors(path, 1),  # of a removed block
            {n: t[:-1] for n, t in healed_tensors(path).items()},
        )
    ):
        unfit = healed_plan(plan, tmp_path / f"plan{number}", decode=tensors)
        with pytest.raises(PlanError, match=r"healed tensor 'layers.* fits none"):
            export_stage(path, unfit, "decode", tmp_path / "out")
    (tmp_path / "plan0" / "weights.safetensors").unlink()
    with pytest.raises(PlanError, match="is missing"):
        export_stage(path, tmp_path / "plan0", "decode", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bridges_are_refused_by_name(save_tiny, tmp_path, plan_for):
    path = save_tiny(tmp_path, "llama")
    bridge = {"layers.1.bridge.weight": torch.zeros(48, 48), "layers.1.bridge.bias": torch.ones(48)}
    plan = healed_plan(plan_for(path, prefill=[1], decode=[1]), tmp_path / "plan", decode=bridge)
    for stage in ("decode", "unified"):
        with pytest.raises(PlanError, match=r"a bridge in block 1: .*cannot express|healed apart"):
            export_stage(path, plan, stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_stage(path, plan, "prefill", tmp_path / "out")
