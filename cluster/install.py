"""Install rayapp into the running virtual environment, under the committed constraints.

On a machine without an NVIDIA GPU it refuses to download CUDA packages (gigabytes that nothing here
could use) and says what to do instead. Standard library only: nothing is installed when it starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "cluster" / "constraints.txt"
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-c", CONSTRAINTS)
REFUSAL = """\
refused: on this machine (no NVIDIA GPU) pip would download CUDA packages for torch:
  {names}
install the CPU build of the torch release in cluster/constraints.txt first ("CPU" in the selector
on pytorch.org), then run make again; or, to download them all the same, set RAYAPP_ALLOW_CUDA=1."""


def cuda_packages() -> list[str]:
    """CUDA packages that installing torch would bring; pip only plans, nothing is installed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        subprocess.run([*PIP, "--quiet", "--dry-run", "--report", str(report), "torch"], check=True)
        planned = json.loads(report.read_text())["install"]
    names = [item["metadata"]["name"].lower() for item in planned]
    return sorted(name for name in names if name.startswith(CUDA_PREFIXES))


def main() -> int:
    """Check, then install; returns the exit code."""
    extras = f"[{','.join(sys.argv[1:])}]" if sys.argv[1:] else ""
    has_gpu = shutil.which("nvidia-smi") is not None
    if not has_gpu and not os.environ.get("RAYAPP_ALLOW_CUDA"):
        found = cuda_packages()
        if found:
            print(REFUSAL.format(names=", ".join(found)), file=sys.stderr)
            return 2
    return subprocess.run([*PIP, "--quiet", "-e", f"{ROOT}{extras}"]).returncode


if __name__ == "__main__":
    sys.exit(main())
