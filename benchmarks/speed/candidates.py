"""Scores candidates with whatever version of rayapp this interpreter finds; prints JSON.

It is run as a program of its own, with the root of a checkout on ``PYTHONPATH``, so that two
versions can be compared on the same lines. It uses only what both have.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from typing import Any

from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.preparation import open_evaluator, prepare_scoring
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings


def drawn(stage: str, count: int, num_blocks: int, remove: int, seed: int) -> list[Candidate]:
    """Random candidates that remove blocks from one stage, the first and last two aside."""
    rng = random.Random(seed)
    sets = [sorted(rng.sample(range(2, num_blocks - 2), remove)) for _ in range(count)]
    parts = [tuple(part for b in blocks for part in (2 * b, 2 * b + 1)) for blocks in sets]
    both = [(each, ()) if stage == "prefill" else ((), each) for each in parts]
    return sorted(Candidate(prefill, decode) for prefill, decode in both)


def scored(wanted: dict[str, Any]) -> dict[str, Any]:
    """Sums of every line and candidate, and what they cost once the dense model was run."""
    score = ScoreSettings(model=wanted["model"], calibration=wanted["lines"], dtype=wanted["dtype"])
    compute = ComputeSettings(threads=wanted["threads"])
    calibration = prepare_scoring(score, compute).calibration
    evaluator = open_evaluator(score, compute, calibration)
    chunks = range(len(calibration.chunks))
    num_blocks = evaluator.runner.num_blocks
    candidates = drawn(
        wanted["stage"], wanted["candidates"], num_blocks, wanted["remove"], wanted["seed"]
    )
    for chunk in chunks:
        evaluator.line_sums([DENSE], chunk)
    began_wall_s, began_cpu_s = time.perf_counter(), time.process_time()
    rows = [evaluator.line_sums(candidates, chunk) for chunk in chunks]
    wall_s, cpu_s = time.perf_counter() - began_wall_s, time.process_time() - began_cpu_s
    tokens = {n: len(line.continuation) for n, line in enumerate(calibration.lines)}
    means = [
        sum(sum(row[number]) for row in rows) / sum(tokens.values())
        for number in range(len(candidates))
    ]
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"wall_s": wall_s, "cpu_s": cpu_s, "kl": means, "peak_bytes": peak_bytes}


if __name__ == "__main__":
    print(json.dumps(scored(json.loads(sys.argv[1]))))
