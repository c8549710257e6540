"""The cost of removing every block alone, for a report or a map, in this process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

_OBJECTIVE = ("objective", "score_by", "kl_top_k", "first_token_weight")


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
            on_progress=_whole(progress, "sensitivity"),
        )


def map_blocks(
    score: ScoreSettings,
    compute: ComputeSettings,
    calibrations: Sequence[str],
    out: str | Path,
    *,
    progress: ProgressCallback = silent,
) -> Iterator[Sensitivity]:
    """Measure the cost of removing every block alone, on one calibration set after another.

    Every set has a directory in ``out``, and is not measured again if it was.

    Args:
        score: Settings of the score; their calibration file is replaced.
        compute: Settings of the place of computation.
        calibrations: Files of the calibration sets.
        out: Directory of the measurements.
        progress: Called as the work proceeds.

    Raises:
        InputError: Model or data cannot be used.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: A score is not finite, or writing failed.
    """
    score = located(score)
    for number, calibration in enumerate(calibrations):
        on_these = score.model_copy(update={"calibration": calibration})
        prepared = prepare_scoring(on_these, compute)
        signature = prepared.signature
        what = f"blocks, calibration set {number + 1} of {len(calibrations)}"
        with opened_scorer(on_these, compute, prepared) as scorer:
            yield measure_sensitivity(
                Storage(str(Path(out) / f"set-{number}")),
                scorer,
                weights=signature.weights_fingerprint,
                num_blocks=signature.num_blocks,
                on_progress=_whole(progress, what),
            )


def _whole(progress: ProgressCallback, what: str) -> Callable[[float, int], None]:
    """A callback for fractions of evaluations that tells whole ones, under a name."""
    return lambda done, total: progress(what, int(done), total)


def _as_searched(score: ScoreSettings, plan: PruningPlan) -> ScoreSettings:
    """Replace the objective of the settings by the one that the plan's provenance names."""
    searched = plan.provenance.get("settings")
    known: Mapping[str, Any] = searched if isinstance(searched, Mapping) else {}
    objective = {name: known[name] for name in _OBJECTIVE if name in known}
    return ScoreSettings.checked(**{**dict(score.following(plan)), **objective})
