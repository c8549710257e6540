"""Stages whose products are packed and joined at load answer as the plain ones do."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import IntegrityError
from rayapp.models.blocks import decoder_blocks, signature_of
from rayapp.models.healed import HealedWeights, attach, attached_bytes, healed_parameters
from rayapp.models.loading import load_model
from rayapp.models.passes.single_token import SingleTokenStack
from rayapp.models.products.joined import JoinedPart
from rayapp.models.products.packed import PackedLinear
from rayapp.models.products.stages import pack_stages
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGES, PruningPlan

QWENS = ("qwen2", "qwen3")
PROMPTS = [list(range(3, 40)), [7, 9, 11], list(range(250, 200, -3))]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PLAN = {
    "prefill": {"blocks": {1: "kv_only", 2: "mlp_and_kv", 3: "removed"}},
    "decode": {"blocks": {0: "attention_only", 3: "removed", 4: "mlp_only"}},
}


def plan_of(model, **fields) -> PruningPlan:
    return PruningPlan.model_validate({"model": signature_of(model).model_dump(), **fields})


def answers(model, plan=None):
    pipeline = LocalPipeline(model, None, plan)
    return [list(one.token_ids) for one in pipeline.generate(PROMPTS, GREEDY)]


def packed(model, plan=None):
    signature_of(model)
    pack_stages(model, plan or PruningPlan(), STAGES)
    return model


@pytest.mark.parametrize("fields", [{}, PLAN])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", *(pytest.param(f, marks=pytest.mark.slow) for f in QWENS)]
)
def test_answers_are_those_of_plain_weights(tiny_model, family, fields):
    plain = tiny_model(family)
    plan = plan_of(plain, **fields)
    expected = answers(plain, plan)
    assert answers(packed(tiny_model(family), plan), plan) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_other_types_are_near_those_of_plain_weights(tiny_model, dtype):
    """In bf16 joined products round elsewhere: 0.15 of logits that reach 4."""
    fed = [5, 9, 13, 17]
    plain, other = tiny_model("llama").to(dtype), packed(tiny_model("llama").to(dtype))
    wanted, found = (
        LocalPipeline(model).answer_logits(PROMPTS[0], fed).float() for model in (plain, other)
    )
    assert wanted.abs().max() > 3
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.15)


def test_layers_that_a_stage_runs_apart_are_not_joined(tiny_model):
    model = tiny_model("llama")
    blocks = decoder_blocks(packed(model, plan_of(model, **PLAN)))
    kinds = [[type(getattr(b.self_attn, f"{n}_proj")) for n in "qkv"] for b in blocks]
    assert kinds[0] == kinds[4] == [JoinedPart] * 3
    assert kinds[1] == kinds[2] == [PackedLinear] * 3
    assert all(isinstance(b.mlp.up_proj, JoinedPart) for b in blocks)
    assert all(isinstance(b.mlp.down_proj, PackedLinear) for b in blocks)


def test_gate_and_up_are_packed_apart_where_their_product_takes_the_activation_in(tiny_model):
    blocks = decoder_blocks(packed(tiny_model("llama").to(torch.bfloat16)))
    assert all(
        type(getattr(b.mlp, f"{n}_proj")) is PackedLinear for b in blocks for n in ("gate", "up")
    )
    assert all(isinstance(b.self_attn.q_proj, JoinedPart) for b in blocks)


@pytest.mark.parametrize("names", [["self_attn.k_proj.weight"], ["mlp.gate_proj.weight"]])
def test_healed_tensors_are_packed_in_their_place(tiny_model, names):
    plain, other = tiny_model("qwen2"), tiny_model("qwen2")
    torch.manual_seed(1)
    tensors = {}
    for name in (*names, "mlp.down_proj.weight", "self_attn.k_proj.bias"):
        like = plain.model.layers[2].get_parameter(name)
        tensors[f"layers.2.{name}"] = like.detach() + 0.1 * torch.randn_like(like)
    healed = HealedWeights.of({"prefill": tensors, "decode": tensors})
    plan = PruningPlan(model=signature_of(plain), healed=healed.digest)
    for model in (plain, other):
        attach(model, healed)
    expected, size = answers(plain, plan), attached_bytes(plain)
    assert expected != answers(plain)
    packed(other, plan)
    kept = healed_parameters(other, plan, "decode")
    assert {name for name, t in kept.items() if t.is_mkldnn} == {
        name for name in tensors if name.endswith("weight")
    }
    assert attached_bytes(other) == size
    assert answers(other, plan) == expected


def test_a_loaded_stage_holds_its_weights_once(tiny_model, tmp_path, byte_tokenizer):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    plain, found = load_model(tmp_path), load_model(tmp_path, packed=True)
    table = plain.model.get_input_embeddings().weight
    assert found.parameter_bytes == plain.parameter_bytes + table.nbytes
    gc.collect()
    there = [x for x in gc.get_objects() if isinstance(x, nn.Parameter) and x.ndim == 2]
    of_found = {id(p) for p in found.model.parameters()}
    assert sum(id(x) in of_found for x in there) == 1, "the embeddings alone are plain"
    assert answers(found.model) == answers(plain.model)


def test_one_stage_of_a_plan_is_packed(tiny_model, tmp_path, byte_tokenizer):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    plan = plan_of(model, **PLAN)
    for stage in STAGES:
        whole, part = (
            load_model(tmp_path, plan=plan, stage=stage, packed=flag) for flag in (False, True)
        )
        assert part.parameter_bytes == whole.parameter_bytes
        stack = BlockStack(part.model, plan, stage)
        if stage == "decode":
            assert SingleTokenStack(stack).is_plain


def test_a_fingerprint_comes_first(tiny_model):
    model = tiny_model("llama")
    model.rayapp_fingerprint = None
    with pytest.raises(IntegrityError, match="after the fingerprint"):
        pack_stages(model, PruningPlan(), STAGES)
