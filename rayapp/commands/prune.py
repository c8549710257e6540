"""One search, from settings to a plan: in this process, or on a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayapp.commands.report import refresh_report
from rayapp.distributed.cluster.connection import connected
from rayapp.distributed.evaluator_pool import EvaluatorPool
from rayapp.plan import PLAN_FILE, PruningPlan
from rayapp.pruning.healing.trained_pairs import HealedPairs
from rayapp.pruning.preparation import (
    Prepared,
    heal_context,
    open_evaluator,
    open_healer,
    prepare,
)
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.scorer import Compute, LocalCompute, Scorer
from rayapp.pruning.search.front import FRONT_FILE, FrontResult, search_front
from rayapp.pruning.search.run import SearchResult, run_search
from rayapp.pruning.search.sensitivity import keep_influence
from rayapp.pruning.search.sizes import with_sizes
from rayapp.pruning.settings import PruneSettings
from rayapp.pruning.storage import Storage


def prune(settings: PruneSettings, *, on_progress: ProgressCallback | None = None) -> SearchResult:
    """Search for a plan; write it, its journal, trials and report to ``settings.out``.

    For the report, the similarity of blocks is measured even where the search has no use for it:
    the cost of about one evaluation, after the plan is written.

    Scores in this process where neither ``workers`` nor ``address`` is given; otherwise on
    evaluators of a Ray cluster: the one that this process is connected to, the one at ``address``,
    the one of the job that this runs in, or a local one that is started for the search and ended
    after it.

    Raises:
        InputError: Model, data, sizes or output directory cannot be used.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: The search cannot go on; the journal keeps what was scored.
    """
    prepared = prepare(settings)
    with opened_scorer(settings, prepared) as scorer:
        settings = with_sizes(settings, scorer.compute)
        result = run_search(settings, scorer, prepared.signature, on_progress=on_progress)
        storage = Storage(settings.out)
        keep_influence(storage, scorer, prepared.signature.weights_fingerprint)
    refresh_report(storage, result.plan)
    return result


def prune_front(
    settings: PruneSettings, *, on_progress: ProgressCallback | None = None
) -> FrontResult:
    """Search every size up to those given; write a front of plans to ``settings.out``.

    Raises:
        InputError: As :func:`prune`.
        ClusterError: As there.
        SearchError: As there.
    """
    prepared = prepare(settings)
    with opened_scorer(settings, prepared) as scorer:
        result = search_front(settings, scorer, prepared.signature, on_progress=on_progress)
        storage = Storage(settings.out)
        keep_influence(storage, scorer, prepared.signature.weights_fingerprint)
    for row in json.loads(storage.read_text(FRONT_FILE)):
        plan = PruningPlan.parse(storage.read_text(row["plan"]), source=row["plan"])
        home = row["plan"].removesuffix(f"/{PLAN_FILE}")
        refresh_report(Storage(f"{settings.out}/{home}"), plan, storage)
    return result


@contextmanager
def opened_scorer(settings: PruneSettings, prepared: Prepared) -> Iterator[Scorer]:
    """A scorer on whatever computes: this process, or evaluators of a Ray cluster."""
    if not settings.workers and settings.address is None:
        evaluator = open_evaluator(settings, prepared.calibration)
        healer = open_healer(settings, evaluator, prepared.heal_data)
        yield _scorer(settings, prepared, LocalCompute(evaluator, healer))
        return
    # Evaluators run elsewhere: a path relative to this process means nothing to them.
    settings = settings.model_copy(update={"model": str(Path(settings.model).absolute())})
    data = (prepared.calibration, prepared.heal_data)
    without = "leave out --workers and --address to search in this process"
    there = connected(settings.address, otherwise=without, log_to_driver=True)
    with there, EvaluatorPool(settings, *data) as pool:
        yield _scorer(settings, prepared, pool)


def _scorer(settings: PruneSettings, prepared: Prepared, compute: Compute) -> Scorer:
    weights = prepared.signature.weights_fingerprint
    healed = None
    if prepared.heal_data is not None:
        healed = HealedPairs(Storage(settings.out), heal_context(settings, prepared), compute)
    return Scorer(prepared.calibration, settings.scoring(), compute, weights=weights, healed=healed)
