"""``rayapp serve``: the nodes that it starts, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys

import httpx
import pytest

from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.testbed import text_model_path
from rayapp.workflows.serve import _nodes


@pytest.mark.parametrize(
    ("num_gpus", "replicas", "expected"),
    [(0, 3, 0), (1, 1, 1), (1, "1:3", 3), (2, 2, 4), (0.5, 1, 1), (0.5, 3, 2), (0.3, 4, 2)],
)
def test_local_nodes_offer_the_gpus_that_their_pool_reserves(num_gpus, replicas, expected):
    pool = {"replicas": replicas, "num_gpus": num_gpus}
    decode = {**pool, "labels": {"role": "decode"}}
    settings = ServiceSettings.parse({"model": "m", "decode": decode})
    head, prefill, found = _nodes(settings)
    assert (head.num_gpus, prefill.num_gpus, found.num_gpus) == (0, 0, expected)
    assert found.labels == {"role": "decode"}
    (_, unified) = _nodes(ServiceSettings.parse({"model": "m", "mode": "unified", "unified": pool}))
    assert unified.num_gpus == expected


@pytest.mark.ray
@pytest.mark.script
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_under_way_end_before_the_service_does(free_port_of_tests, number):
    port = free_port_of_tests
    command = [
        *(sys.executable, "-c", "from rayapp.cli import main; main()"),
        *("serve", "--model", str(text_model_path())),
        *("--mode", "unified", "--port", str(port)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("ready:") for line in lines)
        body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
        url = f"http://127.0.0.1:{port}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(number)
            assert any("1 answers go on" in line for line in lines)
            assert httpx.post(url, json={"prompt": "b"}, timeout=30).status_code == 503
            *_, last = filter(None, events)
        assert last == "data: [DONE]"
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.fixture
def free_port_of_tests():
    from rayapp.distributed.cluster.ports import free_port

    return free_port()
