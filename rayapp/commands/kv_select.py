"""One selection of KV, from settings to a plan: in this process, or on a Ray cluster."""

from __future__ import annotations

from rayapp.commands.prune import opened_scorer
from rayapp.commands.report import refresh_report
from rayapp.models.checkpoint import Checkpoint
from rayapp.plan import PruningPlan
from rayapp.pruning.kv_choice.result import KVSelection
from rayapp.pruning.kv_choice.selection import check_out, select_kv
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.preparation import prepare_scoring
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.storage import Storage


def kv_select(
    settings: KVSelectSettings, *, on_progress: ProgressCallback | None = None
) -> KVSelection:
    """Choose which KV of a plan travels; write the plan, ``kv.json`` and its report.

    Computes where :func:`rayapp.commands.prune.prune` would.

    Raises:
        InputError: Model, plan, data or output directory cannot be used, or no choice meets the
            goal.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: A score is not finite, or writing failed; ``kv.json`` keeps what was scored.
    """
    plan = PruningPlan.load(settings.plan)
    scoring = settings.scoring(plan)
    prepared = prepare_scoring(scoring)
    plan.check_model(prepared.signature)
    out = check_out(settings, plan)
    named = plan.model_copy(update={"model": prepared.signature})
    config = Checkpoint(settings.model).config
    with opened_scorer(scoring, prepared) as scorer:
        found = select_kv(settings, named, scorer, config, on_progress=on_progress)
    refresh_report(Storage(out), found.plan)
    return found
