"""A server for real clients, and their commands; each lives in an environment of its own.

``make peers`` installs them beside this checkout. A test whose client is missing is skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from rayapp.api.routes import build_app
from tests.api.conftest import serving
from tests.api.in_process import InProcessService, Patience

PEERS = Path(__file__).parents[2] / ".peers"


@pytest.fixture(scope="session")
def address(tiny_model, byte_tokenizer):
    """The base URL of a service of a tiny model, with both engines in this process."""
    limits = {"max_num_seqs": 8, "max_model_len": 512}
    model = tiny_model("llama")
    service = InProcessService(model, byte_tokenizer, patience=Patience(256), **limits)
    with serving(build_app(service)) as url:
        yield url
    service.check_idle()
    service.close()


@pytest.fixture(scope="session")
def peer():
    """``peer(name, program, *arguments)``: run a program of a client; its output."""

    def run(name, program, *arguments, cwd, within_s=240, variables=None):
        file = PEERS / name / "bin" / program
        if not file.exists():
            pytest.skip(f"{name} is not installed: run `make peers`")
        ours = ("PYTHONPATH", "HF_HUB_OFFLINE")  # aiperf takes offline paths for names of the Hub
        inherited = {k: v for k, v in os.environ.items() if k not in ours}
        done = subprocess.run(
            [file, *map(str, arguments)], cwd=cwd, text=True, timeout=within_s,
            env={**inherited, "OPENAI_API_KEY": "any", **(variables or {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    return run
