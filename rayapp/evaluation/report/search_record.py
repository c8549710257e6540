"""The files of a search's directory, read back for the report: trials, influence, a front."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rayapp.errors import DataError
from rayapp.plan import STAGES, PruningPlan, Stage
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.search.front import PRICE

TrialKind = Literal["compared", "of another size", "estimate"]

_NEEDED = ("prefill", "decode", "score")
_OPTIONAL = ("prefill_removed", "decode_removed", "chunks", "phase", "healed")


@dataclass(frozen=True)
class Removal:
    """Units that each stage removes: ``"3"`` is a block, ``"3.mlp"`` a part."""

    prefill: tuple[str, ...]
    decode: tuple[str, ...]

    def is_of(self, plan: PruningPlan) -> bool:
        """Whether a plan removes exactly these units."""
        candidate = Candidate.from_plan(plan)
        return all(tuple(candidate.labels(stage)) == self.units(stage) for stage in STAGES)

    def units(self, stage: Stage) -> tuple[str, ...]:
        """The units that one stage removes."""
        return self.prefill if stage == "prefill" else self.decode

    @property
    def is_dense(self) -> bool:
        """Whether nothing is removed."""
        return not self.prefill and not self.decode

    @property
    def single(self) -> tuple[Stage, str] | None:
        """Stage and unit, if a single unit of one stage is all that is removed."""
        if len(self.prefill) + len(self.decode) != 1:
            return None
        return ("prefill", self.prefill[0]) if self.prefill else ("decode", self.decode[0])

    @property
    def size(self) -> tuple[float, ...]:
        """Blocks removed from both stages, parts counted one half."""
        return tuple(sum(0.5 if "." in u else 1.0 for u in self.units(stage)) for stage in STAGES)

    def __str__(self) -> str:
        return "; ".join(f"{s} without {' '.join(self.units(s)) or 'none'}" for s in STAGES)


@dataclass(frozen=True)
class TrialRow(Removal):
    """One scored candidate; ``chunks`` is the number that it was scored on."""

    score: float
    chunks: int
    phase: str
    is_healed: bool

    def kind(self, size: tuple[float, ...], num_chunks: int) -> TrialKind:
        """The comparison of its score with that of a plan of ``size`` on ``num_chunks``.

        The kind says whether the two compete, and if not, why.

        A search also scores the dense model and candidates of other sizes, from which it learns.
        """
        if self.chunks < num_chunks:
            return "estimate"
        return "compared" if self.size == size else "of another size"


@dataclass(frozen=True)
class FrontRow(Removal):
    """One plan of a front: its score and estimated prices."""

    score: float
    prefill_s: float
    decode_s: float
    bytes_sent: float


def read_trials(content: bytes, where: str) -> tuple[TrialRow, ...]:
    """Rows of a ``trials.parquet``, in the order of evaluation; raises :class:`DataError`."""
    try:
        table = pq.read_table(io.BytesIO(content))
        columns = {name: table[name].to_pylist() for name in _NEEDED}
        columns |= {
            name: table[name].to_pylist() for name in _OPTIONAL if name in table.schema.names
        }
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{where}: no trials can be read ({reason}); search again") from None
    rows = (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )
    return tuple(
        TrialRow(
            tuple(row["prefill"]),
            tuple(row["decode"]),
            row["score"],
            row.get("chunks", 0),
            row.get("phase", ""),
            bool(row.get("healed")),
        )
        for row in rows
    )


def read_front(content: bytes, where: str) -> tuple[FrontRow, ...]:
    """Rows of a ``front.json``, best score first; raises :class:`DataError`."""
    try:
        return tuple(
            FrontRow(
                tuple(row["prefill"]),
                tuple(row["decode"]),
                float(row["score"]),
                *(float(row[price]) for price in PRICE),
            )
            for row in json.loads(content)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: is no front ({type(error).__name__}: {error}); search again with --pareto"
        ) from None


def single_removals(trials: Iterable[TrialRow]) -> Mapping[Stage, Mapping[str, float]]:
    """Scores of one unit removed from one stage alone, on all chunks; by stage and unit."""
    by_stage: dict[Stage, dict[str, float]] = {stage: {} for stage in STAGES}
    rows = list(trials)
    most = max((row.chunks for row in rows), default=0)
    for row in rows:
        if row.single and row.chunks == most and not row.is_healed:
            stage, unit = row.single
            by_stage[stage].setdefault(unit, row.score)
    return {stage: units for stage, units in by_stage.items() if units}


def read_json(content: bytes, where: str, what: str) -> Any:
    """Read a JSON object; raises :class:`DataError` if the content is none."""
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error}); give {what}") from None
    if not isinstance(parsed, dict):
        raise DataError(f"{where}: holds no JSON object; give {what}")
    return parsed
