"""Backward elimination over sets of KV levels: cut everything, then restore where it pays most.

Whole sets are scored, jointly with the block plan: single-block effects do not add up (measured:
each block cut alone kept retrieval at 0.94 and more, all cut left 0.1 to 0.2). Project default,
after the manner of greedy selection under a knapsack constraint:

1. Start with every block at its smallest level.
2. Restore the (block, level) that buys most score per byte, until no restoration fits the byte
   budget, or the score is good enough. Rates of earlier rounds are upper guesses of later ones, so
   a round measures only the restorations that may still win (lazy greedy).
3. Polish: measure every single change of the current set; propose the larger moves that would be
   best if effects added up (a knapsack, solved exactly), and some random ones; score those; move to
   the best set; repeat until nothing improves.

Where the number of sets is bounded, because a model has many blocks or a large vocabulary, gains
are guessed first: that of a block which alone is kept, times the share of all gain that its level
has in all blocks together. So most restorations are never measured; the last ones are taken by
their guesses; and a round of polish that would not fit is not begun.

The search knows scores and bytes, and nothing of models.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rayapp.pruning.kv_choice.levels import KVLevels, KVSet, moved

MAX_ROUNDS = 6
"""Most rounds of polish (project default)."""
MIN_GAIN = 0.01
"""Share by which a round of polish must improve the score, or it is the last (project default)."""
NUM_HALVINGS = 10
"""Sets that are kept to find where a guessed way reaches a score: enough for 1,000 steps (project
default)."""
KNAPSACK_UNITS = 300
"""Steps into which the largest change of one block is cut, to add up bytes (project default)."""

ScoreSets = Callable[[Sequence[KVSet], str], list[float]]
"""A function from sets, and the name of the phase that needs them, to scores; lower is better."""


@dataclass(frozen=True)
class Goal:
    """Either the best score within some bytes, or the fewest bytes within some score.

    Without either bound, the goal is the best score.
    """

    max_bytes: int | None = None
    max_score: float | None = None

    def key(self, score: float, num_bytes: float) -> tuple[float, float, float]:
        """Rank of a score and its bytes; smaller is better, and 0 is first if the goal is met."""
        if self.max_score is not None:
            return max(0.0, score - self.max_score), num_bytes, score
        over = 0.0 if self.max_bytes is None else max(0.0, num_bytes - self.max_bytes)
        return over, score, num_bytes


@dataclass(frozen=True)
class Step:
    """One set on the way, better in its phase than the one before it."""

    phase: str
    chosen: KVSet
    score: float
    num_bytes: int


class Elimination:
    """One search for a set of levels.

    Args:
        levels: The sets to choose from.
        goal: The goal of the search.
        score: Scores sets; it should remember the scores of sets that come again.
        num_bytes: Gives the bytes of a set.
        generation_size: Number of sets that are scored at a time.
        max_sets: Most sets that are scored; None is no bound.
        seed: Seed of the random pairs.

    Attributes:
        steps: The steps to the result.
    """

    def __init__(
        self,
        levels: KVLevels,
        goal: Goal,
        score: ScoreSets,
        num_bytes: Callable[[KVSet], int],
        *,
        generation_size: int = 8,
        max_sets: int | None = None,
        seed: int = 0,
    ) -> None:
        self._max_sets = max_sets
        self._levels, self._goal = levels, goal
        self._ask, self._bytes = score, num_bytes
        self._size = generation_size
        self._random = random.Random(f"kv/{seed}")
        self._scores: dict[KVSet, float] = {}
        self._worth: list[list[float]] = []
        self.steps: list[Step] = []

    def run(self) -> KVSet:
        """The best set that was scored; it misses the goal if no scored set meets it."""
        self._score([self._levels.smallest, self._levels.full], "start")
        self._step("start", self._levels.smallest)
        self._guess()
        self._restore(self._levels.smallest)
        self._step("restored", self._best())
        self._polish()
        return self._best()

    def _score(self, sets: Iterable[KVSet], phase: str) -> None:
        new = sorted({chosen for chosen in sets if chosen not in self._scores})
        if new:
            self._scores.update(zip(new, self._ask(new, phase), strict=True))

    def _left(self) -> float:
        """Number of sets that may still be scored; some are spared for the end of the way up."""
        if self._max_sets is None:
            return math.inf
        spared = 1 if self._goal.max_score is None else NUM_HALVINGS
        return self._max_sets - len(self._scores) - spared

    def _guess(self) -> None:
        """Guess what every level of every block is worth, where the number of sets is bounded."""
        if self._max_sets is None:
            return
        current, full = self._levels.smallest, self._levels.full
        alone = [moved(current, index, level) for index, level in enumerate(full)]
        self._score(alone, "start")
        shares = self._shares()
        for kept, level in zip(alone, full, strict=True):
            gain = max(0.0, self._scores[current] - self._scores[kept])
            self._worth.append([gain * share for share in shares[len(shares) - 1 - level :]])

    def _guessed_rates(self, current: KVSet, index: int) -> dict[tuple[int, int], float]:
        """Guessed rates of one block's restorations; none without guesses."""
        if not self._worth:
            return {}
        worth, now = self._worth[index], current[index]
        rates = {}
        for level in range(now + 1, len(worth)):
            grown = self._bytes(moved(current, index, level)) - self._bytes(current)
            rates[index, level] = max(0.0, worth[level] - worth[now]) / max(1, grown)
        return rates

    def _shares(self) -> list[float]:
        """The share of all gain that every level has in all blocks together, from 0 to 1.

        A block with fewer levels has the last of them.
        """
        full = self._levels.full
        equal = [
            tuple(max(0, last - missing) for last in full) for missing in range(max(full), -1, -1)
        ]
        self._score(equal, "start")
        worst, best = self._scores[self._levels.smallest], self._scores[full]
        if best >= worst:
            return [1.0] * len(equal)
        return [
            min(1.0, max(0.0, (worst - self._scores[chosen]) / (worst - best))) for chosen in equal
        ]

    def _step(self, phase: str, chosen: KVSet) -> None:
        self.steps.append(Step(phase, chosen, self._scores[chosen], self._bytes(chosen)))

    def _key(self, chosen: KVSet) -> tuple[float, ...]:
        """Rank of a scored set; ties go to the smaller levels."""
        return (*self._goal.key(self._scores[chosen], self._bytes(chosen)), *chosen)

    def _best(self) -> KVSet:
        return min(self._scores, key=self._key)

    def _fits(self, chosen: KVSet) -> bool:
        return self._goal.max_bytes is None or self._bytes(chosen) <= self._goal.max_bytes

    def _is_enough(self, chosen: KVSet) -> bool:
        most = self._goal.max_score
        return most is not None and self._scores[chosen] <= most

    def _restore(self, current: KVSet) -> None:
        """Move upwards by the best rate until nothing fits; a move may do harm, the next may pay.

        The best set on the way is the result, wherever the way ends. If the number of sets is
        bounded, its end may be guessed; then only those sets get a score that decide where it ends.
        """
        guessed: list[KVSet] = []
        rates: dict[tuple[int, int], float] = {}
        for index in range(len(current)):
            rates |= self._guessed_rates(current, index)
        while guessed or not self._is_enough(current):
            moves = {
                (index, level): moved(current, index, level)
                for index, levels in enumerate(self._levels.levels)
                for level in range(current[index] + 1, len(levels))
            }
            fitting = {move: target for move, target in moves.items() if self._fits(target)}
            if not fitting:
                break
            move = self._best_move(current, fitting, rates)
            current = fitting[move]
            # What the block's other levels were worth was told from where it stood before.
            rates |= self._guessed_rates(current, move[0])
            if guessed or current not in self._scores:
                guessed.append(current)
            else:
                self._step("restore", current)
        self._end(guessed)

    def _end(self, guessed: Sequence[KVSet]) -> None:
        """Score the last of the guessed sets; for a score, halve them to the first that has it."""
        begin, end = 0, len(guessed)
        while begin < end:
            middle = end - 1 if self._goal.max_score is None else (begin + end) // 2
            self._score([guessed[middle]], "restore")
            is_enough = self._is_enough(guessed[middle])
            begin, end = (begin, middle) if is_enough else (middle + 1, end)

    def _best_move(
        self,
        current: KVSet,
        moves: dict[tuple[int, int], KVSet],
        rates: dict[tuple[int, int], float],
    ) -> tuple[int, int]:
        """The move that lowers the score most per byte, as far as rates of earlier rounds show."""
        fresh: dict[tuple[int, int], float] = {}
        while True:
            top = max(fresh.values(), default=-math.inf)
            waiting = sorted(
                (-rates.get(move, math.inf), move)
                for move in moves
                if move not in fresh and rates.get(move, math.inf) > top
            )
            if not waiting:
                return min(fresh, key=lambda move: (-fresh[move], move))
            if self._left() < self._size or current not in self._scores:
                return min(moves, key=lambda move: (-rates.get(move, -math.inf), move))
            unknown = [move for rate, move in waiting if rate == -math.inf]
            measured = unknown or [move for _, move in waiting[: self._size]]
            self._score((moves[move] for move in measured), "restore")
            for move in measured:
                fresh[move] = rates[move] = self._rate(current, moves[move])

    def _rate(self, current: KVSet, target: KVSet) -> float:
        """Score bought per byte; a header may shrink, so the divisor is one byte at least."""
        gain = self._scores[current] - self._scores[target]
        return gain / max(1, self._bytes(target) - self._bytes(current))

    def _polish(self) -> None:
        for _ in range(MAX_ROUNDS):
            current = self._best()
            neighbours = list(self._levels.moves(current))
            if self._left() < len(neighbours) + 3 * self._size:
                return
            self._score(neighbours, "neighbours")
            self._score(self._proposals(current), "swaps")
            best = self._best()
            if best != current:
                self._step("polish", best)
            if not self._is_much_better(best, current):
                return

    def _is_much_better(self, best: KVSet, current: KVSet) -> bool:
        """Whether another round is worth its price."""
        (missed, value, *_), (missed_before, before, *_) = self._key(best), self._key(current)
        return missed < missed_before or value < (1 - MIN_GAIN) * before

    def _proposals(self, current: KVSet) -> list[KVSet]:
        """Sets with several changes that may be better; none was scored before."""
        effects = _Effects(self._levels, current, self._scores, self._bytes)
        guessed = {
            chosen: self._goal.key(*effects.guess(chosen))
            for chosen in (*effects.trades(), *effects.pairs())
            if chosen not in self._scores
        }
        best_key = self._key(current)[:3]
        ranked = sorted((key, chosen) for chosen, key in guessed.items() if key < best_key)
        fitting = sorted(chosen for chosen, key in guessed.items() if key[0] == 0)
        drawn = self._random.sample(fitting, min(self._size // 2, len(fitting)))
        return [*(chosen for _, chosen in ranked[: 2 * self._size]), *drawn]


class _Effects:
    """Every single change of one set, and the sum of several if effects added up."""

    def __init__(
        self,
        levels: KVLevels,
        current: KVSet,
        scores: dict[KVSet, float],
        num_bytes: Callable[[KVSet], int],
    ) -> None:
        self._current = current
        self._score, self._bytes = scores[current], num_bytes(current)
        self._changes = [
            [
                (scores[changed] - self._score, num_bytes(changed) - self._bytes)
                for level in range(len(choices))
                for changed in [moved(current, index, level)]
            ]
            for index, choices in enumerate(levels.levels)
        ]

    def guess(self, chosen: KVSet) -> tuple[float, float]:
        """Score and bytes of a set if effects added up."""
        changes = [self._changes[index][level] for index, level in enumerate(chosen)]
        gained, grown = (math.fsum(column) for column in zip(*changes, strict=True))
        return self._score + gained, self._bytes + grown

    def pairs(self) -> list[KVSet]:
        """All sets that differ in two blocks, one of them up and the other down."""
        singles = [
            (index, level)
            for index, choices in enumerate(self._changes)
            for level in range(len(choices))
            if level != self._current[index]
        ]
        return [
            moved(moved(self._current, *one), *other)
            for one, other in itertools.combinations(singles, 2)
            if one[0] != other[0]
            and (one[1] > self._current[one[0]]) != (other[1] > self._current[other[0]])
        ]

    def trades(self) -> list[KVSet]:
        """The sets that no other beats in score and bytes: a knapsack solved exactly, in units."""
        sizes = [grown for choices in self._changes for _, grown in choices]
        unit = max(1.0, (max(sizes) - min(sizes)) / KNAPSACK_UNITS)
        front: dict[int, tuple[float, KVSet]] = {0: (0.0, ())}
        for choices in self._changes:
            wider: dict[int, tuple[float, KVSet]] = {}
            for size, (score, chosen) in front.items():
                for level, (gained, grown) in enumerate(choices):
                    at, entry = size + round(grown / unit), (score + gained, (*chosen, level))
                    if at not in wider or entry < wider[at]:
                        wider[at] = entry
            front = _undominated(wider)
        return [chosen for _, chosen in front.values()]


def _undominated(entries: dict[int, tuple[float, KVSet]]) -> dict[int, tuple[float, KVSet]]:
    """Entries whose score is better than that of all entries with fewer bytes."""
    kept: dict[int, tuple[float, KVSet]] = {}
    best = math.inf
    for size in sorted(entries):
        if entries[size][0] < best:
            best = entries[size][0]
            kept[size] = entries[size]
    return kept
