"""The life of a search: ask, score, write down, tell; then the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import transformers

from rayapp import __version__
from rayapp.errors import SearchError
from rayapp.models.hub import from_directory
from rayapp.plan import PLAN_FILE, STAGES, ModelSignature, PruningPlan
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.healing import Healing
from rayapp.pruning.candidates.space import Space
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.measures.gate_hessian import measure_gate_hessian
from rayapp.pruning.measures.influence import (
    Influence,
    distillation_set,
    measure_influence,
    pruning_set,
)
from rayapp.pruning.methods.method import Generation, SearchMethod, Setup
from rayapp.pruning.methods.table import GRADIENT_METHODS, METHODS
from rayapp.pruning.progress import ProgressCallback, SearchProgress
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.search.journal import JOURNAL_FILE, Journal, Trial, check_replayed
from rayapp.pruning.search.racing import race
from rayapp.pruning.search.trials import write_trials
from rayapp.pruning.search.written_plan import seen_by, write_plan
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.storage import Storage

VERIFIED = "verified"
"""Phase in which the best candidates of a search with races are scored on everything."""

NUM_VERIFIED = 8
"""Number of best candidates that must have scores on everything, including those that already have
(project default)."""


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        plan: The best candidate as a plan, with its provenance.
        score: Its score on the calibration set.
        dense_score: The dense model's score, under the same transfer rules.
        trials: Every candidate with its score, in order; the dense model first.
        evaluations: Candidates scored, replayed ones included.
        seconds: Wall time of this run.
    """

    plan: PruningPlan
    score: Score
    dense_score: Score
    trials: tuple[Trial, ...]
    evaluations: int
    seconds: float

    def summary(self, out: str) -> str:
        """The best plan in one line for people."""
        best = Candidate.from_plan(self.plan)
        return (
            f"{out}/{PLAN_FILE}: {best}, score {self.score.value:.5g} (dense "
            f"{self.dense_score.value:.5g}), {self.evaluations} evaluations in {self.seconds:.1f} s"
        )


def run_search(
    score: ScoreSettings,
    search: SearchSettings,
    scorer: Scorer,
    model: ModelSignature,
    *,
    environment: Mapping[str, Any] | None = None,
    on_progress: ProgressCallback | None = None,
) -> SearchResult:
    """Search, journal every generation, and write plan, journal and trials to ``search.out``.

    A search that was killed and is run again with ``resume`` ends with the same plan: the method
    gets the journal's scores in their order, and goes on from there.

    Args:
        score: Settings of the score; they go into the journal and the plan.
        search: Settings of the search.
        scorer: Gives every score.
        model: The model's signature, which the plan will name.
        environment: The environment that scores are computed in: recorded, but free to differ on
            resumption.
        on_progress: Called as candidates are scored.

    Raises:
        InputError: Sizes contradict each other or the model, ``out`` cannot be written, or it holds
            another search.
        SearchError: A score is not finite, or writing failed; the journal keeps all scores so far.
    """
    return _Search(score, search, scorer, model, environment or {}, on_progress).run()


