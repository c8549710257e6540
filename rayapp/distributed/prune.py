"""One search, from settings to a plan: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from rayapp.distributed.scoring import EvaluatorPool
from rayapp.errors import ClusterError
from rayapp.evaluation.report import render_report
from rayapp.plan import STAGES
from rayapp.pruning.candidates import Candidate
from rayapp.pruning.front import FrontResult, search_front
from rayapp.pruning.preparation import Prepared, open_evaluator, prepare
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.run import SearchResult, run_search
from rayapp.pruning.scoring import Compute, LocalCompute, Scorer
from rayapp.pruning.settings import PruneSettings
from rayapp.pruning.sizes import with_sizes
from rayapp.pruning.storage import Storage

REPORT_FILE = "report.html"


def prune(settings: PruneSettings, *, on_progress: ProgressCallback | None = None) -> SearchResult:
    """Search for a plan; write it, its journal, trials and report to ``settings.out``.

    Scores in this process where neither ``workers`` nor ``address`` is given; otherwise on
    evaluators of a Ray cluster: the one that this process is connected to, the one at ``address``,
    the one of the job that this runs in, or a local one that is started for the search and ended
    after it.

    Raises:
        InputError: Model, data, sizes or output directory cannot be used.
        ClusterError: The cluster cannot be reached, or cannot place an evaluator.
        SearchError: The search cannot go on; the journal keeps what was scored.
    """
    with _opened(settings) as (settings, prepared, scorer):
        settings = with_sizes(settings, scorer.compute)
        result = run_search(settings, scorer, prepared.signature, on_progress=on_progress)
    Storage(settings.out).write_bytes(REPORT_FILE, _report(result).encode())
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
    with _opened(settings) as (settings, prepared, scorer):
        return search_front(settings, scorer, prepared.signature, on_progress=on_progress)


@contextmanager
def _opened(settings: PruneSettings) -> Iterator[tuple[PruneSettings, Prepared, Scorer]]:
    """Checked settings and data, and a scorer on whatever computes."""
    prepared = prepare(settings)
    if not settings.workers and settings.address is None:
        evaluator = open_evaluator(settings, prepared.calibration)
        yield settings, prepared, _scorer(settings, prepared, LocalCompute(evaluator))
        return
    # Evaluators run elsewhere: a path relative to this process means nothing to them.
    settings = settings.model_copy(update={"model": str(Path(settings.model).absolute())})
    with _connected(settings.address), EvaluatorPool(settings, prepared.calibration) as pool:
        yield settings, prepared, _scorer(settings, prepared, pool)


def _scorer(settings: PruneSettings, prepared: Prepared, compute: Compute) -> Scorer:
    weights = prepared.signature.weights_fingerprint
    return Scorer(prepared.calibration, settings.scoring(), compute, weights=weights)


def _report(result: SearchResult) -> str:
    """The plan and the search's trace: candidates of its size that were scored on all chunks."""

    def removed(candidate: Candidate) -> tuple[float, ...]:
        return tuple(candidate.removed(stage) for stage in STAGES)

    size = removed(Candidate.from_plan(result.plan))
    whole = [t for t in result.trials if t.score.num_chunks == result.score.num_chunks]
    scores = [t.score.value for t in whole if removed(t.candidate) == size]
    return render_report(result.plan, trials=scores)


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A Ray connection: the one that is there, or one that ends with this context."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ClusterError(
            f"no Ray cluster at {address or 'the default address'} ({reason}); start one with "
            "`ray start --head`, or leave out --workers and --address to search in this process"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()
