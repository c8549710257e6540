"""The space of all candidates of given sizes: their number, their order, and their neighbours."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rayapp.errors import InputError
from rayapp.plan import STAGES, Stage
from rayapp.pruning.candidates.candidate import Candidate

Unit = Literal["block", "part"]
Units = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """Candidates that remove exactly these numbers of blocks per stage, parts counted half.

    Without ``kv_modes``, PDTrim's rule holds (arXiv:2509.04467): what prefill removes, decode
    removes too, so prefill writes KV by running in full wherever decode attends.

    With ``shared``, both stages remove one and the same set. Decode then stands for both: methods
    see a space whose prefill removes nothing, and what leaves decode leaves prefill too.

    ``prefill_allowed`` and ``decode_allowed`` are the units that may be removed; None allows all of
    them.

    Raises:
        InputError: The sizes contradict each other, the unit, or the model.
    """

    num_blocks: int
    prefill_remove: float
    decode_remove: float
    unit: Unit = "block"
    kv_modes: bool = True
    shared: bool = False
    prefill_allowed: frozenset[int] | None = None
    decode_allowed: frozenset[int] | None = None

    def __post_init__(self) -> None:
        for stage in STAGES:
            self._check_size(stage, self._blocks(stage))
            self._check_allowed(stage)
        if self.shared and self.prefill_remove != self.decode_remove:
            raise InputError(
                f"prefill_remove={self.prefill_remove:g} differs from "
                f"decode_remove={self.decode_remove:g}, but one shared set is removed from both "
                "stages; give equal sizes, or search without --shared"
            )
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

    def _check_allowed(self, stage: Stage) -> None:
        if self.count(stage) > len(self.pool(stage)):
            raise InputError(
                f"{stage}_remove={self._blocks(stage):g}: only {len(self.pool(stage))} "
                f"{self.unit}s of {stage} may be removed; lower the size or the threshold"
            )

    def _blocks(self, stage: Stage) -> float:
        return self.prefill_remove if stage == "prefill" else self.decode_remove

    @property
    def num_units(self) -> int:
        """Number of units that a stage has: blocks, or parts."""
        return self.num_blocks * (2 if self.unit == "part" else 1)

    def count(self, stage: Stage) -> int:
        """Number of units that ``stage`` removes; in a shared space decode's leave prefill too."""
        if self.shared and stage == "prefill":
            return 0
        return int(self._blocks(stage) * (2 if self.unit == "part" else 1))

    def pool(self, stage: Stage) -> Units:
        """Units that may be removed from ``stage``, ascending; the coupling rule included."""
        coupled = self.shared or (stage == "prefill" and not self.kv_modes)
        allowed = {"prefill": self.prefill_allowed, "decode": self.decode_allowed}
        sets = [allowed[member] for member in (STAGES if coupled else (stage,))]
        units = set(range(self.num_units))
        return tuple(sorted(units.intersection(*(limit for limit in sets if limit is not None))))

    @property
    def size(self) -> int:
        """Number of candidates."""
        prefill, decode = self.count("prefill"), self.count("decode")
        prefills = math.comb(len(self.pool("prefill")), prefill)
        if self.kv_modes or not prefill:
            return prefills * math.comb(len(self.pool("decode")), decode)
        return prefills * math.comb(len(self.pool("decode")) - prefill, decode - prefill)

    def __iter__(self) -> Iterator[Candidate]:
        """Every candidate, ascending."""
        for prefill in itertools.combinations(self.pool("prefill"), self.count("prefill")):
            for decode in self._decode_sets(prefill):
                yield self.candidate(prefill, decode)

    def __contains__(self, candidate: object) -> bool:
        if not isinstance(candidate, Candidate):
            return False
        units = self.units(candidate)
        return (
            all(candidate.removed(stage) == self._blocks(stage) for stage in STAGES)
            and self.candidate(*units) == candidate
            and self._allows(*units)
        )

    def _allows(self, prefill: Units, decode: Units) -> bool:
        inside = {*prefill} <= {*self.pool("prefill")} and {*decode} <= {*self.pool("decode")}
        return inside and (self.kv_modes or self.shared or {*prefill} <= {*decode})

    def _decode_sets(self, prefill: Units) -> list[Units]:
        count, pool = self.count("decode"), self.pool("decode")
        if self.kv_modes or not prefill:
            return list(itertools.combinations(pool, count))
        others = [unit for unit in pool if unit not in prefill]
        added = itertools.combinations(others, count - len(prefill))
        return sorted(tuple(sorted((*prefill, *extra))) for extra in added)

    def candidate(self, prefill: Units, decode: Units) -> Candidate:
        """The candidate that removes these units; in a shared space decode's leave both stages."""
        if self.shared:
            return Candidate(self._parts(decode), self._parts(decode))
        return Candidate(self._parts(prefill), self._parts(decode))

    def units(self, candidate: Candidate) -> tuple[Units, Units]:
        """The units that a candidate of this space removes, per stage, ascending."""
        step = 1 if self.unit == "part" else 2
        prefill = () if self.shared else candidate.prefill
        return (
            tuple(sorted({part // step for part in prefill})),
            tuple(sorted({part // step for part in candidate.decode})),
        )

    def _parts(self, units: Units) -> tuple[int, ...]:
        if self.unit == "part":
            return tuple(sorted(units))
        return tuple(part for unit in sorted(units) for part in (2 * unit, 2 * unit + 1))

    def draw(self, rng: random.Random) -> Candidate:
        """Draw a candidate uniformly from the space."""
        prefill = tuple(rng.sample(self.pool("prefill"), self.count("prefill")))
        fixed = () if self.kv_modes else prefill
        others = [unit for unit in self.pool("decode") if unit not in fixed]
        return self.candidate(
            prefill, (*fixed, *rng.sample(others, self.count("decode") - len(fixed)))
        )

    def swaps(self, candidate: Candidate, stages: tuple[Stage, ...] = STAGES) -> list[Candidate]:
        """Every neighbour, ascending: one removed unit of one stage comes back, another one leaves.

        Without kv modes, a unit that both stages removed is swapped in both if decode gives it
        back.
        """
        prefill, decode = self.units(candidate)
        neighbours: list[tuple[Units, Units]] = []
        if "prefill" in stages:
            neighbours += [(units, decode) for units in _swapped(prefill, self.pool("prefill"))]
        if "decode" in stages:
            swapped = _swapped(decode, self.pool("decode"))
            neighbours += [(self._following(prefill, decode, units), units) for units in swapped]
        return sorted({self.candidate(*units) for units in neighbours if self._allows(*units)})

    def _following(self, prefill: Units, decode: Units, swapped: Units) -> Units:
        """The prefill set that goes with a swapped decode set."""
        given_back = set(prefill) - set(swapped)
        if self.kv_modes or not given_back:
            return prefill
        return tuple((set(prefill) - given_back) | (set(swapped) - set(decode)))


def _swapped(units: Units, pool: Units) -> list[Units]:
    """Every set with one unit exchanged for one of ``pool``."""
    return [
        tuple(sorted((*(u for u in units if u != old), new)))
        for old in units
        for new in pool
        if new not in units
    ]
