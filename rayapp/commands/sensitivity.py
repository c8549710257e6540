"""What each block costs alone, measured for a report: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayapp.commands.prune import opened_scorer
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.plan import PruningPlan
from rayapp.pruning.preparation import prepare_scoring
from rayapp.pruning.search.sensitivity import Sensitivity, measure_sensitivity
from rayapp.pruning.settings import PruneSettings
from rayapp.pruning.storage import Storage

_OBJECTIVE = ("objective", "score_by", "kl_top_k")


def measure(
    plan: str | Path,
    *,
    model: str,
    calibration: str,
    workers: int = 0,
    address: str | None = None,
    progress: ProgressCallback = silent,
) -> Sensitivity:
    """Measure similarity and sensitivity of a plan's model; write ``sensitivity.json`` beside it.

    Scores are of the objective that the plan was searched with. Computes where
    :func:`rayapp.commands.prune.prune` would; what is there already is not measured again.

    Raises:
        InputError: Plan, model or data cannot be used, or the plan is of another model.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: A score is not finite, or writing failed.
    """
    found = PruningPlan.load(plan)
    searched = found.provenance.get("settings")
    objective: Mapping[str, Any] = searched if isinstance(searched, Mapping) else {}
    settings = PruneSettings.checked(
        model=model,
        calibration=calibration,
        out=str(found.directory),
        first_token=found.first_token,
        visual_tokens=found.visual_tokens,
        workers=workers,
        address=address,
        **{name: objective[name] for name in _OBJECTIVE if name in objective},
    )
    prepared = prepare_scoring(settings)
    signature = prepared.signature
    found.check_model(signature)
    with opened_scorer(settings, prepared) as scorer:
        return measure_sensitivity(
            Storage(settings.out),
            scorer,
            weights=signature.weights_fingerprint,
            num_blocks=signature.num_blocks,
            on_progress=lambda done, total: progress("sensitivity", int(done), total),
        )
