"""A decode replica that prefills short prompts itself: the same tokens, whatever the plan is."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from rayapp.distributed.serve.messages import Address, Admission, PrefillAnswer
from rayapp.distributed.serve.replicas import replicas
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import IntegrityError
from rayapp.models.loading import load_model
from rayapp.scaling.reports import Standing
from tests.distributed.serve.replicas.pair import (
    HERE,
    PROMPT,
    delivered,
    prompt_of,
    reader_of,
    request_of,
    run,
)
from tests.distributed.serve.test_short_way import PLANS, planned, settings_of


@pytest.fixture(autouse=True)
def _outside_of_serve(monkeypatch):
    monkeypatch.setattr(replicas, "this_place", lambda: HERE)
    monkeypatch.setattr(replicas, "StageGauges", lambda: None)
    monkeypatch.setattr(replicas, "log_as_serve", lambda: None)


def replica_of(model, plan=None, **options):
    options = {"dtype": "float32", "max_num_batched_tokens": 16, **options}
    settings = settings_of(model, plan, **options)
    return replicas.DecodeReplica(ServiceSettings.parse(settings))


async def answer_of(replica, request):
    """The tokens of an answer whose prompt the replica prefills, and the items of its stream."""
    prompt, items = prompt_of(request), []
    reader = reader_of(prompt)

    async def generate():
        call = replica.generate(prompt, replica._versions, {}, Address(reader=reader))
        async with aclosing(call) as stream:
            items.extend([item async for item in stream])

    rest = await delivered(replica, generate(), reader)
    batches = [*items[0].firsts, *rest]
    return [token for batch in batches for token in batch.token_ids], items


@pytest.mark.parametrize("content", PLANS.values(), ids=PLANS)
def test_tokens_equal_those_of_the_local_pipeline(save_tiny, tmp_path, content):
    model = save_tiny(tmp_path, "llama")
    loaded = load_model(model, dtype="float32")
    plan, directory = planned(loaded, content, tmp_path / "plan")
    sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=3)
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, plan)
    (expected,) = pipeline.generate([PROMPT], sampling)

    async def scenario():
        replica = replica_of(model, directory)
        assert replica._stage.loaded.parameter_bytes == _decode_bytes(model, plan)
        request = request_of("it", 12, temperature=0.7, seed=3)
        tokens, items = await answer_of(replica, request)
        assert [type(item) for item in items] == [PrefillAnswer, Admission]
        assert tokens == list(expected.token_ids)
        standing = Standing.read(replica.record_routing_stats())
        assert standing is not None
        assert standing.most_prompt == 30
        assert not any((await replica.check_integrity()).values())

    run(scenario())


def _decode_bytes(model, plan):
    """Bytes of a replica that only decodes: prefill adds none."""
    loaded = load_model(model, plan=plan, stage="decode", dtype="float32", packed=True)
    return loaded.parameter_bytes


def test_a_replica_that_may_not_prefill_says_so_and_refuses(save_tiny, tmp_path):
    async def scenario():
        replica = replica_of(save_tiny(tmp_path, "llama"), short_prompt_tokens=0)
        assert Standing.read(replica.record_routing_stats()).most_prompt == 0
        with pytest.raises(IntegrityError, match="without prefill"):
            await answer_of(replica, request_of("it"))

    run(scenario())
