"""A scorer that computes in this process without Ray, or on evaluators of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rayapp.models.hub import from_directory
from rayapp.pruning.healing.healed_units import HealedUnits
from rayapp.pruning.preparation import Prepared, heal_context, open_evaluator, open_healer
from rayapp.pruning.scorer import Compute, LocalCompute, Scorer
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.settings.training import DEFAULT_TRAINING
from rayapp.pruning.storage import Storage


@contextmanager
def opened_scorer(
    score: ScoreSettings,
    compute: ComputeSettings,
    prepared: Prepared,
    search: SearchSettings | None = None,
) -> Iterator[Scorer]:
    """Open a scorer that lives as long as the context.

    Without ``workers`` and ``address`` it scores in this process, and Ray is not even imported.
    Otherwise it scores on evaluators of a Ray cluster: the one that this process is connected to,
    the one at ``address``, the one of the job that this runs in, or a local one that is started for
    the scorer and ended after it.

    Args:
        score: Settings of the objective and its data; the model is a directory.
        compute: Settings of the place of computation.
        prepared: The lines and the model's signature, which were checked before.
        search: Settings of the training of pairs and of their files, for searches that heal.

    Raises:
        ClusterError: The cluster cannot be reached.
        ModelError: The model cannot be read.
    """
    training = search.training() if search else DEFAULT_TRAINING
    if compute.in_process:
        evaluator = open_evaluator(score, compute, prepared.calibration)
        healer = open_healer(score, compute, training, evaluator, prepared.heal_data)
        yield _scorer(score, prepared, LocalCompute(evaluator, healer), search)
        return
    # Ray is imported only here: a search in this process runs where Ray is not installed.
    from rayapp.distributed.cluster.connection import connected
    from rayapp.distributed.evaluator_pool import EvaluatorPool

    # Evaluators run elsewhere: a path relative to this process means nothing to them.
    there = score.model_copy(update={"model": from_directory(score.model).pinned})
    data = (prepared.calibration, prepared.heal_data)
    without = "leave out --workers and --address to search in this process"
    with (
        connected(compute.address, otherwise=without, log_to_driver=True),
        EvaluatorPool(there, compute, *data, training=training) as pool,
    ):
        yield _scorer(score, prepared, pool, search)


def _scorer(
    score: ScoreSettings, prepared: Prepared, compute: Compute, search: SearchSettings | None
) -> Scorer:
    healed = None
    if search is not None and prepared.heal_data is not None:
        context = heal_context(score, search.training(), prepared)
        healed = HealedUnits(Storage(search.out), context, compute)
    weights = prepared.signature.weights_fingerprint
    return Scorer(prepared.calibration, score.scoring(), compute, weights=weights, healed=healed)
