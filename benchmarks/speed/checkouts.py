"""Measurements in the package of another checkout, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def scored_by(checkout: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """One run of :mod:`speed.candidates` over the package of a checkout."""
    script = Path(__file__).with_name("candidates.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(wanted)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(wanted["threads"]),
            "PYTHONPATH": str(checkout.resolve()),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
