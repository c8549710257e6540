"""Healed tensors stand in for a stage's own, are found beside their plan, and trusted by digest."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rayapp.errors import PlanError
from rayapp.models import checkpoint as checkpoint_module
from rayapp.models.blocks import apply_stage, signature_of
from rayapp.models.fingerprints.fingerprint import canonical_name
from rayapp.models.healed import HealedWeights, attach
from rayapp.models.loading import load_model, read_signature
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.stack import BlockStack
from rayapp.plan import HEALED_FILE, Mode, PruningPlan, StagePlan

TRAINED = ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")


class Recorder:
    """Attends to what was just written."""

    def update(self, keys, values, block):
        return keys, values


@torch.no_grad()
def logits_of(model, plan, stage):
    ids = torch.arange(2, 14)[None]
    stack = BlockStack(model, plan, stage)
    return stack.logits(stack.run(stack.embed(ids), torch.arange(12)[None], Recorder()))


def tensors_of(model, block, scale=1.0):
    """The trained parameters of one block, scaled."""
    return {
        canonical_name(name): (p.detach() * scale).clone()
        for name, p in model.named_parameters()
        if f"layers.{block}." in name and any(part in name for part in TRAINED)
    }


def removed_plan(signature):
    """Both stages remove block 2 and keep 3, its survivor."""
    stage = StagePlan(blocks={2: Mode.REMOVED})
    return PruningPlan(model=signature, prefill=stage, decode=stage)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_healed_to_the_dense_tensors_is_dense_bit_for_bit(tiny_model, family):
    model = tiny_model(family)
    plan = removed_plan(signature_of(model))
    healed = HealedWeights.of({"decode": tensors_of(model, 3)})
    attach(model, healed)
    same = plan.with_healed(healed.digest)
    assert torch.equal(logits_of(model, same, "decode"), logits_of(model, plan, "decode"))
    own = {id(p) for p in model.parameters()}
    staged = apply_stage(model, same, "decode")
    replaced = [name for name, p in staged.named_parameters() if id(p) not in own]
    assert {canonical_name(name) for name in replaced} == set(healed.stages["decode"])


def test_each_stage_and_each_plan_has_its_own(tiny_model):
    model = tiny_model("llama")
    plan = removed_plan(signature_of(model))
    plain = {stage: logits_of(model, plan, stage) for stage in ("prefill", "decode")}
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = []
    for scale in (1.5, 2.0):
        healed = HealedWeights.of({"decode": tensors_of(model, 3, scale)})
        attach(model, healed)
        found.append(plan.with_healed(healed.digest))
    by_plan = [logits_of(model, each, "decode") for each in found]
    by_hand = AutoModelForCausalLM.from_config(model.config).eval()
    for scale, logits in zip((1.5, 2.0), by_plan, strict=True):
        by_hand.load_state_dict(model.state_dict())
        for name, p in by_hand.named_parameters():
            if canonical_name(name) in tensors_of(model, 3):
                p.data *= scale
        bare = removed_plan(signature_of(by_hand))
        assert torch.equal(logits_of(by_hand, bare, "decode"), logits)
        del by_hand.rayapp_fingerprint
    with pytest.raises(PlanError, match="not read from a directory"):
        logits_of(model, plan.with_healed("0" * 24), "decode")
    assert torch.equal(logits_of(model, plan, "decode"), plain["decode"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@torch.no_grad()
def test_single_tokens_see_healed_tensors(tiny_model):
    model = tiny_model("qwen3")
    healed = HealedWeights.of({"decode": tensors_of(model, 3, 1.5)})
    attach(model, healed)
    plan = removed_plan(signature_of(model)).with_healed(healed.digest)
    hidden = torch.randn(1, 1, model.config.hidden_size)
    position = torch.tensor([[7]])

    def run(kind, plan):
        stack = BlockStack(model, plan, "decode")
        runner = SingleTokenStack(stack) if kind == "single" else stack
        return runner.run(hidden, position, Recorder(), {})

    torch.testing.assert_close(run("single", plan), run("stack", plan), atol=1e-6, rtol=0)
    assert not torch.allclose(run("single", plan), run("single", plan.with_healed(None)))


@pytest.fixture
def healed_directory(save_tiny, tmp_path):
    """``(model path, model, plan)``; prefill heals block 3, decode heals block 1."""
    path = save_tiny(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    healed = HealedWeights.of(
        {"prefill": tensors_of(model, 3, 1.5), "decode": tensors_of(model, 1, 0.5)}
    )
    healed.save(tmp_path / "plan")
    removed_plan(read_signature(path)).with_healed(healed.digest).save(tmp_path / "plan")
    return path, model, PruningPlan.load(tmp_path / "plan")


def test_a_stage_reads_its_own_healed_tensors_and_not_what_they_replace(
    healed_directory, monkeypatch
):
    path, model, plan = healed_directory
    names: list[str] = []
    original = checkpoint_module.Checkpoint.read

    def spy(self, wanted):
        for name, tensor in original(self, wanted):
            names.append(name)
            yield name, tensor

    monkeypatch.setattr(checkpoint_module.Checkpoint, "read", spy)
    monkeypatch.setattr(checkpoint_module.Checkpoint, "signature", lambda self: plan.model)
    for stage, block in (("prefill", 3), ("decode", 1)):
        names.clear()
        loaded = load_model(path, plan=plan, stage=stage)
        replaced = {name for name in names if canonical_name(name) in tensors_of(model, block)}
        assert not replaced
        assert any(f"layers.{block}.self_attn.k_proj" in name for name in names)
        assert torch.equal(logits_of(loaded.model, plan, stage), logits_of(model, plan, stage))
        own = BlockStack(model, plan, stage).model
        assert loaded.parameter_bytes == sum(p.nbytes for p in own.parameters())


def test_unified_and_dense_hold_both(healed_directory):
    path, model, plan = healed_directory
    extra = sum(t.nbytes for block in (1, 3) for t in tensors_of(model, block).values())
    bare = load_model(path, plan=plan.with_healed(None), stage="unified")
    for part in ("unified", None):
        loaded = load_model(path, plan=plan, stage=part)
        for stage in ("prefill", "decode"):
            assert torch.equal(logits_of(loaded.model, plan, stage), logits_of(model, plan, stage))
    unified = load_model(path, plan=plan, stage="unified")
    assert unified.parameter_bytes == bare.parameter_bytes + extra
    half = load_model(path, plan=plan, stage="decode", dtype="bfloat16")
    stack = BlockStack(half.model, plan, "decode")
    assert {p.dtype for p in stack.model.parameters() if not p.is_meta} == {torch.bfloat16}


def change(directory, edit):
    tensors = load_file(directory / HEALED_FILE)
    edit(tensors)
    save_file(tensors, directory / HEALED_FILE)


def test_other_tensors_than_the_plans_are_refused(healed_directory):
    path, model, plan = healed_directory
    name = "decode.layers.1.mlp.down_proj.weight"
    change(plan.directory, lambda tensors: tensors[name].add_(1e-3))
    with pytest.raises(PlanError, match=r"weights.safetensors: holds tensors .*, the plan names"):
        load_model(path, plan=plan, stage="decode")
    (plan.directory / HEALED_FILE).write_bytes(b"no tensors")
    with pytest.raises(PlanError, match="cannot be read as safetensors"):
        logits_of(model, plan, "decode")
    (plan.directory / HEALED_FILE).unlink()
    with pytest.raises(PlanError, match="is missing, but the plan beside it is healed"):
        load_model(path, plan=plan, stage="prefill")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.9.mlp.up_proj.weight", (2, 2), "of no block of the model"),
        ("embed_tokens.weight", (300, 48), "of no block of the model"),
        ("layers.1.mlp.up_proj.weight", (2, 2), r"shape \(2, 2\), the model \(80, 48\)"),
        ("layers.2.mlp.up_proj.weight", (80, 48), "a part that decode does not run"),
    ],
)
def test_foreign_tensors_are_refused(tiny_model, name, shape, message):
    model = tiny_model("llama")
    healed = HealedWeights.of({"decode": {name: torch.zeros(shape)}})
    plan = removed_plan(signature_of(model)).with_healed(healed.digest)

    def use():
        attach(model, healed)
        apply_stage(model, plan, "decode")

    with pytest.raises(PlanError, match=message):
        use()


def test_a_saved_copy_of_a_plan_takes_its_tensors_along(healed_directory, tmp_path):
    path, _, plan = healed_directory
    plan.save(tmp_path / "copy")
    copy = PruningPlan.load(tmp_path / "copy")
    assert copy == plan
    assert copy.directory != plan.directory
    assert load_model(path, plan=copy, stage="decode").parameter_bytes > 0


def test_the_language_model_inside_llava(make_llava):
    model = make_llava()
    healed = HealedWeights.of({"decode": {
        canonical_name(n): p.detach() * 2 for n, p in model.named_parameters()
        if "language_model.layers.1.mlp" in n
    }})  # fmt: skip
    assert len(healed.stages["decode"]) == 3
    attach(model, healed)
    plan = PruningPlan(model=signature_of(model), decode=StagePlan(blocks={0: Mode.REMOVED}))
    healthy = plan.with_healed(healed.digest)
    assert not torch.equal(logits_of(model, healthy, "decode"), logits_of(model, plan, "decode"))
