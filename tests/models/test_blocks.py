"""Every mode of every stage against a reference of the block written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
)

from rayapp.errors import ModelError, PlanError
from rayapp.kv.cache import CaptureCache
from rayapp.models.blocks import apply_stage, decoder_blocks, signature_of
from rayapp.models.stack import BlockStack
from rayapp.plan import STAGE_MODES, STAGES, Mode, PruningPlan

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
BLOCK = 2
TOKENS = 20


class Recorder:
    """A cache that keeps what each block wrote and lets it attend to just that."""

    def __init__(self):
        self.written = {}

    def update(self, keys, values, block):
        self.written[block] = (keys, values)
        return keys, values


def rms_norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x_HTD, positions, theta):
    half = x_HTD.shape[-1] // 2
    angle = positions[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x_HTD[..., :half], x_HTD[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def reference_block(model, number, hidden_TE, mode, window):
    """One pre-norm block with loops over heads: ``(hidden, keys or None, values or None)``."""
    config, w = model.config, dict(model.model.layers[number].named_parameters())
    eps, dim = config.rms_norm_eps, config.head_dim
    positions = torch.arange(len(hidden_TE)).float()
    keys = values = None

    def project(name, x, heads):
        out = x @ w[f"self_attn.{name}.weight"].T
        if f"self_attn.{name}.bias" in w:
            out = out + w[f"self_attn.{name}.bias"]
        return out.view(len(x), heads, dim).transpose(0, 1)

    def normed(name, x):
        return (
            rms_norm(x, w[f"self_attn.{name}.weight"], eps)
            if f"self_attn.{name}.weight" in w
            else x
        )

    theta = config.rope_parameters["rope_theta"]
    if mode.writes_kv:
        x = rms_norm(hidden_TE, w["input_layernorm.weight"], eps)
        keys = rotate(
            normed("k_norm", project("k_proj", x, config.num_key_value_heads)), positions, theta
        )
        values = project("v_proj", x, config.num_key_value_heads)
    if mode.attends:
        queries = rotate(
            normed("q_norm", project("q_proj", x, config.num_attention_heads)), positions, theta
        )
        distance = positions[:, None] - positions[None, :]
        visible = (distance >= 0) & (distance < (window or 10**9))
        heads = []
        for head in range(config.num_attention_heads):
            group = head * config.num_key_value_heads // config.num_attention_heads
            scores = queries[head] @ keys[group].T / dim**0.5
            heads.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values[group])
        hidden_TE = hidden_TE + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
    if mode.has_mlp:
        x = rms_norm(hidden_TE, w["post_attention_layernorm.weight"], eps)
        gate, up = x @ w["mlp.gate_proj.weight"].T, x @ w["mlp.up_proj.weight"].T
        hidden_TE = hidden_TE + (nn.functional.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return hidden_TE, keys, values


def coupled_plan(model, stage, mode):
    """A plan with ``mode`` in one stage of BLOCK; the other stage follows the coupling rule."""
    modes = {"prefill": {BLOCK: mode if stage == "prefill" else Mode.FULL}, "decode": {}}
    modes["decode"] = {BLOCK: mode} if stage == "decode" else {}
    if stage == "prefill" and not mode.writes_kv:
        modes["decode"] = {BLOCK: Mode.REMOVED}
    return PruningPlan.model_validate(
        {"model": signature_of(model), **{s: {"blocks": modes[s]} for s in STAGES}}
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("stage", "mode"), [(s, m) for s in STAGES for m in sorted(STAGE_MODES[s])]
)
@torch.no_grad()
def test_mode_equals_handwritten_block(tiny_model, family, stage, mode):
    model = tiny_model(family)
    plan = coupled_plan(model, stage, mode)
    stack = BlockStack(model, plan, stage)
    hidden = torch.randn(1, TOKENS, model.config.hidden_size)
    cache = Recorder()
    got = stack.run(hidden, torch.arange(TOKENS)[None], cache, start=BLOCK, stop=BLOCK + 1)
    want, keys, values = reference_block(model, BLOCK, hidden[0], mode, stack.windows[BLOCK])
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
    assert (BLOCK in cache.written) == mode.writes_kv == stack.writes_kv[BLOCK]
    assert stack.attends[BLOCK] == mode.attends
    if mode.writes_kv:
        torch.testing.assert_close(cache.written[BLOCK][0][0], keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cache.written[BLOCK][1][0], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kv_modes_write_bit_equal_kv(tiny_model, family):
    model = tiny_model(family)
    hidden = torch.randn(1, TOKENS, model.config.hidden_size)
    written = {}
    for mode in (Mode.FULL, Mode.KV_ONLY, Mode.MLP_AND_KV, Mode.ATTENTION_ONLY):
        stack, cache = (
            BlockStack(model, coupled_plan(model, "prefill", mode), "prefill"),
            Recorder(),
        )
        stack.run(hidden, torch.arange(TOKENS)[None], cache, start=BLOCK, stop=BLOCK + 1)
        written[mode] = cache.written[BLOCK]
    for mode, (keys, values) in written.items():
        assert torch.equal(keys, written[Mode.FULL][0]), mode
        assert torch.equal(values, written[Mode.FULL][1]), mode


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_empty_plan_is_the_dense_model(tiny_model, family):
    model = tiny_model(family)
    ids = torch.randint(0, 256, (2, 30))
    stack = BlockStack(model, PruningPlan(), "prefill")
    logits = stack.logits(stack.run(stack.embed(ids), torch.arange(30)[None], Recorder()))
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_stages_share_parameters_and_leave_the_model_alone(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(0, 256, (1, 12))
    before = model(ids).logits
    plan = coupled_plan(model, "prefill", Mode.REMOVED)
    staged = {stage: apply_stage(model, plan, stage) for stage in STAGES}
    ours = {p.data_ptr() for p in model.parameters()}
    for stage in staged.values():
        assert {p.data_ptr() for p in stage.parameters()} < ours
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    shorter = staged["prefill"](ids, position_ids=torch.arange(12)[None], use_cache=False).logits
    assert not torch.allclose(shorter, before)


@torch.no_grad()
def test_stack_works_where_the_model_uses_another_attention(tiny_model):
    model = tiny_model("qwen3")
    ids = torch.randint(0, 256, (1, 16))
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    stack = BlockStack(model, PruningPlan(), "prefill")
    logits = stack.logits(stack.run(stack.embed(ids), torch.arange(16)[None], Recorder()))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_language_model_inside_llava(make_llava):
    model = make_llava()
    assert len(decoder_blocks(model)) == 3
    plan = PruningPlan.model_validate(
        {"model": signature_of(model), "prefill": {"blocks": {1: "kv_only", 2: "mlp_and_kv"}}}
    )
    ids = torch.randint(0, 256, (1, 10))
    dense = BlockStack(model, PruningPlan(), "prefill")
    logits = dense.logits(dense.run(dense.embed(ids), torch.arange(10)[None], Recorder()))
    torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=1e-6, rtol=0)
    cache, stack = Recorder(), BlockStack(model, plan, "prefill")
    hidden = stack.run(stack.embed(ids), torch.arange(10)[None], cache, stop=1)
    assert torch.equal(stack.run(hidden, torch.arange(10)[None], cache, start=1, stop=2), hidden)
    assert set(cache.written) == {0, 1}


def test_other_architectures_are_refused_by_name():
    config = GPTNeoXConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    with pytest.raises(ModelError, match="gpt_neox"):
        apply_stage(AutoModelForCausalLM.from_config(config), PruningPlan(), "prefill")


def test_rope_that_depends_on_the_longest_prompt_is_refused(tiny_model):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="dynamic"):
        BlockStack(tiny_model("llama", rope_parameters=rope), PruningPlan(), "prefill")


def test_a_plan_of_another_model_is_refused(tiny_model):
    plan = coupled_plan(tiny_model("llama"), "decode", Mode.REMOVED)
    with pytest.raises(PlanError, match="weights_fingerprint"):
        apply_stage(tiny_model("llama", hidden_size=64), plan, "decode")
    with pytest.raises(PlanError, match="model_type"):
        apply_stage(tiny_model("qwen2"), plan, "decode")


@torch.no_grad()
def test_fingerprint_notices_a_changed_weight_and_ignores_the_type(tiny_model):
    model, other, half = tiny_model("llama"), tiny_model("llama"), tiny_model("llama").bfloat16()
    assert signature_of(model) == signature_of(half)
    other.model.layers[3].mlp.up_proj.weight[5, 7] += 0.5
    assert signature_of(model) != signature_of(other)


def test_a_hook_on_a_stage_does_not_run_in_the_dense_model(tiny_model):
    model = tiny_model("llama")
    staged = apply_stage(model, PruningPlan(), "prefill")
    calls = []
    hook = decoder_blocks(staged)[0].register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert not calls
    staged(input_ids=torch.tensor([[1, 2, 3]]), position_ids=torch.arange(3)[None])
    assert calls == [1]
    hook.remove()


def test_windows_go_by_position_where_a_pruned_prompt_has_gaps(tiny_model):
    """Fewer tokens than the window, spread over more positions than it."""
    model = tiny_model("mistral", sliding_window=6)
    stack = BlockStack(model, PruningPlan(), "prefill")
    kept = torch.tensor([[0, 1, 5, 9, 10]])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    cache = CaptureCache.for_stack(stack)
    found = stack.run(stack.embed(ids), kept, cache)
    distance = kept[:, :, None] - kept[:, None]
    mask = ((distance >= 0) & (distance < 6))[:, None]
    masks = dict.fromkeys(range(stack.num_blocks), mask)
    wanted = stack.run(stack.embed(ids), kept, CaptureCache.for_stack(stack), masks)
    assert torch.equal(found, wanted)
    causal = dict.fromkeys(range(stack.num_blocks), distance[:, None] >= 0)
    unlimited = stack.run(stack.embed(ids), kept, CaptureCache.for_stack(stack), causal)
    assert not torch.allclose(found, unlimited, atol=1e-3)
