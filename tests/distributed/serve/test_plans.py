"""A plan with every mode in it: served apart or together, the answers are the reference's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoModelForCausalLM

from rayapp.distributed.serve.deploy import resolved
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import PlanError
from rayapp.models.blocks import signature_of
from rayapp.models.healed import HealedWeights
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

pytestmark = pytest.mark.ray

PROMPTS = [[32 + (7 * n + 3 * i + i * i) % 90 for i in range(2 + (n * 29) % 90)] for n in range(12)]
MODES = {
    "prefill": {"0": "attention_only", "1": "mlp_and_kv", "2": "kv_only", "3": "mlp_only",
                "4": "removed", "5": "full"},
    "decode": {"0": "attention_only", "2": "full", "3": "mlp_only", "4": "removed"},
}  # fmt: skip
TRANSFER = {"0": {"first": 2, "last": 0.5}, "1": {"first": 1, "last": 6, "encoding": "int8"}}


@pytest.fixture(scope="module")
def model(save_tiny, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("plans"), "llama", num_hidden_layers=6)


@pytest.fixture(scope="module")
def dense(model):
    return AutoModelForCausalLM.from_pretrained(model).eval()


def plan_of(dense, first_token):
    return PruningPlan.model_validate(
        {
            **{stage: {"blocks": blocks} for stage, blocks in MODES.items()},
            "kv_transfer": TRANSFER,
            "first_token": first_token,
            "model": signature_of(dense).model_dump(),
        }
    )


@pytest.mark.parametrize(
    ("mode", "first_token"),
    [
        ("disaggregated", "prefill"),
        pytest.param("disaggregated", "decode", marks=pytest.mark.slow),
        ("unified", "prefill"),
    ],
)
def test_served_answers_equal_the_local_ones(
    mode, first_token, deploy, model, dense, byte_tokenizer, tmp_path
):
    plan = plan_of(dense, first_token)
    plan.save(tmp_path)
    pipeline = LocalPipeline(dense, byte_tokenizer, plan)
    sampling = SamplingParams(max_tokens=14, temperature=0.8, seed=11, logprobs=0)
    expected = pipeline.generate(PROMPTS, sampling)
    with deploy(model=str(model), plan=str(tmp_path), mode=mode, max_num_seqs=4) as service:
        with ThreadPoolExecutor(12) as pool:
            options = {"max_tokens": 14, "temperature": 0.8, "seed": 11, "logprobs": 0}
            answers = list(pool.map(lambda p: service.complete(p, **options), PROMPTS))
        for answer, completion in zip(answers, expected, strict=True):
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert choice["text"] == completion.text
            logprobs = [entry.logprob for entry in completion.logprobs]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
        check_ledger(service, mode, expected)
        check_parameters(service, mode, dense)
        service.check_idle()


def check_ledger(service, mode, expected):
    totals = service.client.get("/v1/transfers").json()["totals"]
    if mode == "unified":
        assert totals["num_transfers"] == 0
        return
    sent = [completion.transfer for completion in expected if completion.transfer]
    for name in ("bytes_full", "saved_by_blocks_bytes", "saved_by_tokens_bytes",
                 "saved_by_encoding_bytes"):  # fmt: skip
        assert totals[name] == sum(getattr(record, name) for record in sent), name
    assert totals["saved_by_blocks_bytes"] > 0


def check_parameters(service, mode, dense):
    """A decode replica holds its parts, embeddings, norm and head, and nothing else."""
    pools = service.client.get("/health").json()["pools"]
    everything = sum(p.nbytes for p in dense.parameters())
    if mode == "unified":
        assert pools["unified"][0]["parameter_bytes"] < everything
        return
    block = dense.model.layers[0]
    part = {name: sum(p.nbytes for p in module.parameters()) for name, module in (
        ("attention", block.self_attn), ("mlp", block.mlp), ("norm", block.input_layernorm),
    )}  # fmt: skip
    outside = everything - sum(p.nbytes for p in dense.model.layers.parameters())
    full = part["attention"] + part["mlp"] + 2 * part["norm"]
    # decode: 0 attention only, 1, 2 and 5 full, 3 MLP only, 4 removed
    expected = outside + 3 * full + part["attention"] + part["mlp"] + 2 * part["norm"]
    assert pools["decode"][0]["parameter_bytes"] == expected
    assert pools["prefill"][0]["parameter_bytes"] < everything


@pytest.mark.parametrize("mode", ["disaggregated", pytest.param("unified", marks=pytest.mark.slow)])
def test_served_healed_answers_equal_the_local_ones(
    mode, deploy, model, dense, byte_tokenizer, tmp_path
):
    """Both stages heal a survivor of their own; every replica finds its tensors by the plan."""
    tensors = {
        stage: {
            f"layers.{block}.{name}": p.detach() * scale
            for name, p in dense.model.layers[block].named_parameters()
            if "mlp" in name or "o_proj" in name
        }
        for stage, block, scale in (("prefill", 3, 1.2), ("decode", 1, 0.8))
    }
    healed = HealedWeights.of(tensors)
    healed.save(tmp_path)
    bare = PruningPlan.model_validate(
        {
            "prefill": {"blocks": {"2": "kv_only"}},
            "decode": {"blocks": {"0": "removed"}},
            "model": signature_of(dense).model_dump(),
        }
    )
    bare.with_healed(healed.digest).save(tmp_path)
    plan = PruningPlan.load(tmp_path)
    sampling = SamplingParams(max_tokens=10, temperature=0.0, logprobs=0)
    expected = LocalPipeline(dense, byte_tokenizer, plan).generate(PROMPTS, sampling)
    plain = LocalPipeline(dense, byte_tokenizer, bare).generate(PROMPTS, sampling)
    assert [c.token_ids for c in expected] != [c.token_ids for c in plain]
    with deploy(model=str(model), plan=str(tmp_path), mode=mode, max_num_seqs=4) as service:
        for prompt, completion in zip(PROMPTS, expected, strict=True):
            answer = service.complete(prompt, max_tokens=10, logprobs=0)
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            assert choice["text"] == completion.text
            logprobs = [entry.logprob for entry in completion.logprobs]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
        pools = service.client.get("/health").json()["pools"]
        own = BlockStack(dense, plan, "decode").model.parameters()
        if mode == "disaggregated":
            assert pools["decode"][0]["parameter_bytes"] == sum(p.nbytes for p in own)
        service.check_idle()


def test_a_healed_plan_without_its_tensors_is_refused_at_once(model, dense, tmp_path):
    plan = PruningPlan.model_validate({"model": signature_of(dense).model_dump()})
    plan.with_healed("0" * 24).save(tmp_path)
    settings = ServiceSettings.parse({"model": str(model), "plan": str(tmp_path)})
    with pytest.raises(PlanError, match=r"weights.safetensors: is missing"):
        resolved(settings)
