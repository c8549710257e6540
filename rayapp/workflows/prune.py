"""The search for a plan, from settings to files: in this process, or on a Ray cluster."""

from __future__ import annotations

import json

from rayapp.plan import PLAN_FILE, PruningPlan
from rayapp.pruning.preparation import located, prepare
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.search.front import FRONT_FILE, FrontResult, search_front
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.pruning.search.sensitivity import keep_influence
from rayapp.pruning.search.sizes import with_sizes
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage
from rayapp.workflows.report import refresh_report
from rayapp.workflows.scorer import opened_scorer


def prune(
    score: ScoreSettings,
    compute: ComputeSettings,
    search: SearchSettings,
    *,
    on_progress: ProgressCallback | None = None,
) -> SearchResult:
    """Search for a plan; write it, its journal, trials and report to ``search.out``.

    For the report, the similarity of blocks is measured even if the search does not use it; that
    costs about one evaluation, after the plan is written. The place of computation is chosen by
    :func:`rayapp.workflows.scorer.opened_scorer`.

    Raises:
        InputError: Model, data, sizes or output directory cannot be used.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: The search cannot go on; the journal keeps what was scored.
    """
    score = located(score)
    prepared = prepare(score, compute, search)
    signature = prepared.signature
    with opened_scorer(score, compute, prepared, search) as scorer:
        result = run_search(
            score,
            with_sizes(search, scorer.compute),
            scorer,
            signature,
            environment=compute.environment,
            on_progress=on_progress,
        )
        storage = Storage(search.out)
        keep_influence(storage, scorer, signature.weights_fingerprint)
    refresh_report(storage, result.plan)
    return result


def prune_front(
    score: ScoreSettings,
    compute: ComputeSettings,
    search: SearchSettings,
    *,
    on_progress: ProgressCallback | None = None,
) -> FrontResult:
    """Search every size up to those given; write a front of plans to ``search.out``.

    Raises:
        InputError: Model, data, sizes or output directory cannot be used.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: The search cannot go on; the journal keeps what was scored.
    """
    score = located(score)
    prepared = prepare(score, compute, search)
    signature = prepared.signature
    with opened_scorer(score, compute, prepared, search) as scorer:
        result = search_front(
            score,
            search,
            scorer,
            signature,
            environment=compute.environment,
            on_progress=on_progress,
        )
        storage = Storage(search.out)
        keep_influence(storage, scorer, signature.weights_fingerprint)
    for row in json.loads(storage.read_text(FRONT_FILE)):
        plan = PruningPlan.parse(storage.read_text(row["plan"]), source=row["plan"])
        home = row["plan"].removesuffix(f"/{PLAN_FILE}")
        refresh_report(Storage(f"{search.out}/{home}"), plan, storage)
    return result
