"""All candidates of given sizes: how many, in which order, and which are neighbours."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rayapp.errors import InputError
from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates import Candidate

Unit = Literal["block", "part"]
Units = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """Candidates that remove exactly these numbers of blocks per stage, parts counted half.

    Without ``kv_modes``, PDTrim's rule holds (arXiv:2509.04467): what prefill removes, decode
    removes too, so prefill writes KV by running in full wherever decode attends.

    Raises:
        InputError: The sizes contradict each other, the unit, or the model.
    """

    num_blocks: int
    prefill_remove: float
    decode_remove: float
    unit: Unit = "block"
    kv_modes: bool = True

    def __post_init__(self) -> None:
        for stage in STAGES:
            self._check_size(stage, self._blocks(stage))
        if not self.kv_modes and self.prefill_remove > self.decode_remove:
            raise InputError(
                f"prefill_remove={self.prefill_remove:g} exceeds "
                f"decode_remove={self.decode_remove:g}, but without kv modes prefill removes only "
                "what decode removes; allow kv modes or change a size"
            )

    def _check_size(self, stage: Stage, size: float) -> None:
        name = f"{stage}_remove={size:g}"
        if not 0 <= size <= self.num_blocks:
            raise InputError(
                f"{name}: the model has {self.num_blocks} blocks; remove 0 to {self.num_blocks}"
            )
        if self.unit == "block" and size != int(size):
            raise InputError(
                f"{name}: whole blocks are removed; give a whole number, or use unit part"
            )
        if size * 2 != int(size * 2):
            raise InputError(f"{name}: a part counts one half; give a multiple of 0.5")

    def _blocks(self, stage: Stage) -> float:
        return self.prefill_remove if stage == "prefill" else self.decode_remove

    @property
    def num_units(self) -> int:
        """Units that a stage has: blocks, or parts."""
        return self.num_blocks * (2 if self.unit == "part" else 1)

    def count(self, stage: Stage) -> int:
        """Units that ``stage`` removes."""
        return int(self._blocks(stage) * (2 if self.unit == "part" else 1))

    @property
    def size(self) -> int:
        """Number of candidates."""
        prefill, decode = self.count("prefill"), self.count("decode")
        pool = self.num_units if self.kv_modes else decode
        return math.comb(self.num_units, decode) * math.comb(pool, prefill)

    def __iter__(self) -> Iterator[Candidate]:
        """Every candidate, ascending."""
        for prefill in itertools.combinations(range(self.num_units), self.count("prefill")):
            for decode in self._decode_sets(prefill):
                yield self.candidate(prefill, decode)

    def __contains__(self, candidate: object) -> bool:
        if not isinstance(candidate, Candidate):
            return False
        fits = all(candidate.removed(stage) == self._blocks(stage) for stage in STAGES)
        in_units = self.candidate(*self.units(candidate)) == candidate
        return (
            fits and in_units and (self.kv_modes or set(candidate.prefill) <= set(candidate.decode))
        )

    def _decode_sets(self, prefill: Units) -> list[Units]:
        count = self.count("decode")
        if self.kv_modes:
            return list(itertools.combinations(range(self.num_units), count))
        others = [unit for unit in range(self.num_units) if unit not in prefill]
        added = itertools.combinations(others, count - len(prefill))
        return sorted(tuple(sorted((*prefill, *extra))) for extra in added)

    def candidate(self, prefill: Units, decode: Units) -> Candidate:
        """The candidate that removes these units."""
        return Candidate(self._parts(prefill), self._parts(decode))

    def units(self, candidate: Candidate) -> tuple[Units, Units]:
        """The units that a candidate of this space removes, per stage, ascending."""
        step = 1 if self.unit == "part" else 2
        return (
            tuple(sorted({part // step for part in candidate.prefill})),
            tuple(sorted({part // step for part in candidate.decode})),
        )

    def _parts(self, units: Units) -> tuple[int, ...]:
        if self.unit == "part":
            return tuple(sorted(units))
        return tuple(part for unit in sorted(units) for part in (2 * unit, 2 * unit + 1))

    def draw(self, rng: random.Random) -> Candidate:
        """A candidate, uniform over the space."""
        decode = tuple(rng.sample(range(self.num_units), self.count("decode")))
        pool = range(self.num_units) if self.kv_modes else sorted(decode)
        return self.candidate(tuple(rng.sample(pool, self.count("prefill"))), decode)

    def swaps(self, candidate: Candidate, stages: tuple[Stage, ...] = STAGES) -> list[Candidate]:
        """Every neighbour, ascending: one removed unit of one stage goes back, another one leaves.

        Without kv modes, a unit that both stages removed is swapped in both where decode gives it
        back.
        """
        prefill, decode = self.units(candidate)
        found: list[Candidate] = []
        if "prefill" in stages:
            pool = range(self.num_units) if self.kv_modes else decode
            found += [self.candidate(s, decode) for s in _swapped(prefill, pool)]
        if "decode" in stages:
            for units in _swapped(decode, range(self.num_units)):
                found.append(self.candidate(self._following(prefill, decode, units), units))
        return sorted(set(found))

    def _following(self, prefill: Units, decode: Units, swapped: Units) -> Units:
        """The prefill set beside a swapped decode set."""
        given_back = set(prefill) - set(swapped)
        if self.kv_modes or not given_back:
            return prefill
        return tuple((set(prefill) - given_back) | (set(swapped) - set(decode)))


def _swapped(units: Units, pool: range | Units) -> list[Units]:
    """Every set with one unit exchanged for one of ``pool``."""
    return [
        tuple(sorted((*(u for u in units if u != old), new)))
        for old in units
        for new in pool
        if new not in units
    ]
