"""The cost of removing every block alone, measured for a report, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.plan import PruningPlan
from rayapp.pruning.preparation import located, prepare_scoring
from rayapp.pruning.search.sensitivity import Sensitivity, measure_sensitivity
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.storage import Storage
from rayapp.workflows.scorer import opened_scorer

_OBJECTIVE = ("objective", "score_by", "kl_top_k")


def measure(
    score: ScoreSettings,
    compute: ComputeSettings,
    plan: str | Path,
    *,
    progress: ProgressCallback = silent,
) -> Sensitivity:
    """Measure similarity and sensitivity of a plan's model; write ``sensitivity.json`` beside it.

    The objective is that of the plan's search, if the plan names it; first token and visual tokens
    are the plan's. Existing results are not measured again. The place of computation is chosen by
    :func:`rayapp.workflows.scorer.opened_scorer`.

    Raises:
        InputError: Plan, model or data cannot be used, or the plan is of another model.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: A score is not finite, or writing failed.
    """
    chosen = PruningPlan.load(plan)
    score = _as_searched(located(score), chosen)
    prepared = prepare_scoring(score, compute)
    signature = prepared.signature
    chosen.check_model(signature)
    with opened_scorer(score, compute, prepared) as scorer:
        return measure_sensitivity(
            Storage(str(chosen.directory)),
            scorer,
            weights=signature.weights_fingerprint,
            num_blocks=signature.num_blocks,
            on_progress=lambda done, total: progress("sensitivity", int(done), total),
        )


def _as_searched(score: ScoreSettings, plan: PruningPlan) -> ScoreSettings:
    """Replace the objective of the settings by the one that the plan's provenance names."""
    searched = plan.provenance.get("settings")
    known: Mapping[str, Any] = searched if isinstance(searched, Mapping) else {}
    objective = {name: known[name] for name in _OBJECTIVE if name in known}
    return ScoreSettings.checked(**{**dict(score.following(plan)), **objective})
