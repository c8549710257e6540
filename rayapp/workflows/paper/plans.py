"""The plans of a paper's rows: searched, made by a rule, chosen from another row's, or given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rayapp.errors import InputError
from rayapp.evaluation.paper.count import search_evaluations
from rayapp.evaluation.paper.presets import cheapest_blocks, encoded
from rayapp.evaluation.paper.rows import (
    DENSE,
    Row,
    fit_settings,
    left_out,
    row_sizes,
    score_settings,
    search_settings,
)
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.plan import PLAN_FILE, ModelSignature, PruningPlan
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.preparation import Prepared, prepare
from rayapp.pruning.progress import ProgressCallback
from rayapp.pruning.search.journal import JOURNAL_FILE
from rayapp.pruning.search.sensitivity import Sensitivity
from rayapp.pruning.settings.search import SearchSettings
from rayapp.workflows.heal import heal_plan
from rayapp.workflows.kv_select import kv_select
from rayapp.workflows.paper.narrower import narrower
from rayapp.workflows.prune import prune

logger = logging.getLogger(__name__)

ROWS_DIRECTORY = "rows"

Planned = tuple[PruningPlan, str | None]
"""A row's plan, and the row whose plan and numbers it shares."""


class PaperPlans:
    """Makes the plans of all rows in directories of their own; none is made twice.

    Args:
        settings: The settings of the reproduction.
        watch: Opens a progress display of a search.
        signature: The model's signature.
        rows: The rows, in the order of the tables.

    Attributes:
        left_out: Reasons why rows have no plan, by name.
        bases: Rows whose plan another row rests on, by its name.
        sizes: Blocks that prefill and decode remove, by row.

    Raises:
        InputError: Sizes contradict the model, or files cannot be used.
    """

    def __init__(
        self,
        settings: ReproduceSettings,
        watch: Callable[[], AbstractContextManager[ProgressCallback]],
        signature: ModelSignature,
        rows: Sequence[Row],
    ) -> None:
        self._settings, self._watch = settings, watch
        self._signature, self._rows = signature, rows
        self._out = Path(settings.out) / ROWS_DIRECTORY
        self.left_out: dict[str, str] = {}
        self.bases: dict[str, str] = {}
        self.sizes = {row.name: row_sizes(row, settings, signature.num_blocks) for row in rows}
        self._prepared: Prepared | None = None
        self._maps: Sequence[Sensitivity] = ()
        self._check_searches()

    def path(self, row: Row) -> Path:
        """The directory of a row."""
        return self._out / row.name

    def search_tokens(self, row: Row) -> int:
        """Tokens that the search for a row's plan runs at most; 0 if there is none left."""
        if row.search is None or (self.path(row) / PLAN_FILE).is_file():
            return 0
        assert self._prepared is not None, "a row that is searched was checked"
        evaluations = search_evaluations(
            self._wanted(row, resume=False), self._signature.num_blocks
        )
        lines = self._prepared.calibration.lines
        return evaluations * sum(len(line.prompt) + len(line.continuation) for line in lines)

    def _wanted(self, row: Row, *, resume: bool) -> SearchSettings:
        sizes = self.sizes[row.name]
        return search_settings(row, self._settings, sizes, self.path(row), resume=resume)

    def _check_searches(self) -> None:
        """Check the sizes of every search, and the files of searches with healing and without."""
        by_files: dict[bool, SearchSettings] = {}
        for row in self._rows:
            reason = left_out(row, self._settings, self.sizes[row.name])
            if reason:
                self._leave_out(row, reason)
            elif row.search is not None:
                wanted = self._wanted(row, resume=False)
                wanted.check(self._signature.num_blocks)
                by_files[row.healed] = wanted
        for wanted in by_files.values():
            score, compute = self._settings.score(), self._settings.compute()
            self._prepared = prepare(score, compute, wanted)

    def _leave_out(self, row: Row, reason: str) -> None:
        self.left_out[row.name] = reason
        logger.warning("%s is left out: %s", row.title, reason)

    def plans(self, maps: Sequence[Sensitivity] = ()) -> dict[str, Planned]:
        """The plans by row; rows without one are named in ``left_out``.

        ``maps`` are the costs of every block alone, for the rows that follow them.
        """
        plans: dict[str, Planned] = {}
        self._maps = maps
        for row in self._rows:
            if row.name in self.left_out:
                continue
            base = next((name for name in reversed(row.after) if name in plans), None)
            if row.after and base is None:
                self._leave_out(row, f"it needs one of the rows {', '.join(row.after)}")
                continue
            if base is not None:
                self.bases[row.name] = base
            try:
                plans[row.name] = self._planned(row, base, plans)
            except InputError as error:
                # The error concerns this row alone: files and sizes were checked before.
                self._leave_out(row, str(error))
        return plans

    def _planned(self, row: Row, base: str | None, plans: dict[str, Planned]) -> Planned:
        if row is DENSE:
            return self._kept(row, PruningPlan()), None
        if row.made is not None:
            return self._kept(row, row.made(self._signature)), None
        if row.mapped:
            plan = cheapest_blocks(row, self._signature, self._maps)
            return self._kept(row, plan), None
        if row.plan:
            return self._given(row), None
        if row.search is not None:
            return self._searched(row), None
        if row.narrows:
            return self._narrower(row), None
        assert base is not None, "all other rows rest on one"
        if row.encoding:
            return self._kept(row, encoded(row.encoding, self._signature, plans[base][0])), None
        if row.fitted:
            return self._fitted(row, plans[base][0]), None
        if row.name == "unified":
            return self._kept(row, plans[base][0]), base
        return self._kv_selected(row, base), None

    def _kept(self, row: Row, plan: PruningPlan) -> PruningPlan:
        plan.save(self.path(row))
        return PruningPlan.load(self.path(row))

    def _given(self, row: Row) -> PruningPlan:
        plan = PruningPlan.load(row.plan)
        plan.check_model(self._signature)
        self.path(row).mkdir(parents=True, exist_ok=True)
        return plan

    def _searched(self, row: Row) -> PruningPlan:
        path = self.path(row)
        if not (path / PLAN_FILE).is_file():
            logger.info("%s: searching", row.title)
            wanted = self._wanted(row, resume=(path / JOURNAL_FILE).is_file())
            with self._watch() as report:
                score, compute = score_settings(row, self._settings), self._settings.compute()
                prune(score, compute, wanted, on_progress=report)
        return PruningPlan.load(path)

    def _fitted(self, row: Row, plan: PruningPlan) -> PruningPlan:
        path = self.path(row)
        if not (path / PLAN_FILE).is_file():
            logger.info("%s: solving its maps", row.title)
            score, compute = score_settings(row, self._settings), self._settings.compute()
            heal_plan(score, compute, fit_settings(row, self._settings, path), plan)
        return PruningPlan.load(path)

    def _narrower(self, row: Row) -> PruningPlan:
        path = self.path(row)
        if not (path / PLAN_FILE).is_file():
            logger.info("%s: choosing channels", row.title)
            score, compute = score_settings(row, self._settings), self._settings.compute()
            narrower(score, compute, path, int(self.sizes[row.name][0]))
        return PruningPlan.load(path)

    def _kv_selected(self, row: Row, base: str) -> PruningPlan:
        path, settings = self.path(row), self._settings
        if not (path / PLAN_FILE).is_file():
            logger.info("%s: selecting KV", row.title)
            wanted = KVSelectSettings.checked(
                plan=str(self._out / base),
                out=str(path),
                target_reduction=settings.target_reduction,
                seed=settings.seed,
            )
            with self._watch() as report:
                kv_select(settings.score(), settings.compute(), wanted, on_progress=report)
        return PruningPlan.load(path)
