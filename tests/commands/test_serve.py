"""``rayapp serve`` and ``rayapp demo`` as processes: what they print, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from rayapp.distributed.cluster.ports import free_port
from rayapp.models.loading import load_model

pytestmark = pytest.mark.ray
START_S, STOP_S = 400, 90


def left_behind(mark: str) -> set[int]:
    """The processes that inherited an environment variable, whatever else runs on this machine."""
    left = set()
    for process in psutil.process_iter(["pid"]):
        with contextlib.suppress(psutil.Error):
            if mark in process.environ():
                left.add(process.pid)
    return left


class Served:
    """A ``rayapp serve`` process: its ready line was seen, its output is at hand."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        command = [
            sys.executable,
            "-m",
            "rayapp.cli",
            "serve",
            "--port",
            str(self.port),
            *arguments,
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.lines: list[str] = []
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        until_s = time.monotonic() + START_S
        while time.monotonic() < until_s:
            line = self.process.stdout.readline()
            if not line:
                break
            self.lines.append(line)
            if line.startswith("ready:"):
                return
        raise AssertionError("no ready line:\n" + "".join(self.lines))

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        rest, _ = self.process.communicate(timeout=STOP_S)
        self.lines.append(rest)
        return self.process.returncode


@pytest.fixture
def served():
    running = []

    def start(*arguments: str) -> Served:
        running.append(Served(*arguments))
        return running[-1]

    yield start
    for each in running:
        if each.process.poll() is None:
            each.interrupt()


def generated(loaded, prompt, max_tokens):
    ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = loaded.model.generate(ids, max_new_tokens=max_tokens, do_sample=False)
    return loaded.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.script
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_from_ready_line_to_interrupt_in_throughput_mode(testbed_path, served, monkeypatch):
    """The shipped model, whose answers to several clients at once are those of ``generate``.

    In this mode Serve's deployments would call each other by gRPC, which takes no references, and
    handles have no event loop of their own. The guide's test serves in the usual mode.
    """
    monkeypatch.setenv("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    service = served(
        "--model", str(testbed_path), "--served-model-name", "shipped",
        "--max-model-len", "96", "--max-num-seqs", "2", "--dtype", "float32",
    )  # fmt: skip
    service.wait_ready()
    assert service.lines[-1] == f"ready: shipped at {service.url}/v1\n"
    loaded = load_model(testbed_path, dtype="float32")
    config = loaded.model.config
    # 2 slots x 96 entries x (key + value) x KV heads x dimensions x 4 bytes x blocks
    entry_bytes = 2 * config.num_key_value_heads * config.head_dim * 4
    kv_bytes = 2 * 96 * entry_bytes * config.num_hidden_layers
    assert f"{kv_bytes:,} bytes" in "".join(service.lines)

    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["shipped"]
    prompts = [f"xd=uyg copy:{'dpgafqrkel'[:n]}\ncopy?\n" for n in range(1, 9)]

    def ask(prompt):
        asked = {"model": "shipped", "prompt": prompt, "max_tokens": 10, "temperature": 0}
        return client.completions.create(**asked).choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [generated(loaded, prompt, 10) for prompt in prompts]
    ledger = httpx.get(f"{service.url}/v1/transfers").json()
    assert ledger["totals"]["num_transfers"] == len(prompts)
    assert ledger["recent"][0]["source_node"] != ledger["recent"][0]["destination_node"]

    processes = service.descendants()
    assert len(processes) > 5
    assert service.interrupt() == 0, "".join(service.lines)
    assert "Traceback" not in "".join(service.lines)
    assert all_gone(processes)


@pytest.mark.script
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo(tmp_path):
    """The whole loop, over what a demo that was stopped early had left."""
    mark, out = f"RAYAPP_TEST_{os.getpid()}", tmp_path / "demo"
    command = [sys.executable, "-m", "rayapp.cli", "demo", "--out", str(out)]
    environment = {**os.environ, mark: "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as stopped:
        while not list(out.rglob("journal.jsonl")):
            assert stopped.poll() is None
            time.sleep(0.1)
        stopped.send_signal(signal.SIGINT)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1000, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reduction factor" in done.stdout
    assert "answer NLL" in done.stdout
    for name in ("plan.json", "trials.parquet", "ledger.json", "report.html", "evaluation.json"):
        assert (out / name).is_file(), name
    plan = json.loads((out / "plan.json").read_text())
    assert plan["prefill"]["blocks"] != plan["decode"]["blocks"]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    until_s = time.monotonic() + 60
    while left_behind(mark):
        assert time.monotonic() < until_s
        time.sleep(0.2)