class _Search:
    """The state of one run."""

    def __init__(
        self,
        score: ScoreSettings,
        search: SearchSettings,
        scorer: Scorer,
        model: ModelSignature,
        environment: Mapping[str, Any],
        on_progress: ProgressCallback | None,
    ) -> None:
        self._score_settings, self._settings = score, search
        self._scorer, self._model = scorer, model
        self._environment = {**environment, **_versions()}
        self._on_progress = on_progress
        self._started_s = time.monotonic()
        self._space = search.space(model.num_blocks)
        _check_method(search, self._space)
        self._storage = Storage(search.out)
        self._journal = Journal(
            self._storage,
            self._header(),
            environment=self._environment,
            resume=search.resume,
        )
        self._told: dict[Candidate, Score] = {}
        self._trials: list[Trial] = []
        self._best: tuple[float, Candidate] | None = None
        self._replayed = 0

    def run(self) -> SearchResult:
        """Run generation by generation to the end, or to an interrupt, and write the best plan.

        Raises:
            KeyboardInterrupt: The search was interrupted; the message says what it keeps.
        """
        try:
            self._run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._interrupted()) from None
        return self._finish()

    def _interrupted(self) -> str:
        """Keep the best plan so far, and say so."""
        kept = (
            f"{len(self._told)} candidates are scored and stay in "
            f"{self._storage.location}/{JOURNAL_FILE}; the same command with --resume goes on"
        )
        if self._best is None:
            return f"no plan yet; {kept}"
        return f"best so far: {self._finish(interrupted=True).summary(self._settings.out)}; {kept}"

    def _run(self) -> None:
        replay = iter(list(self._journal.generations))
        method = self._method()
        dense = Generation((DENSE,), "dense")
        self._generation(dense, next(replay, None), left=1 + method.evaluations_left)
        while (generation := method.ask()) is not None:
            scores = self._generation(generation, next(replay, None), left=method.evaluations_left)
            method.tell(scores)
        if runners_up := self._runners_up():
            verified = Generation(runners_up, VERIFIED)
            self._generation(verified, next(replay, None), left=len(runners_up))

    def _runners_up(self) -> tuple[Candidate, ...]:
        """The best estimates after races, to be scored on all chunks before a plan is chosen."""
        if not self._settings.racing:
            return ()
        scored = ((s.value, c) for c, s in self._told.items() if c in self._space)
        best = [candidate for _, candidate in sorted(scored)[:NUM_VERIFIED]]
        return tuple(sorted(c for c in best if not self._is_scored(c)))

    def _method(self) -> SearchMethod:
        settings, kind = self._settings, METHODS[self._settings.method]
        compute = self._scorer.compute
        splits_blocks = settings.pruning_set or settings.trains_pairs == "pair"
        uses_influence = kind.uses_influence or splits_blocks
        if uses_influence and self._journal.influence is None:
            self._journal.add_influence(_checked(compute.measure(measure_influence)))
        influence = self._journal.influence
        if settings.method in GRADIENT_METHODS and self._journal.gate_hessian is None:
            self._journal.add_gate_hessian(compute.measure(measure_gate_hessian))
        if settings.pruning_set:
            assert influence is not None, "measured above"
            self._space = _restricted(self._space, influence, settings.distillation_threshold)
        if settings.heal != "none":
            self._scorer.heal_with(self._healing(influence))
        return kind(
            Setup(
                space=self._space,
                evaluations=settings.evaluations,
                generation_size=settings.generation_size,
                seed=settings.seed,
                influence=influence,
                gate_hessian=self._journal.gate_hessian,
            )
        )

    def _healing(self, influence: Influence | None) -> Healing:
        """The removed blocks that get survivors, and whether maps heal what these leave."""
        settings, num_blocks, healing = self._settings, self._model.num_blocks, Healing()
        if settings.trains_pairs == "all":
            healing = Healing.of_all(num_blocks)
        elif settings.trains_pairs == "pair":
            assert influence is not None, "measured before"
            prefill, decode = (
                distillation_set(influence, stage, num_blocks, settings.distillation_threshold)
                for stage in STAGES
            )
            healing = Healing(num_blocks, prefill, decode)
        return replace(
            healing,
            num_blocks=num_blocks,
            linear=settings.heals_linearly,
            served=settings.heal_states == "served",
            first_token=self._score_settings.first_token,
        )

    def _generation(
        self, generation: Generation, replayed: Sequence[Trial] | None, *, left: int
    ) -> list[float]:
        """Scores of one generation: read from the journal, or computed and written to it."""
        candidates = generation.candidates
        number = self._number
        if replayed is None:
            scores = self._score(generation, left)
            trials = [
                Trial(c, s, number, generation.phase)
                for c, s in zip(candidates, scores, strict=True)
            ]
            self._journal.add_generation(trials)
        else:
            check_replayed(candidates, replayed)
            trials = list(replayed)
            self._replayed += len(trials)
        for trial in trials:
            self._tell(trial)
        self._report(generation.phase, 0.0, left - len(candidates))
        return [trial.score.value for trial in trials]

    def _score(self, generation: Generation, left: int) -> list[Score]:
        """Score a generation; scores from before, in this run or the resumed one, are reused."""
        new = [c for c in generation.candidates if not self._is_scored(c)]

        def report(finished: float) -> None:
            self._report(generation.phase, finished, left - finished)

        self._scorer.heal(new, lambda *units: self._report(generation.phase, 0.0, left, units))
        if self._settings.racing and generation.phase != VERIFIED:
            scores = race(self._scorer, new, self._number, on_progress=report)
        else:
            scores = self._scorer.score_many(new, on_progress=report) if new else []
        known = self._told | dict(zip(new, scores, strict=True))
        return [known[candidate] for candidate in generation.candidates]

    def _is_scored(self, candidate: Candidate) -> bool:
        """Whether the candidate's score on all chunks is known."""
        score = self._told.get(candidate)
        return score is not None and self._is_whole(score)

    def _is_whole(self, score: Score) -> bool:
        return score.num_chunks == len(self._scorer.calibration.chunks)

    @property
    def _number(self) -> int:
        """Number of the generation that comes next."""
        return self._trials[-1].generation + 1 if self._trials else 0

    def _tell(self, trial: Trial) -> None:
        self._trials.append(trial)
        self._told[trial.candidate] = trial.score
        rank = (trial.score.value, trial.candidate)
        if not self._is_whole(trial.score) or trial.candidate not in self._space:
            return
        if self._best is None or rank < self._best:
            self._best = rank

    def _report(
        self, phase: str, unfinished: float, left: float, units: tuple[int, int] | None = None
    ) -> None:
        if self._on_progress is None:
            return
        self._on_progress(
            SearchProgress(
                done=len(self._trials) - self._replayed + unfinished,
                replayed=self._replayed,
                left=max(0.0, left),
                seconds=time.monotonic() - self._started_s,
                phase=phase,
                best=str(self._best[1]) if self._best else None,
                best_score=self._best[0] if self._best else None,
                num_evaluators=self._scorer.compute.num_evaluators,
                units=units,
            )
        )

    def _finish(self, *, interrupted: bool = False) -> SearchResult:
        if self._best is None:
            raise SearchError(
                f"{len(self._told)} candidates were scored, none of them within the sizes and sets "
                "asked for; allow more evaluations, lower the threshold, or use another method"
            )
        best = self._best[1]
        seconds = time.monotonic() - self._started_s
        plan = best.plan(
            self._model,
            first_token=self._score_settings.first_token,
            kv_transfer=self._score_settings.kv_transfer,
            visual_tokens=self._score_settings.visual_tokens,
            provenance=self._provenance(seconds) | ({"interrupted": True} if interrupted else {}),
        )
        write_trials(self._storage, self._trials, self._scorer.units)
        plan = write_plan(self._storage, plan, best, self._scorer)
        return SearchResult(
            plan=plan,
            score=self._told[best],
            dense_score=self._told[DENSE],
            trials=tuple(self._trials),
            evaluations=len(self._told),
            seconds=seconds,
        )

    def _header(self) -> dict[str, Any]:
        healed = self._scorer.healed
        return {
            "settings": {**self._settings.identity, **self._score_settings.identity},
            "model": self._model.model_dump(mode="json"),
            "calibration": self._scorer.calibration.fingerprint,
            **({"heal_data": healed.context["data"]} if healed else {}),
        }

    def _provenance(self, seconds: float) -> dict[str, Any]:
        assert self._best is not None, "only called with a plan at hand"
        best, dense = self._told[self._best[1]], self._told[DENSE]
        return {
            **from_directory(self._score_settings.model).provenance,
            **{key: value for key, value in self._header().items() if key != "model"},
            "environment": self._environment,
            "num_lines": len(self._scorer.calibration.lines),
            "seen": seen_by(self._score_settings, self._settings),
            "score": best.value,
            "score_by_task": best.tasks,
            "dense_score": dense.value,
            "evaluations": len(self._told),
            "chunks_scored": sum(score.num_chunks for score in self._told.values()),
            "evaluator_seconds": round(sum(score.seconds for score in self._told.values()), 3),
            "seconds": round(seconds, 3),
        }


def _check_method(settings: SearchSettings, space: Space) -> None:
    """Let a method that needs no measurement refuse its settings before anything is written."""
    kind = METHODS[settings.method]
    if not kind.uses_influence and settings.method not in GRADIENT_METHODS:
        kind(Setup(space, settings.evaluations, settings.generation_size, settings.seed))


def _restricted(space: Space, influence: Influence, d_t: float) -> Space:
    """The candidates whose units are all in the pruning sets; sizes that do not fit are refused."""
    prefill, decode = (pruning_set(influence, stage, space.num_units, d_t) for stage in STAGES)
    return replace(space, prefill_allowed=prefill, decode_allowed=decode)


def _checked(influence: Influence) -> Influence:
    """Refuse an influence that no search can start from."""
    for name, values in asdict(influence).items():
        broken = [index for index, value in enumerate(values) if not math.isfinite(value)]
        if broken:
            raise SearchError(
                f"the dense model's influence {name}[{broken[0]}] is {values[broken[0]]}; it must "
                "be finite: check the model in its element type (float16 overflows), or use "
                "--dtype float32"
            )
    return influence


def _versions() -> dict[str, str]:
    return {
        "rayapp": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
