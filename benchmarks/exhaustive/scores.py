"""Scores of one trial's calibration set; every score is computed once, however often it is used."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

from lines.drawn import drawn_lines

from rayapp.models.loading import LoadedModel
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.measures.gate_hessian import GateHessian
from rayapp.pruning.measures.influence import Influence
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective


@dataclass
class ScoreTable:
    """All known scores of one calibration set, and the measures that methods may use."""

    scorer: Scorer
    influence: Influence
    gate_hessian: GateHessian
    scores: dict[Candidate, float] = field(default_factory=dict)

    def lookup(self, candidates: Sequence[Candidate]) -> list[float]:
        """Scores of candidates; missing ones are computed."""
        new = [candidate for candidate in candidates if candidate not in self.scores]
        if new:
            values = self.scorer.score_many(new)
            self.scores.update(zip(new, (score.value for score in values), strict=True))
        return [self.scores[candidate] for candidate in candidates]


def trial_evaluator(loaded: LoadedModel, trial: int, arguments: Namespace) -> Evaluator:
    """An evaluator on the calibration set that a trial draws."""
    lines = drawn_lines(
        loaded.tokenizer,
        "calibration",
        arguments.calibration_per_task,
        arguments.seed + trial,
        length=arguments.length,
    )
    return Evaluator(loaded.model, lines, Objective())


def scorer_of(evaluator: Evaluator) -> Scorer:
    """A scorer in this process."""
    lines: Calibration = evaluator.calibration
    return Scorer(lines, Objective(), LocalCompute(evaluator), weights="dense")
