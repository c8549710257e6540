"""``rayapp plan renew`` brings a plan of the first fingerprint, and its files, up to date."""

from __future__ import annotations

from pathlib import Path

from rayapp.evaluation.report.page import REPORT_FILE
from rayapp.plan import PLAN_FILE, PruningPlan
from rayapp.pruning.renewal import Renewal, renew_plan
from rayapp.pruning.search.front import FRONT_FILE
from rayapp.pruning.storage import Storage
from rayapp.workflows.report import refresh_report


def renew(plan: str | Path, *, model: str | Path, out: str | Path | None = None) -> Renewal:
    """Renew a plan that names its model by the first fingerprint, with all files of its directory.

    Reports of renewed plans are drawn again.

    Raises:
        PlanError: There is no plan, or it was made for another model; no file was written.
        ModelError: The model directory cannot be used.
        InputError: ``out`` is taken, or a file cannot be written.
    """
    renewal = renew_plan(plan, model, out)
    for name in renewal.plans:
        home = (renewal.directory / name).parent
        if (home / REPORT_FILE).is_file():
            above = (home.parent, home.parent.parent)
            roots = [
                Storage(directory) for directory in above if (directory / FRONT_FILE).is_file()
            ]
            refresh_report(Storage(home), PruningPlan.load(home / PLAN_FILE), *roots[:1])
    return renewal
