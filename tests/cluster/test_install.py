"""`make` never downloads CUDA packages to a machine that cannot use them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "cluster" / "install.py"


@pytest.fixture
def install(monkeypatch):
    spec = importlib.util.spec_from_file_location("install", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands = []

    def fake_pip(command, **_):
        module.commands.append([str(part) for part in command])
        if "--report" in command:
            items = [{"metadata": {"name": name}} for name in module.planned]
            report = Path(command[command.index("--report") + 1])
            report.write_text(json.dumps({"install": items}))
        return module.subprocess.CompletedProcess(command, 0)

    module.planned = []
    monkeypatch.delenv("RAYAPP_ALLOW_CUDA", raising=False)
    monkeypatch.setattr(module.subprocess, "run", fake_pip)
    monkeypatch.setattr(module.sys, "argv", ["install.py", "test"])
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return module


def installed(install):
    return [c for c in install.commands if "-e" in c]


def test_cpu_build_is_installed_under_the_constraints(install):
    install.planned = ["torch", "sympy"]
    assert install.main() == 0
    (command,) = installed(install)
    assert command[-1].endswith("[test]")
    assert command[command.index("-c") + 1].endswith("constraints.txt")


def test_cuda_packages_are_refused_with_a_remedy(install, capsys):
    install.planned = ["torch", "nvidia-cublas", "triton"]
    assert install.main() == 2
    assert installed(install) == []
    message = capsys.readouterr().err
    assert "nvidia-cublas, triton" in message
    assert "CPU build" in message
    assert "RAYAPP_ALLOW_CUDA=1" in message


def test_a_gpu_or_an_explicit_wish_allows_them(install, monkeypatch):
    install.planned = ["nvidia-cublas"]
    monkeypatch.setenv("RAYAPP_ALLOW_CUDA", "1")
    assert install.main() == 0
    monkeypatch.delenv("RAYAPP_ALLOW_CUDA")
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert install.main() == 0
    assert len(installed(install)) == 2
