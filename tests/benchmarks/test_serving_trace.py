"""The benchmark under load: its arrivals, its client, its numbers; a service in this process."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from rayapp.api.routes import build_app
from rayapp.errors import InputError
from tests.api.in_process import InProcessService

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,8790,1
"""


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def test_a_trace_is_read_scaled_and_brought_to_a_rate(tmp_path):
    from rayapp.simulation.traces import at_rate, in_bursts, read_trace, scaled

    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    arrivals = read_trace(file, 3)
    assert [round(a.at_s, 3) for a in arrivals] == [0.0, 4.315, 4.542]
    cut = scaled(arrivals, 8, 256)
    assert [(a.num_prompt, a.num_answer) for a in cut] == [(46, 5), (49, 13), (254, 2)]
    assert at_rate(cut, 4.0)[-1].at_s == pytest.approx(0.5)
    assert [round(a.at_s, 3) for a in in_bursts(cut, 2)] == [0.0, 0.0, 4.542]
    for text, count in ((TRACE, 4), ("a,b\n1,2\n", 1)):
        file.write_text(text)
        with pytest.raises(InputError, match=r"trace\.csv"):
            read_trace(file, count)


def test_goodput_counts_answers_that_keep_both_limits():
    from serving.client import Reply
    from serving.load import load_numbers

    replies = [
        Reply(11, 0.5, 1.5, 11, None, (0.2, 0.4)),
        Reply(11, 3.0, 4.0, 11),
        Reply(11, 0.5, 5.5, 9),
        Reply(5, None, 0.0, None, "503"),
    ]
    numbers = load_numbers(replies, 10.0, ttft_limit_s=2.0, tpot_limit_s=0.1)
    assert numbers["goodput_per_s"] == pytest.approx(0.1)
    assert numbers["tokens_per_s"] == pytest.approx(3.3)
    assert (numbers["failed"], numbers["other_length"], numbers["errors"]) == (1, 1, ["503"])
    assert numbers["itl_p50_s"] == pytest.approx(0.3)
    assert numbers["tpot_p50_s"] == pytest.approx(0.1)


@contextmanager
def served(app):
    config = uvicorn.Config(app, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_the_client_gets_every_answer_at_its_length(tiny_model, byte_tokenizer):
    from serving.client import Client, Server

    from rayapp.simulation.traces import Arrival

    service = InProcessService(tiny_model("llama"), byte_tokenizer, max_num_seqs=2)
    arrivals = [Arrival(0.05 * n, 5 + n, 3 + n) for n in range(5)]

    async def scenario(server):
        async with Client(server, byte_tokenizer, 0, 30.0) as client:
            opened = await client.open_loop(arrivals)
            closed = await client.closed_loop(arrivals, 2)
            too_long = await client.ask(0, 5000, 5)
            return opened, closed, too_long

    with served(build_app(service)) as url:
        opened, closed, too_long = asyncio.run(scenario(Server("ours", url, "model")))
    service.close()
    assert [reply.num_counted for reply in opened] == [a.num_answer for a in arrivals]
    assert sorted(reply.num_counted for reply in closed) == [a.num_answer for a in arrivals]
    assert all(0 < reply.first_s <= reply.last_s for reply in opened)
    assert too_long.error.startswith("400")


def test_a_server_that_reads_texts_gets_them(byte_tokenizer):
    from serving.client import Client, Server

    bodies = []

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        bodies.append(json.loads((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for data in ('{"choices": [{"text": "a"}]}', '{"error": "broken"}', "[DONE]"):
            event = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def scenario(server):
        async with Client(server, byte_tokenizer, 0, 30.0) as client:
            return await client.ask(0, 8, 3)

    with served(app) as url:
        reply = asyncio.run(scenario(Server("other", url, "model", takes_text=True)))
    assert (reply.error, reply.num_counted) == ("broken", None)
    assert isinstance(bodies[0]["prompt"], str)
    assert json.loads(bodies[0]["generation_config"]) == {"max_new_tokens": 3, "do_sample": False}
    assert "ignore_eos" not in bodies[0]
