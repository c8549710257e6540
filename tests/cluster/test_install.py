"""Installing brings CUDA packages only to machines that can use them, and the CPU build to others.

pip, uv and nvidia-smi are stand-ins: what is called, and with which words.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from subprocess import CalledProcessError, CompletedProcess, TimeoutExpired

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "cluster" / "install.py"
CUDA = ["torch", "nvidia-cublas", "triton"]


class Machine:
    """What is on a machine, and the commands that were run on it, by the program's name.

    ``codes`` are exit codes of programs; ``planned`` are the packages that pip would install, and
    ``smi`` is what nvidia-smi prints, or the error of starting it.
    """

    def __init__(self) -> None:
        self.planned: list[str] = ["torch", "sympy"]
        self.codes: dict[str, int] = {}
        self.smi: str | Exception = FileNotFoundError("nvidia-smi")
        self.ran: list[tuple[str, list[str]]] = []

    def run(self, command, check=False, **_) -> CompletedProcess[str]:
        words = [str(word) for word in command]
        name = self._name(words)
        self.ran.append((name, words))
        if name == "nvidia-smi" and isinstance(self.smi, Exception):
            raise self.smi
        if name == "pip plan":
            report = Path(words[words.index("--report") + 1])
            items = [{"metadata": {"name": package}} for package in self.planned]
            report.write_text(json.dumps({"install": items}))
        code = self.codes.get(name, 0)
        if check and code:
            raise CalledProcessError(code, words)
        return CompletedProcess(words, code, stdout=str(self.smi))

    def _name(self, words: list[str]) -> str:
        if words[0] == "nvidia-smi":
            return "nvidia-smi"
        assert words[:2] == [sys.executable, "-m"], "nothing is installed into another environment"
        if words[2] == "uv":
            return "uv"
        return "pip plan" if "--dry-run" in words else f"pip {words[-1].replace(str(ROOT), '.')}"

    def words(self, name: str) -> list[str]:
        (words,) = [words for program, words in self.ran if program == name]
        return words

    @property
    def steps(self) -> list[str]:
        return [name for name, _ in self.ran if name != "nvidia-smi"]


@pytest.fixture
def install(monkeypatch):
    spec = importlib.util.spec_from_file_location("install", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("RAYAPP_ALLOW_CUDA", raising=False)
    monkeypatch.setattr(module.sys, "argv", ["install.py", "test"])
    return module


@pytest.fixture
def machine(install, monkeypatch) -> Machine:
    fresh = Machine()
    monkeypatch.setattr(install.subprocess, "run", fresh.run)
    return fresh


def test_where_pip_brings_the_cpu_build_pip_alone_installs(install, machine):
    assert install.main() == 0
    assert machine.steps == ["pip plan", "pip .[test]"]
    words = machine.words("pip .[test]")
    assert words[words.index("-c") + 1] == str(ROOT / "cluster" / "constraints.txt")
    assert words[-2] == "-e"


def test_without_a_gpu_uv_fetches_the_cpu_build_and_pip_goes_on(install, machine):
    machine.planned = CUDA
    assert install.main() == 0
    assert machine.steps == ["pip plan", "pip uv", "uv", "pip .[test]"]
    words = machine.words("uv")
    assert words[3:5] == ["pip", "install"]
    assert words[words.index("--python") + 1] == sys.executable
    assert {"--torch-backend=cpu", "--no-deps"} < set(words)
    constraints = (ROOT / "cluster" / "constraints.txt").read_text().splitlines()
    assert words[-1] in constraints
    assert words[-1].startswith("torch==")


@pytest.mark.parametrize("program", ["pip uv", "uv"])
def test_where_uv_fails_the_refusal_says_what_to_do(install, machine, capsys, program):
    machine.planned, machine.codes = CUDA, {program: 1}
    assert install.main() == 2
    assert machine.steps[-1] == program
    message = capsys.readouterr().err
    assert "nvidia-cublas, triton" in message
    assert f"the CPU build of {install.torch_release()}" in message
    assert f"{sys.executable} -m pip install" in message
    assert "RAYAPP_ALLOW_CUDA=1" in message


def test_on_a_gpu_the_cuda_build_comes(install, machine):
    machine.planned, machine.smi = CUDA, "GPU 0: NVIDIA H200 (UUID: GPU-1)\n"
    assert install.main() == 0
    assert machine.steps == ["pip .[test]"]


@pytest.mark.parametrize(
    ("smi", "code"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9),
        ("No devices were found\n", 0),
        (TimeoutExpired("nvidia-smi", 30.0), 0),
        (PermissionError("nvidia-smi"), 0),
    ],
)
def test_a_driver_that_does_not_work_is_no_gpu(install, machine, smi, code):
    machine.planned, machine.smi, machine.codes = CUDA, smi, {"nvidia-smi": code}
    assert install.main() == 0
    assert "uv" in machine.steps


def test_the_wish_for_cuda_is_honoured(install, machine, monkeypatch):
    machine.planned = CUDA
    monkeypatch.setenv("RAYAPP_ALLOW_CUDA", "1")
    assert install.main() == 0
    assert machine.steps == ["pip .[test]"]


@pytest.mark.parametrize("program", ["pip plan", "pip .[test]"])
def test_where_pip_fails_its_exit_code_is_ours(install, machine, program):
    machine.codes = {program: 23}
    assert install.main() == 23
    assert machine.steps[-1] == program


@pytest.mark.parametrize("version", [(3, 6), (3, 10), (3, 14)])
def test_another_python_is_refused_in_one_line(install, machine, capsys, monkeypatch, version):
    monkeypatch.setattr(install.sys, "version_info", (*version, 0))
    assert install.main() == 2
    assert machine.ran == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "rayapp runs on Python 3.11 to 3.13" in line
    assert f"is 3.{version[1]};" in line


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_the_declared_pythons_are_taken(install, machine, monkeypatch, version):
    monkeypatch.setattr(install.sys, "version_info", (*version, 0))
    monkeypatch.setattr(install.sys, "argv", ["install.py", "--check-python"])
    assert install.main() == 0
    assert machine.ran == []


def test_an_old_python_can_read_the_check():
    """Python 3.6 evaluates annotations, and cannot subscript built-in types."""
    tree = ast.parse(FILE.read_text(), feature_version=(3, 6))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = [argument for function in functions for argument in function.args.args]
    annotations = [f.returns for f in functions] + [a.annotation for a in arguments]
    assert not [a for a in annotations if not isinstance(a, ast.Name)]
    assert not [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]


def test_the_pythons_of_the_package_are_those_of_the_check(install):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert declared == ">=3.11,<3.14"
    assert [minor for minor in range(6, 20) if not install.unsupported_python((3, minor))] == [
        11,
        12,
        13,
    ]
