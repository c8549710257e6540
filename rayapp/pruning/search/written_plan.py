"""The plan that a search, a front or a healing leaves in its directory, and what it has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayapp.data.seen import Seen
from rayapp.plan import HEALED_FILE, PLAN_FILE, PruningPlan
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage


def seen_by(score: ScoreSettings, search: SearchSettings) -> dict[str, Any]:
    """The files that a search chooses and trains on, as the plan's provenance names them."""
    return Seen.of([score.calibration, search.heal_data]).model_dump(mode="json")


def write_plan(
    storage: Storage, plan: PruningPlan, candidate: Candidate, scorer: Scorer
) -> PruningPlan:
    """Write a candidate's plan, after the healed tensors that it was scored with, if any."""
    units = scorer.units(candidate)
    if units and scorer.healed is not None:
        weights = scorer.healed.weights(units)
        storage.write_bytes(HEALED_FILE, weights.dumps())
        records = [dict(scorer.healed.record(unit)) for unit in units]
        directory = None if "://" in storage.location else Path(storage.location).absolute()
        plan = plan.model_copy(update={"provenance": {**plan.provenance, "healed": records}})
        plan = plan.with_healed(weights.digest, directory)
    storage.write_bytes(PLAN_FILE, plan.dumps().encode())
    return plan
