"""Searches in this process, from settings to files; no ray is started."""

from __future__ import annotations

import json
import logging

import pytest

from rayapp.errors import InputError
from rayapp.workflows.prune import prune, prune_front
from tests.told import Told


@pytest.fixture
def settings(tmp_path, save_tiny) -> Told:
    file = tmp_path / "calibration.jsonl"
    lines = [{"prompt": "ab" * (3 + n), "completion": "cd"} for n in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Told.of(
        model=str(save_tiny(tmp_path, "llama")),
        calibration=str(file),
        out=str(tmp_path / "out"),
        evaluations=10,
    )


def test_a_speed_up_instead_of_sizes(settings, caplog):
    caplog.set_level(logging.INFO)
    wanted = settings.but(target_speedup=1.1)
    result = prune(*wanted)
    sizes = [result.plan.removed("prefill"), result.plan.removed("decode")]
    assert sum(sizes) >= 1
    assert "a speed-up of 1.1 at" in caplog.text
    costs = settings.out / "costs.json"
    first = costs.read_text()
    again = prune(*wanted.but(resume=True))
    assert costs.read_text() == first
    assert again.plan.fingerprint == result.plan.fingerprint
    with pytest.raises(InputError, match="cannot be reached"):
        prune(*settings.but(target_speedup=1e6, out=f"{settings.out}2"))


def test_a_front(settings):
    result = prune_front(*settings.but(prefill_remove=1.0, decode_remove=1.0, pareto=True))
    out = settings.out
    rows = json.loads((out / "front.json").read_text())
    assert len(rows) == len(result.points)
    assert all((out / row["plan"]).exists() for row in rows)
    assert result.summary(str(out)).startswith(f"{out}/front.json: {len(rows)} plans of 3 sizes")
