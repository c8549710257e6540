"""Engines that hang: the replica is noticed, ends and is replaced, and no answer is lost."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest

from rayapp.distributed.serve.app import deployment_options
from rayapp.distributed.serve.ingress.ingress import open_service
from rayapp.distributed.serve.replicas.replicas import UnifiedReplica
from rayapp.distributed.serve.settings import UNIFIED, ServiceSettings
from rayapp.engine.local import LocalPipeline
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPT = tuple(range(3, 40))
SAMPLING = SamplingParams(max_tokens=12, temperature=0.7, seed=3, ignore_eos=True)


@contextmanager
def hanging_once(settings: ServiceSettings, stage: str, marker: Path):
    """Serve's handle of a unified pool; the first step of ``stage`` never ends.

    The class has no module of its own that a replica could import: it travels by value.
    """
    from ray import serve

    class Hanging(UnifiedReplica):
        def __init__(self, settings):
            super().__init__(settings)
            engine = (self._prefill if stage == "prefill" else self._decode).engine
            name = {"prefill": "advance", "decode": "step"}[stage]
            compute = getattr(engine, name)

            def hang_or_compute(*arguments):
                if not marker.exists():
                    marker.touch()
                    time.sleep(600)
                return compute(*arguments)

            setattr(engine, name, hang_or_compute)

    options = deployment_options(settings, UNIFIED, settings.unified)
    serve.run(
        serve.deployment(Hanging, name=UNIFIED, **options).bind(settings),
        name="hanging",
        route_prefix=None,
    )
    try:
        yield serve.get_deployment_handle(UNIFIED, "hanging")
    finally:
        serve.delete("hanging")


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_replica_that_hangs_is_replaced_and_its_answers_come(
    standard, tiny_llama, tiny_model, tmp_path, stage
):
    settings = ServiceSettings.parse(
        {
            "model": str(tiny_llama),
            "mode": "unified",
            "dtype": "float32",
            "unified": {"num_cpus": 0.1},
            "deadlines": {"step_s": 2.0},
        }
    )
    names = ("one", "two")

    async def answered(pool):
        service = open_service(settings, {UNIFIED: pool}, None)
        requests = [GenerationRequest(name, PROMPT, SAMPLING) for name in names]
        tokens = {name: [] for name in names}
        async with aclosing(service.generate(requests)) as batches:
            async for batch in batches:
                assert batch.first_index == len(tokens[batch.request_id])
                tokens[batch.request_id].extend(batch.token_ids)
        assert not any(service.counts().values())
        return tokens

    marker = tmp_path / "hung"
    with hanging_once(settings, stage, marker) as pool:
        found = asyncio.run(asyncio.wait_for(answered(pool), 120))
    assert marker.exists()
    (expected,) = LocalPipeline(tiny_model("llama")).generate([PROMPT], SAMPLING)
    assert found == {name: list(expected.token_ids) for name in names}
