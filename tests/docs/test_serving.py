"""The front page's service answers the front page's question as the page says."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest

from rayapp.distributed.cluster.ports import free_port
from tests.docs.guides import ROOT, marked

FRONT = ROOT / "README.md"
START_S, STOP_S = 240, 90
SHOWN_PORT = "8000"

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@contextmanager
def running(command: str, clone):
    """A command that runs until it is interrupted; entered once it says that it is ready."""
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=clone.home, env=clone.environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        lines, until_s = [], time.monotonic() + START_S
        while not lines or not lines[-1].startswith("ready:"):
            assert process.poll() is None, "".join(lines)
            assert time.monotonic() < until_s, "".join(lines)
            lines.append(process.stdout.readline())
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=STOP_S)


@pytest.mark.timeout(600)
def test_the_service_of_the_front_page_answers(clone):
    """Nothing is changed but the port, which another service of this machine may have."""
    (serve,), (ask,) = marked(FRONT, "serves"), marked(FRONT, "asks")
    port = str(free_port())
    clone.bash("mkdir -p out/mine && cp out/demo/plan.json out/mine/")
    assert ask.text.count(SHOWN_PORT) == 1
    (promised,) = re.findall(r"print\(.*\)  # (.+)", ask.text)
    (clone.home / "ask.py").write_text(ask.text.replace(SHOWN_PORT, port))
    with running(f"{serve.text.strip()} --port {port}", clone):
        assert clone.bash("python ask.py").strip() == promised
        ledger = clone.bash(f"rayapp transfers --url http://127.0.0.1:{port}")
    assert "reduction factor" in ledger
