"""Select the KV of a block plan that travels: measure, choose, and write it into the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedConfig

from rayapp.data.seen import Seen
from rayapp.errors import InputError, PlanError
from rayapp.plan import HEALED_FILE, KEY_GROUP, PLAN_FILE, KVTransfer, PruningPlan
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.healing.healed_units import units_of_plan
from rayapp.pruning.kv_choice.bytes import KVBytes
from rayapp.pruning.kv_choice.cuts import every_cut, first_and_last
from rayapp.pruning.kv_choice.elimination import NUM_HALVINGS, Elimination, Goal, Step
from rayapp.pruning.kv_choice.levels import KVLevels, KVSet, moved
from rayapp.pruning.kv_choice.record import KV_FILE, KVRecord
from rayapp.pruning.kv_choice.result import BlockChoice, KVSelection, plain_rules
from rayapp.pruning.kv_choice.settings import THRESHOLD, KVSelectSettings, unusual_scores
from rayapp.pruning.measures.attention_mass import BlockMass, measure_attention_mass
from rayapp.pruning.progress import ProgressCallback, SearchProgress
from rayapp.pruning.scorer import Scorer
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.storage import Storage


def check_out(settings: KVSelectSettings, plan: PruningPlan) -> str:
    """The directory of the result; raises :class:`InputError` if another plan lies there."""
    home = str(plan.directory) if plan.directory else "."
    out = settings.out or home
    storage = Storage(out)
    if Storage(home).location != storage.location and storage.exists(PLAN_FILE):
        raise InputError(
            f"{out}/{PLAN_FILE}: a plan already lies here; give another --out, or leave it out to "
            "write into the directory of --plan"
        )
    return out


def select_kv(
    score: ScoreSettings,
    settings: KVSelectSettings,
    plan: PruningPlan,
    scorer: Scorer,
    config: PreTrainedConfig,
    *,
    on_progress: ProgressCallback | None = None,
) -> KVSelection:
    """Choose transfer rules, and write the plan and ``kv.json``; the plan's modes stay as they are.

    Args:
        score: Settings of the score; they go into the records.
        settings: Settings of the selection.
        plan: The plan as it was read; its own transfer rules are replaced (``kv.json`` keeps them).
        scorer: A scorer without transfer rules in its objective.
        config: The model's configuration.
        on_progress: Called as sets are scored.

    Raises:
        InputError: No choice meets the goal: the message says which goal can be reached, and the
            scores stay in ``kv.json``. Or the output cannot be written.
        PlanError: Decode attends in no block, so nothing travels.
    """
    return _Selection(score, settings, plan, scorer, config, on_progress).run()


class _Selection:
    """The state of one run."""

    def __init__(
        self,
        score: ScoreSettings,
        settings: KVSelectSettings,
        plan: PruningPlan,
        scorer: Scorer,
        config: PreTrainedConfig,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._settings, self._plan, self._scorer = settings, plan, scorer
        self._score_settings = score
        self._on_progress = on_progress
        self._started_s = time.monotonic()
        self._best: tuple[tuple[float, ...], KVSet] | None = None
        self._bare = plan.model_copy(update={"kv_transfer": {}})
        self._base = Candidate.from_plan(self._bare)
        self._bytes, self._levels = self._choices(config)
        self._goal = self._checked_goal()
        self._check_evaluations()
        self._storage = Storage(check_out(settings, plan))
        if plan.healed:
            scorer.heal_as(units_of_plan(plan))
        self._record = KVRecord(self._storage, self._subject())

    def run(self) -> KVSelection:
        """Measure, choose and write."""
        rule = self._levels.rules(self._levels.smallest)[self._levels.blocks[0]]
        cut = rule.model_copy(update={"encoding": "model"})
        scorer = self._scorer
        masses = scorer.compute.measure(
            measure_attention_mass,
            self._base,
            cut,
            scorer.healing,
            units=scorer.units(self._base),
        )
        self._record.write(
            settings=self._settings.identity(self._score_settings),
            previous_kv_transfer=plain_rules(self._plan.kv_transfer),
            mass=[{**asdict(mass), "kept": mass.kept} for mass in masses],
            bytes_full=self._bytes.full,
        )
        self._score(self._singles(), "single blocks")
        self._check_score()
        chosen, steps = self._by_mass(masses) if self._is_by_mass else self._by_elimination()
        return self._write(self._result(chosen, steps, masses))

    @property
    def _is_by_mass(self) -> bool:
        return self._settings.method == "mass"

    def _choices(self, config: PreTrainedConfig) -> tuple[KVBytes, KVLevels]:
        assert self._plan.model is not None, "a plan that was checked against its model names it"
        blocks = [
            b for b in range(self._plan.model.num_blocks) if self._plan.mode("decode", b).attends
        ]
        if not blocks:
            raise PlanError(
                "decode attends in no block of this plan, so no KV travels; there is nothing to "
                "select"
            )
        lines = self._scorer.calibration.lines
        num_bytes = KVBytes(config, self._bare, [line.run_prompt for line in lines])
        settings = self._settings
        # The threshold rule knows one cut only.
        cuts = (
            first_and_last(settings.first, settings.last[:1])
            if self._is_by_mass
            else every_cut(settings.first, settings.last)
        )
        return num_bytes, KVLevels.of(blocks, num_bytes, cuts=cuts, smallest=settings.encoding)

    def _checked_goal(self) -> Goal:
        wanted = self._settings.target_reduction
        if wanted is None:
            return Goal(max_score=self._settings.max_kl)
        goal = Goal(max_bytes=math.floor(self._bytes.full / wanted))
        least = self._sent(self._levels.smallest)
        if least > self._bytes.full / wanted:
            cut = self._levels.levels[0][0]
            raise InputError(
                f"--target-reduction {wanted:g} cannot be met: with every block cut to "
                f"{cut.first or 0:g} first and {cut.last or 0:g} last entries in "
                f"--encoding {self._settings.encoding}, these prompts reach "
                f"{self._bytes.full / least:.3g}x; lower it, allow a smaller --encoding or --last, "
                "or remove more blocks from decode"
            )
        return goal

    def _check_score(self) -> None:
        wanted, reached = self._settings.max_kl, self._score_of(self._levels.full)
        if wanted is not None and reached > wanted:
            raise InputError(
                f"--max-kl {wanted:g} cannot be met: the block plan alone scores {reached:.4g} "
                f"with all KV sent; raise it, or remove fewer blocks ({self._storage.location}/"
                f"{KV_FILE} keeps what was scored)"
            )

    def _subject(self) -> dict[str, Any]:
        return {
            "plan": self._bare.fingerprint,
            "weights": self._plan.model and self._plan.model.weights_fingerprint,
            "calibration": self._scorer.calibration.fingerprint,
            "score_by": self._score_settings.score_by,
            "key_group": KEY_GROUP,
            **unusual_scores(self._score_settings),
        }

    def _sent(self, chosen: KVSet) -> int:
        return self._bytes.sent(self._levels.rules(chosen))

    def _candidate(self, chosen: KVSet) -> Candidate:
        return self._base.with_kv(self._levels.rules(chosen))

    def _score_of(self, chosen: KVSet) -> float:
        return self._record.trials[self._candidate(chosen).kv].value

    def _score(self, sets: Sequence[KVSet], phase: str) -> list[float]:
        """Scores of sets; sets with a known score are not scored again."""
        candidates = [self._candidate(chosen) for chosen in sets]
        new = sorted({c for c in candidates if c.kv not in self._record.trials})
        before = len(self._record.trials)

        def report(finished: float) -> None:
            self._report(phase, before + finished, len(new) - finished)

        scores: list[Score] = self._scorer.score_many(new, on_progress=report) if new else []
        for candidate, score in zip(new, scores, strict=True):
            self._record.add(candidate, score)
        if new:
            self._record.write()
        values = [self._record.trials[candidate.kv].value for candidate in candidates]
        for chosen, value in zip(sets, values, strict=True):
            key = self._goal.key(value, self._sent(chosen))
            self._best = min(self._best or (key, chosen), (key, chosen))
        return values

    def _report(self, phase: str, known: float, left: float) -> None:
        if self._on_progress is None:
            return
        best = self._best and self._best[1]
        self._on_progress(
            SearchProgress(
                done=known - self._record.num_replayed,
                replayed=self._record.num_replayed,
                left=max(0.0, left),
                seconds=time.monotonic() - self._started_s,
                phase=phase,
                best=f"{self._bytes.full / self._sent(best):.2f}x" if best else None,
                best_score=self._score_of(best) if best else None,
                num_evaluators=self._scorer.compute.num_evaluators,
            )
        )

    def _cut_alone(self, index: int) -> KVSet:
        return moved(self._levels.full, index, 0)

    def _kept_alone(self, index: int) -> KVSet:
        return moved(self._levels.smallest, index, self._levels.full[index])

    def _singles(self) -> list[KVSet]:
        """The sets with nothing cut, with everything cut, and both with one block the other way."""
        indices = range(len(self._levels.blocks))
        alone = [f(index) for index in indices for f in (self._cut_alone, self._kept_alone)]
        return [self._levels.full, self._levels.smallest, *alone]

    def _by_elimination(self) -> tuple[KVSet, list[Step]]:
        search = Elimination(
            self._levels,
            self._goal,
            self._score,
            self._sent,
            generation_size=self._settings.generation_size,
            max_sets=self._max_sets(),
            seed=self._settings.seed,
        )
        return search.run(), search.steps

    def _max_sets(self) -> int | None:
        """Sets that elimination may score; a block that alone is cut only informs the report."""
        wanted, singles = self._settings.evaluations, len(set(self._singles()))
        if wanted is None:
            return None
        return wanted - singles + len(self._levels.blocks) + 2

    def _check_evaluations(self) -> None:
        wanted, least = self._settings.evaluations, len(self._singles()) + NUM_HALVINGS
        least += max(map(len, self._levels.levels))
        if wanted is not None and wanted < least:
            raise InputError(
                f"--evaluations {wanted} is too few: {len(self._levels.blocks)} blocks are cut and "
                f"kept one by one, every level is tried in all of them, and the choice needs "
                f"{NUM_HALVINGS} sets more; give at least {least}"
            )

    def _by_mass(self, masses: Sequence[BlockMass]) -> tuple[KVSet, list[Step]]:
        """PDTrim's rule: every block whose mass reaches the threshold is cut, the others are not.

        Cut and uncut blocks both have the smallest encoding allowed. For a byte budget, the
        threshold is the highest one that meets it.
        """
        uncut = [_uncut(levels, self._settings.encoding) for levels in self._levels.levels]
        kept = [mass.kept for mass in masses]

        def at(threshold: float) -> KVSet:
            return tuple(
                0 if share >= threshold else level for share, level in zip(kept, uncut, strict=True)
            )

        threshold = self._settings.threshold
        if self._goal.max_bytes is not None:
            fitting = (t for t in sorted(kept, reverse=True) if self._fits(at(t)))
            chosen = at(math.inf) if self._fits(at(math.inf)) else at(next(fitting))
        else:
            chosen = at(THRESHOLD if threshold is None else threshold)
        score = self._score([chosen], "mass")[0]
        return chosen, [Step("mass", chosen, score, self._sent(chosen))]

    def _fits(self, chosen: KVSet) -> bool:
        return self._goal.max_bytes is None or self._sent(chosen) <= self._goal.max_bytes

    def _result(
        self, chosen: KVSet, steps: Sequence[Step], masses: Sequence[BlockMass]
    ) -> KVSelection:
        rules = self._levels.rules(chosen)
        blocks = tuple(
            BlockChoice(
                block,
                masses[index],
                self._score_of(self._cut_alone(index)),
                self._score_of(self._kept_alone(index)),
                rules[block],
            )
            for index, block in enumerate(self._levels.blocks)
        )
        kept = self._candidate(chosen).transfers({})
        return KVSelection(
            plan=self._plan.model_copy(update={"kv_transfer": dict(kept)}),
            blocks=blocks,
            score=self._score_of(chosen),
            base_score=self._score_of(self._levels.full),
            cut_score=self._score_of(self._levels.smallest),
            bytes_full=self._bytes.full,
            bytes_sent=self._sent(chosen),
            steps=tuple(steps),
            evaluations=len(self._record.trials),
            seconds=time.monotonic() - self._started_s,
        )

    def _write(self, selection: KVSelection) -> KVSelection:
        """Write ``kv.json`` first, then healed tensors, and last the plan, which needs them."""
        trace = [
            {
                "phase": step.phase,
                "kv": self._candidate(step.chosen).kv_labels(),
                "score": step.score,
                "bytes_sent": step.num_bytes,
                "reduction": self._bytes.full / step.num_bytes,
            }
            for step in selection.steps
        ]
        self._record.write(complete=True, trace=trace, **selection.record())
        summary = {
            "settings": self._settings.identity(self._score_settings),
            "calibration": self._scorer.calibration.fingerprint,
            "num_lines": len(self._scorer.calibration.lines),
            "seen": Seen.of([self._score_settings.calibration]).model_dump(mode="json"),
            **{key: value for key, value in selection.record().items() if key != "blocks"},
        }
        provenance = {**self._plan.provenance, "kv_select": summary}
        plan = selection.plan.model_copy(update={"provenance": provenance})
        if self._plan.healed and self._plan.directory and self._settings.out:
            tensors = (self._plan.directory / HEALED_FILE).read_bytes()
            self._storage.write_bytes(HEALED_FILE, tensors)
        self._storage.write_bytes(PLAN_FILE, plan.dumps().encode())
        return replace(selection, plan=plan)


def _uncut(levels: Sequence[KVTransfer], encoding: str) -> int:
    """The level that sends all in an encoding; the last level if that encoding saves nothing."""
    uncut = [n for n, rule in enumerate(levels) if rule.keeps_all and rule.encoding == encoding]
    return uncut[0] if uncut else len(levels) - 1
