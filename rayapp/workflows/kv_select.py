"""The selection of KV, from settings to a plan: in this process, or on a Ray cluster."""

from __future__ import annotations

from rayapp.models.checkpoint import Checkpoint
from rayapp.plan import PruningPlan
from rayapp.pruning.kv_choice.result import KVSelection
from rayapp.pruning.kv_choice.selection import check_out, select_kv
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.preparation import located, prepare_scoring
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.storage import Storage
from rayapp.workflows.report import refresh_report
from rayapp.workflows.scorer import opened_scorer


def kv_select(
    score: ScoreSettings,
    compute: ComputeSettings,
    settings: KVSelectSettings,
    *,
    on_progress: ProgressCallback | None = None,
) -> KVSelection:
    """Choose which KV of a plan travels; write the plan, ``kv.json`` and its report.

    First token and visual tokens are the plan's, whatever ``score`` says of them. The place of
    computation is chosen by :func:`rayapp.workflows.scorer.opened_scorer`.

    Raises:
        InputError: Model, plan, data or output directory cannot be used, or no choice meets the
            goal.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: A score is not finite, or writing failed; ``kv.json`` keeps what was scored.
    """
    settings.check(score)
    plan = PruningPlan.load(settings.plan)
    score = located(score).following(plan)
    prepared = prepare_scoring(score, compute)
    plan.check_model(prepared.signature)
    out = check_out(settings, plan)
    named = plan.model_copy(update={"model": prepared.signature})
    config = Checkpoint(score.model).config
    with opened_scorer(score, compute, prepared) as scorer:
        selection = select_kv(score, settings, named, scorer, config, on_progress=on_progress)
    refresh_report(Storage(out), selection.plan)
    return selection
