"""The record of ``rayapp kv-select`` in ``kv.json``, read back for the report."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from rayapp.errors import DataError
from rayapp.plan import KVTransfer, PruningPlan


class _Shown(BaseModel):
    """The fields that the report shows, without the file's other ones, which list every set."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class MassRow(_Shown):
    """Shares of one block's attention (:mod:`rayapp.pruning.measures.attention_mass`)."""

    block: int
    first: float
    last: float
    new: float
    kept: float


class BlockEffect(_Shown):
    """Scores of the two sets that differ in this one block from none cut, and from all cut."""

    block: int
    cut_alone: float
    kept_alone: float


class KVStep(_Shown):
    """One set on the way of the search."""

    phase: str
    score: float
    bytes_sent: int
    reduction: float


class _Subject(_Shown):
    plan: str


class _Goal(_Shown):
    method: str
    target_reduction: float | None = None
    max_kl: float | None = None
    threshold: float | None = None


class KVFindings(_Shown):
    """A finished selection."""

    complete: bool
    subject: _Subject
    settings: _Goal
    mass: tuple[MassRow, ...]
    blocks: tuple[BlockEffect, ...] = ()
    trace: tuple[KVStep, ...] = ()
    kv_transfer: dict[int, KVTransfer] = {}
    score: float = float("nan")
    score_all_sent: float = float("nan")
    score_all_cut: float = float("nan")
    bytes_full: int = 0
    bytes_sent: int = 0
    reduction: float = float("nan")
    evaluations: int = 0

    @property
    def goal(self) -> str:
        """The goal of the selection, in words."""
        wanted = self.settings
        if wanted.target_reduction is not None:
            return f"at least {wanted.target_reduction:g}x fewer bytes"
        if wanted.max_kl is not None:
            return f"a score of at most {wanted.max_kl:g}"
        return f"PDTrim's rule at a mass of {wanted.threshold or 0.9:g}"

    def is_of(self, plan: PruningPlan) -> bool:
        """Whether this selection chose the rules of ``plan``, for the same block plan."""
        bare = plan.model_copy(update={"kv_transfer": {}})
        return (
            self.complete
            and self.subject.plan == bare.fingerprint
            and self.kv_transfer == plan.kv_transfer
        )


def read_kv(content: bytes, where: str) -> KVFindings:
    """Read a ``kv.json``; raises :class:`DataError` if it is none."""
    try:
        return KVFindings.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "file"
        raise DataError(
            f"{where}: is no record of a selection ({name}: {first['msg']}); run kv-select again"
        ) from None
