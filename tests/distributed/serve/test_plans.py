"""A plan with every mode and healed survivors in it: what is served equals the reference.

Served apart or together; every replica finds its tensors by the plan.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from rayapp.distributed.serve.deploy import resolved
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import PlanError
from rayapp.models.blocks import signature_of
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

PROMPTS = [[32 + (7 * n + 3 * i + i * i) % 90 for i in range(2 + (n * 29) % 90)] for n in range(12)]
OPTIONS = {
    **{"max_tokens": 14, "temperature": 0.8, "seed": 11, "logprobs": 0},
    **{"min_tokens": 3, "frequency_penalty": 0.4, "logit_bias": {40: 1.5}},
}


@pytest.mark.slow
@pytest.mark.ray
def test_answers_apart_equal_the_local_ones(planned, planned_model):
    """Decode makes the first token."""
    before = planned.client.get("/v1/transfers").json()["totals"]
    expected = check_answers(planned, planned_model)
    check_ledger(planned, before, expected)
    check_parameters(planned, planned_model)


@pytest.mark.slow
@pytest.mark.ray
def test_answers_together_equal_the_local_ones(unified, unified_model):
    check_answers(unified, unified_model)
    assert unified.client.get("/v1/transfers").json()["totals"]["num_transfers"] == 0
    (replica,) = unified.client.get("/health").json()["pools"]["unified"]
    everything = sum(p.nbytes for p in unified_model.loaded.model.parameters())
    assert replica["parameter_bytes"] < everything


@pytest.mark.ray
@pytest.mark.slow
def test_answers_apart_equal_the_local_ones_with_first_tokens_of_prefill(deploy, unified_model):
    with deploy(**unified_model.served) as service:
        check_answers(service, unified_model)


def check_answers(service, served):
    """Texts and log probabilities; healing and pruning both change the answers."""
    sampling = SamplingParams(**OPTIONS)
    expected, bare, dense = (
        served.pipeline(plan).generate(PROMPTS, sampling)
        for plan in (served.plan, served.bare, PruningPlan())
    )
    texts = [[completion.text for completion in found] for found in (expected, bare, dense)]
    assert texts[0] != texts[1] != texts[2]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda p: service.complete(p, **OPTIONS), PROMPTS))
    for answer, completion in zip(answers, expected, strict=True):
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        assert choice["text"] == completion.text
        logprobs = [entry.logprob for entry in completion.logprobs]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
    service.check_idle()
    return expected


def check_ledger(service, before, expected):
    totals = service.client.get("/v1/transfers").json()["totals"]
    sent = [completion.transfer for completion in expected if completion.transfer]
    for name in ("bytes_full", "saved_by_blocks_bytes", "saved_by_tokens_bytes",
                 "saved_by_encoding_bytes"):  # fmt: skip
        grown = totals[name] - before[name]
        assert grown == sum(getattr(record, name) for record in sent), name
    assert totals["saved_by_blocks_bytes"] > before["saved_by_blocks_bytes"]


def check_parameters(service, served):
    """A decode replica holds its parts, embeddings, norm and head, and nothing else."""
    pools = service.client.get("/health").json()["pools"]
    dense = served.loaded.model
    block = dense.get_decoder().layers[0]

    def size_of(module):
        return sum(p.nbytes for p in module.parameters())

    attention, mlp, norm = map(size_of, (block.self_attn, block.mlp, block.input_layernorm))
    outside = sum(map(size_of, (dense.lm_head, dense.get_decoder().norm)))
    outside += size_of(dense.get_input_embeddings())
    # decode: 0 attention only, 1, 2 and 5 full, 3 MLP only, 4 removed
    expected = outside + 3 * (attention + mlp + 2 * norm) + attention + mlp + 2 * norm
    (prefill,), (decode,) = pools["prefill"], pools["decode"]
    assert decode["parameter_bytes"] == expected
    assert prefill["parameter_bytes"] < size_of(dense)
    own = BlockStack(dense, served.plan, "decode").model.get_decoder().layers
    assert size_of(own) == expected - outside


def test_a_healed_plan_without_its_tensors_is_refused_at_once(save_tiny, tiny_model, tmp_path):
    model = save_tiny(tmp_path, "llama")
    plan = PruningPlan.model_validate({"model": signature_of(tiny_model("llama")).model_dump()})
    plan.with_healed("0" * 24).save(tmp_path)
    settings = ServiceSettings.parse({"model": str(model), "plan": str(tmp_path)})
    with pytest.raises(PlanError, match=r"weights.safetensors: is missing"):
        resolved(settings)
