"""A node that is lost under load, with the KV that its replicas had made: all answers come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import ray

from rayapp.distributed.cluster.local import NodeSpec, local_cluster
from rayapp.distributed.cluster.ports import free_port
from rayapp.distributed.serve.deploy import running_service
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD, PREFILL, DECODE = (NodeSpec(labels={"role": role}) for role in ("head", "prefill", "decode"))
NUM_REQUESTS, LOST_AFTER, NUM_AT_ONCE = 60, 12, 6
# KV of long prompts travels through the stores of the nodes, and in parts.
PROMPTS = [tuple((7 * i + i * i + kind) % 250 for i in range(300 + kind)) for kind in range(6)]
MAX_TOKENS = 24


@pytest.mark.timeout(900)
def test_a_lost_prefill_node_changes_no_answer(save_tiny, tiny_model, byte_tokenizer, tmp_path):
    local = LocalPipeline(tiny_model("llama"), byte_tokenizer)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    expected = [completion.text for completion in local.generate(list(PROMPTS), sampling)]
    settings = ServiceSettings.parse(
        {
            "model": str(save_tiny(tmp_path, "llama")),
            "dtype": "float32",
            "port": free_port(),
            "max_num_batched_tokens": 64,
            "kv_part_ms": 0,
            "ingress": {"labels": {"role": "head"}},
            "prefill": {"replicas": 2, "labels": {"role": "prefill"}},
            "decode": {"replicas": 1, "labels": {"role": "decode"}},
        }
    )
    with (
        local_cluster([HEAD, PREFILL, PREFILL, DECODE]) as cluster,
        running_service(settings, address=cluster.address) as service,
        httpx.Client(base_url=service.url, timeout=240) as client,
    ):
        enough = threading.Semaphore(0)
        # The replicas may share a node; whichever is lost, one of them was there.
        lost = client.get("/health").json()["pools"]["prefill"][0]["node"]

        def ask(number: int) -> str:
            body = {"prompt": list(PROMPTS[number % len(PROMPTS)]), "max_tokens": MAX_TOKENS}
            limits = {"temperature": 0, "ignore_eos": True}
            reply = client.post("/v1/completions", json={**body, **limits})
            assert reply.status_code == 200, reply.text
            enough.release()
            return str(reply.json()["choices"][0]["text"])

        def strike() -> None:
            for _ in range(LOST_AFTER):
                enough.acquire()
            cluster.kill_node(lost)

        with ThreadPoolExecutor(NUM_AT_ONCE + 1) as pool:
            struck = pool.submit(strike)
            found = list(pool.map(ask, range(NUM_REQUESTS)))
            struck.result()
        assert found == [expected[number % len(PROMPTS)] for number in range(NUM_REQUESTS)]
        nodes = {replica["node"] for replica in client.get("/health").json()["pools"]["prefill"]}
        assert lost not in nodes
        ray.shutdown()
