"""Searches leave a report of all that they found; a damaged neighbour costs them nothing."""

from __future__ import annotations

import json

import pytest

from rayapp.errors import PlanError
from rayapp.evaluation.report.findings import gather
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.workflows.kv_select import kv_select
from rayapp.workflows.prune import prune, prune_front
from rayapp.workflows.sensitivity import measure
from tests.told import Told


@pytest.fixture
def settings(tmp_path, save_tiny) -> Told:
    file = tmp_path / "calibration.jsonl"
    lines = [{"prompt": "ab" * (6 + n), "completion": "cd"} for n in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Told.of(
        model=str(save_tiny(tmp_path, "llama")),
        calibration=str(file),
        out=str(tmp_path / "out"),
        prefill_remove=1.0,
        decode_remove=1.0,
        method="random",
        evaluations=6,
    )


def test_a_search_then_a_selection_then_sensitivity(settings):
    out = settings.out
    prune(*settings)
    found = gather(out)
    assert found.influence is not None  # a random search has no use for it
    assert found.influence_lines == 4
    assert len(found.trials) == 7  # the dense model first
    page = (out / "report.html").read_text()
    assert "Similarity per block" in page
    assert "Sensitivity per block" not in page
    kv_select(
        settings.score,
        settings.compute,
        KVSelectSettings(plan=str(out), target_reduction=2.0, first=1, last=(1, 0.5)),
    )
    assert "How the transfer was chosen" in (out / "report.html").read_text()
    measured = measure(settings.score, settings.compute, out)
    assert gather(out).singles.stages["decode"]["0"] == measured.singles.decode[0]


def test_every_plan_of_a_front_has_its_report(settings):
    out = settings.out
    prune_front(*settings.but(pareto=True, evaluations=12))
    rows = json.loads((out / "front.json").read_text())
    assert len(rows) > 1
    for row in rows:
        page = (out / row["plan"]).with_name("report.html").read_text()
        assert "The front" in page
        assert "Similarity per block" in page


def test_a_damaged_neighbour_fails_no_search(settings, caplog):
    out = settings.out
    out.mkdir()
    (out / "evaluation.json").write_text("{")
    assert prune(*settings).plan.removed("decode") == 1
    assert (out / "plan.json").is_file()
    assert not (out / "report.html").exists()
    assert "report.html is not written: evaluation.json" in caplog.text


def test_sensitivity_of_another_model_is_refused(settings, save_tiny, tmp_path):
    prune(*settings)
    other = save_tiny(tmp_path / "other", "qwen2")
    with pytest.raises(PlanError, match="another model"):
        measure(settings.but(model=str(other)).score, settings.compute, settings.out)
