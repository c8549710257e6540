"""Measurements that explain a search's choice: blocks' influence, and the cost of single removals.

The influence says how similar blocks leave their input. No choice depends on this module. A search
that measured the influence has it in its journal, and one that probed single units has their scores
among its trials; for other searches both are measured once, and kept in ``sensitivity.json`` beside
the plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Literal

from pydantic import Field, ValidationError

from rayapp.plan import Stage
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.measures.influence import Influence, measure_influence
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.journal import JOURNAL_FILE, journal_influence
from rayapp.pruning.settings.objective import Objective, ObjectiveKind, ScoreBy
from rayapp.pruning.storage import Storage
from rayapp.settings import Strict

logger = logging.getLogger(__name__)

SENSITIVITY_FILE = "sensitivity.json"


class Singles(Strict):
    """Scores with one block removed from one stage, the other one dense; ordered by block.

    ``dense`` is the score with nothing removed.
    """

    objective: ObjectiveKind
    score_by: ScoreBy
    first_token_weight: float = 1.0
    dense: float
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def is_by(self, objective: Objective) -> bool:
        """Whether these are scores by an objective, whose stage and rules are the caller's."""
        mine = (self.objective, self.score_by, self.first_token_weight)
        return mine == (objective.kind, objective.score_by, objective.first_token_weight)

    def stage(self, stage: Stage) -> tuple[float, ...]:
        """The scores of one stage, ordered by block."""
        return self.prefill if stage == "prefill" else self.decode


class Sensitivity(Strict):
    """Measurements of the dense model on one calibration set, without any transfer rules."""

    version: Literal[1] = 1
    weights: str
    calibration: str
    num_lines: int = Field(ge=1)
    influence: Influence | None = None
    singles: Singles | None = None

    @classmethod
    def parse(cls, content: bytes) -> Sensitivity | None:
        """Parse a written file; None if it is damaged, or of another version."""
        try:
            return cls.model_validate_json(content)
        except ValidationError:
            return None


def keep_influence(storage: Storage, scorer: Scorer, weights: str) -> None:
    """Measure the influence for the report if neither journal nor file has it.

    The measurement costs about one evaluation, which counts in no search. An influence with a value
    that is not finite is not kept: a finished search must not fail because of it.
    """
    text = storage.read_text(JOURNAL_FILE) if storage.exists(JOURNAL_FILE) else ""
    kept = _kept(storage, scorer, weights)
    if journal_influence(text) or kept.influence:
        return
    logger.info("measuring the similarity of blocks for the report: about one evaluation")
    influence = scorer.compute.measure(measure_influence)
    if all(math.isfinite(value) for values in asdict(influence).values() for value in values):
        _write(storage, kept.model_copy(update={"influence": influence}))


def measure_sensitivity(
    storage: Storage,
    scorer: Scorer,
    *,
    weights: str,
    num_blocks: int,
    on_progress: Callable[[float, int], None] | None = None,
) -> Sensitivity:
    """Measure the influence and the score of every single removal from each stage, and keep both.

    Measurements that the file has of the same model, lines and objective are not repeated. The cost
    is about ``2 * num_blocks + 2`` evaluations.

    Args:
        storage: The plan's directory.
        scorer: A scorer without transfer rules in its objective, and without healing.
        weights: Fingerprint of the model's weights.
        num_blocks: Number of the model's blocks.
        on_progress: Called with the number of evaluations done, and of all of them.

    Raises:
        SearchError: A score is not finite, or writing failed.
    """
    keep_influence(storage, scorer, weights)
    kept = _kept(storage, scorer, weights)
    objective = scorer.objective
    known = kept.singles
    if known and known.is_by(objective):
        return kept
    prefill = [Candidate(prefill=_block(block)) for block in range(num_blocks)]
    decode = [Candidate(decode=_block(block)) for block in range(num_blocks)]
    candidates = [DENSE, *prefill, *decode]

    def report(finished: float) -> None:
        if on_progress:
            on_progress(finished, len(candidates))

    dense, *values = [score.value for score in scorer.score_many(candidates, on_progress=report)]
    singles = Singles(
        objective=objective.kind,
        score_by=objective.score_by,
        first_token_weight=objective.first_token_weight,
        dense=dense,
        prefill=tuple(values[:num_blocks]),
        decode=tuple(values[num_blocks:]),
    )
    measured = kept.model_copy(update={"singles": singles})
    _write(storage, measured)
    return measured


def _block(block: int) -> tuple[int, int]:
    return 2 * block, 2 * block + 1


def _kept(storage: Storage, scorer: Scorer, weights: str) -> Sensitivity:
    """The file's measurements if they are of this model and these lines; otherwise empty ones."""
    empty = Sensitivity(
        weights=weights,
        calibration=scorer.calibration.fingerprint,
        num_lines=len(scorer.calibration.lines),
    )
    there = storage.exists(SENSITIVITY_FILE)
    stored = Sensitivity.parse(storage.read_bytes(SENSITIVITY_FILE)) if there else None
    same = stored and (stored.weights, stored.calibration) == (empty.weights, empty.calibration)
    return stored if stored and same else empty


def _write(storage: Storage, measured: Sensitivity) -> None:
    storage.write_bytes(SENSITIVITY_FILE, (measured.model_dump_json(indent=1) + "\n").encode())
