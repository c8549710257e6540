"""A race: a generation is scored on few chunks, its better half on twice as many, the best on all.

The race is a layer between the methods and the scorer; a method gets one score per candidate, as it
does without races. The rungs are nested prefixes of one order of the chunks. Chunks are cut by
prompt length, so the order jumps through them, and it starts elsewhere in every generation: no
chunk decides alone.

From rung to rung at most the better half goes on (successive halving, arXiv:1502.07943), and of
that half only the candidates that may still win: those whose mean loss against the leader, paired
line by line, is within ``MAY_WIN`` standard errors of zero.

A candidate that falls out at a rung gets an estimated score: the winner's score on all chunks,
times the ratio of the two scores on the chunks that both ran. The estimate is never as good as the
winner's own score, so the candidate that a method takes for the best of a generation was scored on
all chunks. Rungs, share and bound are project defaults, chosen by replays on other calibration sets
than those reported; EvoPress (arXiv:2410.14649) races its offspring in the same manner. The outcome
depends on the candidates and the generation's number alone: not on workers, and not on whether the
search was resumed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.scorer import Scorer

RUNGS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the chunks that the rungs below the last run on; the last runs on all."""
GO_ON = 1 / 2
"""Share of the candidates of a rung that reach the next one at most, rounded up."""
MAY_WIN = 2.0
"""Standard errors that a candidate may lie behind the leader of its rung and go on."""


def race(
    scorer: Scorer,
    candidates: Sequence[Candidate],
    generation: int,
    *,
    on_progress: Callable[[float], None] | None = None,
) -> list[Score]:
    """Race a generation; its scores come in the order of ``candidates``.

    The best candidate is scored on all chunks.

    Args:
        scorer: Scores candidates on any set of chunks, and remembers the scores.
        candidates: One generation, repetitions allowed.
        generation: The generation's number, which rotates the chunks.
        on_progress: Called with the work done so far, in candidates scored on all chunks.

    Raises:
        SearchError: A score is not finite.
    """
    if not candidates:
        return []
    order = chunk_order(len(scorer.calibration.chunks), generation)
    running = sorted(set(candidates))
    rungs: list[dict[Candidate, Score]] = []
    finished, last_size = 0.0, 0
    for size in rung_sizes(len(order), len(running)):
        report = partial(_report, on_progress, finished, size / len(order))
        scores = scorer.score_many(running, order[:size], on_progress=report)
        rungs.append(dict(zip(running, scores, strict=True)))
        finished += len(running) * (size - last_size) / len(order)
        last_size = size
        running = _going_on(rungs[-1], _line_weights(scorer, order[:size]))
    final = _told(rungs)
    return [final[candidate] for candidate in candidates]


def chunk_order(num_chunks: int, generation: int) -> list[int]:
    """All chunks in the order of the race.

    Every prefix is spread over the set, and starts elsewhere in every generation.
    """
    digits = max(1, (num_chunks - 1).bit_length())
    spread = [int(f"{n:0{digits}b}"[::-1], 2) for n in range(1 << digits)]
    return [(c + generation) % num_chunks for c in spread if c < num_chunks]


def rung_sizes(num_chunks: int, num_candidates: int) -> list[int]:
    """Numbers of chunks of the rungs, growing to all; a single rung if there is nobody to beat."""
    shares = RUNGS if num_candidates > 1 else ()
    return sorted({*(math.ceil(num_chunks * share) for share in shares), num_chunks})


def _report(
    on_progress: Callable[[float], None] | None, before: float, share: float, count: float
) -> None:
    if on_progress:
        on_progress(before + count * share)


def _ranked(scores: Mapping[Candidate, Score]) -> list[Candidate]:
    return sorted(scores, key=lambda candidate: (scores[candidate].value, candidate))


def _going_on(scores: Mapping[Candidate, Score], weights: Sequence[float]) -> list[Candidate]:
    """The leader, and the candidates of the better half that may still win; ascending."""
    ranked = _ranked(scores)
    leader = scores[ranked[0]]
    return sorted(
        candidate
        for candidate in ranked[: math.ceil(len(ranked) * GO_ON)]
        if _may_win(scores[candidate], leader, weights)
    )


def _may_win(score: Score, leader: Score, weights: Sequence[float]) -> bool:
    """Whether the loss against the leader may be chance, judged by its spread over the lines."""
    lost = [
        weight * (mine - its)
        for weight, mine, its in zip(weights, score.lines, leader.lines, strict=True)
    ]
    if len(lost) < 2:
        return True
    return math.fsum(lost) <= MAY_WIN * math.sqrt(len(lost)) * statistics.stdev(lost)


def _line_weights(scorer: Scorer, chunks: Sequence[int]) -> list[float]:
    """Weights that turn the lines' sums into the score on these chunks; lines ascending."""
    lines = scorer.calibration.lines
    scored = sorted(line for chunk in chunks for line in scorer.calibration.chunks[chunk].lines)
    by_task = scorer.objective.score_by == "task"
    counted = scorer.objective.num_counted
    tokens: dict[str, float] = {}
    for line in scored:
        task = lines[line].task if by_task else ""
        tokens[task] = tokens.get(task, 0) + counted(len(lines[line].continuation))
    return [1 / (len(tokens) * tokens[lines[line].task if by_task else ""]) for line in scored]


def _told(rungs: Sequence[Mapping[Candidate, Score]]) -> dict[Candidate, Score]:
    """Scores for the method: the last rung's, and estimates for candidates that fell out before."""
    final = dict(rungs[-1])
    winner = _ranked(rungs[-1])[0]
    whole = rungs[-1][winner].value
    for scores in reversed(rungs[:-1]):
        for candidate in scores.keys() - final.keys():
            estimate = _estimate(scores[candidate].value, scores[winner].value, whole)
            final[candidate] = replace(scores[candidate], value=estimate)
    return final


def _estimate(partly: float, winner_partly: float, winner: float) -> float:
    """Estimate of a loser's score on all chunks.

    It scales the winner's score by the ratio of the partial scores; if one of them is not positive,
    where a ratio means nothing, it adds their difference instead.
    """
    by_ratio = winner > 0 and winner_partly > 0
    estimate = winner * (partly / winner_partly) if by_ratio else winner + partly - winner_partly
    return max(estimate, math.nextafter(winner, math.inf))
