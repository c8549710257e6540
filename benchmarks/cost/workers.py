"""More evaluators: two of Ray's are measured, up to 256 are simulated."""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from lines.equal import equal_lines

from cost.trial import score_of, search
from rayapp.models.loading import LoadedModel
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.scorer import Done, split_work
from rayapp.pruning.settings.compute import CACHE_BYTES, ComputeSettings

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PIECE_OVERHEAD_S = 0.003  # one actor call with a small answer


def two_workers(arguments: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """The same fresh candidates on one and on two evaluators, in turns.

    Two evaluators share the cache bytes of the one, so that the gain does not come from a larger
    cache.
    """
    import ray

    from rayapp.distributed.cluster.local import NodeSpec, local_cluster

    lines = equal_lines(model.tokenizer, arguments, "calibration", arguments.lines, arguments.seed)
    with local_cluster([NodeSpec(num_cpus=4)]) as cluster:
        ray.init(cluster.address, logging_level="warning")
        seconds = _measured(arguments, model, lines)
    ratios = [one / two for one, two in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "speed_up": statistics.median(ratios), "ratios": ratios}


def _measured(
    arguments: argparse.Namespace, model: LoadedModel, lines: Calibration
) -> dict[int, list[float]]:
    """Seconds of the runs on one and on two evaluators of the cluster."""
    import ray

    from rayapp.distributed.evaluator_pool import EvaluatorPool

    pools = {
        count: EvaluatorPool(
            score_of(arguments),
            ComputeSettings(workers=count, cache_bytes=CACHE_BYTES // count),
            lines,
        )
        for count in (1, 2)
    }
    for pool in pools.values():
        ray.wait(list(pool._starting), num_returns=len(pool._starting))
    space = Space(model.signature.num_blocks, arguments.remove, arguments.remove)
    seconds: dict[int, list[float]] = {count: [] for count in pools}
    for repeat in range(-1, arguments.runs):  # the first run, uncounted, warms both up
        rng = random.Random(repeat)
        drawn = sorted({space.draw(rng) for _ in range(arguments.worker_candidates)})
        for count in sorted(pools, reverse=repeat % 2 == 1):
            work = split_work(dict.fromkeys(range(len(lines.chunks)), drawn), count)
            started = time.perf_counter()
            assert len(list(pools[count].run(work))) == len(work)
            if repeat >= 0:
                seconds[count].append(time.perf_counter() - started)
    for pool in pools.values():
        pool.close()
    return seconds


def simulation(arguments: argparse.Namespace, model: LoadedModel) -> list[dict[str, float]]:
    """Seconds of one recorded search on more evaluators, with its work split as it would be.

    Every piece goes to the evaluator that is free first. Pieces that follow one another on one
    evaluator share states; the cost of computing these twice on two evaluators is not added, so the
    simulated speed is an upper bound.
    """
    lines = equal_lines(model.tokenizer, arguments, "calibration", arguments.lines, arguments.seed)
    _, compute = search(arguments, model, lines, arguments.seed, racing=False)
    rows = [
        {"workers": count, "seconds": sum(_round(done, count) for done in compute.rounds)}
        for count in WORKERS
    ]
    return [{**row, "speed_up": rows[0]["seconds"] / row["seconds"]} for row in rows]


def _round(done: Sequence[Done], num_workers: int) -> float:
    """Seconds of one generation (or rung): its last piece ends before the next one begins."""
    seconds: dict[int, dict[Candidate, float]] = {}
    for piece in done:
        share = piece.seconds / len(piece.work.candidates)
        seconds.setdefault(piece.work.chunk, {}).update(dict.fromkeys(piece.work.candidates, share))
    free = [0.0] * num_workers
    for work in split_work({k: sorted(shares) for k, shares in seconds.items()}, num_workers):
        takes = PIECE_OVERHEAD_S + sum(seconds[work.chunk][c] for c in work.candidates)
        heapq.heappush(free, heapq.heappop(free) + takes)
    return max(free)
