"""Install rayapp into the running virtual environment, under the committed constraints.

pip's torch brings CUDA packages on Linux: gigabytes that a machine without an NVIDIA GPU has no use
for. There, uv fetches the CPU build of the same release first. Standard library only: nothing is
installed when this starts. Its words are the extras to install; ``--check-python`` only says
whether rayapp runs on this Python, and Python 3.6 must still be able to read that.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "cluster" / "constraints.txt"
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-c", CONSTRAINTS)
UV = (sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable)
GPU_TIMEOUT_S = 30.0
"""How long nvidia-smi may take: beside a broken driver it can hang for ever (project default)."""
REFUSAL = """\
refused: this machine has no NVIDIA GPU that works, pip would download {count} CUDA packages
({names}), and uv could not fetch the CPU build of {torch} instead; its reason stands above.
Do one of these, then run the same command again:
  - let this machine reach PyTorch's own index, where the CPU builds lie;
  - install a CPU build yourself: {python} -m pip install FILE_OR_URL_OF_THE_WHEEL
    ("CPU" in the selector on pytorch.org);
  - download the CUDA packages all the same: set RAYAPP_ALLOW_CUDA=1."""
UNSUPPORTED = """\
refused: rayapp runs on Python {oldest} to {newest}, and {python} is {version}; \
run `make PYTHON=python{newest}`, or with another of them"""


def main() -> int:
    """Check, then install; returns the exit code."""
    complaint = unsupported_python(sys.version_info[:2])
    if complaint:
        print(complaint, file=sys.stderr)
        return 2
    if sys.argv[1:] == ["--check-python"]:
        return 0
    try:
        planned = [] if os.environ.get("RAYAPP_ALLOW_CUDA") or has_gpu() else cuda_packages()
    except subprocess.CalledProcessError as error:
        return error.returncode  # pip has said why
    if planned and not install_cpu_torch():
        print(refusal(planned), file=sys.stderr)
        return 2
    extras = f"[{','.join(sys.argv[1:])}]" if sys.argv[1:] else ""
    return subprocess.run([*PIP, "--quiet", "-e", f"{ROOT}{extras}"]).returncode


def unsupported_python(running: tuple) -> str:
    """One line that says which Pythons are supported where ``running`` is none of them, or ''."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', declared)
    assert found, "pyproject.toml declares the supported Pythons"
    oldest, newest = (3, int(found[1])), (3, int(found[2]) - 1)
    if oldest <= running <= newest:
        return ""
    versions = {"oldest": oldest, "newest": newest, "version": running}
    told = {name: ".".join(map(str, version)) for name, version in versions.items()}
    return UNSUPPORTED.format(python=sys.executable, **told)


def has_gpu() -> bool:
    """Whether an NVIDIA GPU works here; a driver's tools may lie on a machine that has none."""
    listing = ("nvidia-smi", "-L")
    try:
        listed = subprocess.run(listing, capture_output=True, text=True, timeout=GPU_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def cuda_packages() -> list:
    """CUDA packages that installing torch would bring; pip only plans, nothing is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        subprocess.run([*PIP, "--quiet", "--dry-run", "--report", str(report), "torch"], check=True)
        planned = json.loads(report.read_text())["install"]
    names = [item["metadata"]["name"].lower() for item in planned]
    return sorted(name for name in names if name.startswith(CUDA_PREFIXES))


def install_cpu_torch() -> bool:
    """Whether uv installed torch's CPU build; what torch needs is left to pip's constraints."""
    torch = torch_release()
    print(f"no NVIDIA GPU here: uv fetches the CPU build of {torch}", file=sys.stderr)
    backend = ("--torch-backend=cpu", "--no-deps")
    steps = ([*PIP, "--quiet", "uv"], [*UV, "--quiet", *backend, torch])
    return all(subprocess.run(step).returncode == 0 for step in steps)


def refusal(planned: list) -> str:
    """What a user reads where there is no GPU, and no CPU build either."""
    names = ", ".join(planned[:3]) + (", ..." if planned[3:] else "")
    told = {"count": len(planned), "names": names, "torch": torch_release()}
    return REFUSAL.format(python=sys.executable, **told)


def torch_release() -> str:
    """The requirement on torch that the constraints hold, such as ``torch==2.13.0``."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


if __name__ == "__main__":
    sys.exit(main())
