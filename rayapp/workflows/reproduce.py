"""A paper's tables for a user's checkpoint: search every row's plan, then measure every plan.

The output directory keeps all results: a plan directory per row with its search and its outcomes
per example, and the tables, written anew after every row. A second run with ``resume`` does not
compute existing results again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rayapp.errors import DataError, InputError
from rayapp.evaluation.data import EvaluationData, read_data
from rayapp.evaluation.evaluate import num_threads, piece_identity, placed
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.paper.outcome import (
    ROW_FILE,
    RowOutcome,
    SearchCost,
    WeightBytes,
    kind_of_data,
    measure_data,
)
from rayapp.evaluation.paper.overlap import checked_overlaps
from rayapp.evaluation.paper.rows import DENSE, Row, chosen_rows, left_out, search_settings
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.paper.tables import Paper, caveats, definitions, mean_accuracy
from rayapp.evaluation.pieces.compute import PieceCompute, Subject
from rayapp.evaluation.pieces.journal import Journal
from rayapp.evaluation.pieces.measurer import Measurer
from rayapp.evaluation.progress import ProgressCallback as EvaluationProgress
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.sides import Sides
from rayapp.models.blocks import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import from_directory, locate
from rayapp.models.loading import load_tokenizer
from rayapp.plan import PLAN_FILE, PruningPlan, is_outdated, renewal_hint
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.preparation import prepare
from rayapp.pruning.progress import ProgressCallback as SearchProgress
from rayapp.pruning.search.journal import JOURNAL_FILE
from rayapp.pruning.settings.search import SearchSettings
from rayapp.workflows.evaluate import place_of
from rayapp.workflows.kv_select import kv_select
from rayapp.workflows.prune import prune

logger = logging.getLogger(__name__)

SUBJECT_FILE = "reproduction.json"
ROWS_DIRECTORY = "rows"
TABLES_DIRECTORY = "tables"


@dataclass(frozen=True)
class Watch:
    """Progress displays of searches and measurements, which run one at a time."""

    search: Callable[[], AbstractContextManager[SearchProgress]]
    evaluation: Callable[[], AbstractContextManager[EvaluationProgress]]


def reproduce(settings: ReproduceSettings, watch: Watch) -> Paper:
    """Make the tables; all inputs are checked before the first search runs.

    Raises:
        InputError: Model, data, sizes or directory cannot be used, or calibration prompts stand in
            the evaluation data.
        ClusterError: The cluster of the searches cannot be used.
        SearchError: A search cannot go on; finished results are kept.
    """
    directory = locate(settings.model, settings.revision).directory
    there = settings.model_copy(update={"model": str(directory), "revision": None})
    return _Reproduction(there, watch).run()


@dataclass
class _Reproduction:
    """The state of one run of :func:`reproduce`."""

    settings: ReproduceSettings
    watch: Watch
    left_out: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.settings
        checkpoint = Checkpoint(settings.model)
        self._signature = checkpoint.signature()
        self._sizes = settings.sizes(self._signature.num_blocks)
        self._rows = chosen_rows(settings)
        self._data = _read(settings, checkpoint)
        self._overlaps = checked_overlaps(settings)
        self._out = Path(settings.out)
        self._check_searches()
        self._claim_directory()

    def run(self) -> Paper:
        """Run all searches before all measurements: model and evaluators do not share memory."""
        plans = self._plans()
        subject = Subject(Path(self.settings.model), self.settings.evaluation())
        place = place_of(self.settings.model_settings(), self.settings.spread())
        with num_threads(self.settings.threads), place.open(subject) as compute:
            measured: list[RowOutcome] = []
            for row in self._rows:
                if row.name in plans:
                    measured.append(self._measured(row, plans, compute, measured))
                    paper = self._paper(measured, compute)
                    paper.write(self._out / TABLES_DIRECTORY)
                    logger.info("%s: done%s", row.title, mean_accuracy(paper, row.name))
        return paper

    def _check_searches(self) -> None:
        """Check the sizes of every search, and the files of searches with healing and without."""
        by_files: dict[bool, SearchSettings] = {}
        for row in self._rows:
            reason = left_out(row, self.settings, self._sizes)
            if reason:
                self._leave_out(row, reason)
            elif row.search is not None:
                path = self._path(row)
                wanted = search_settings(row, self.settings, self._sizes, path, resume=False)
                wanted.check(self._signature.num_blocks)
                by_files[row.healed] = wanted
        for wanted in by_files.values():
            prepare(self.settings.score(), self.settings.compute(), wanted)

    def _path(self, row: Row) -> Path:
        return self._out / ROWS_DIRECTORY / row.name

    def _leave_out(self, row: Row, reason: str) -> None:
        self.left_out[row.name] = reason
        logger.warning("%s is left out: %s", row.title, reason)

    def _claim_directory(self) -> None:
        """Record the subject of the rows, and refuse a directory with another subject."""
        file = self._out / SUBJECT_FILE
        subject = self._subject()
        if file.is_file():
            if not self.settings.resume:
                raise InputError(
                    f"{file}: a reproduction was already begun here; go on with --resume, or give "
                    "another --out"
                )
            _check_subject(file, subject)
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(subject, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{self._out}: cannot be written ({error.strerror}); give another --out"
            ) from None

    def _subject(self) -> dict[str, Any]:
        """The settings and weights that all rows share; journals of searches check the rest."""
        settings = self.settings.identity
        return {"settings": settings, "weights": self._signature.weights_fingerprint}

    def _plans(self) -> dict[str, tuple[PruningPlan, str | None]]:
        """Plans by row, with the row from which a unified row takes its plan."""
        plans: dict[str, tuple[PruningPlan, str | None]] = {}
        for row in self._rows:
            if row.name in self.left_out:
                continue
            if row is DENSE:
                plans[row.name] = (self._kept(row, PruningPlan()), None)
                continue
            base = next((name for name in reversed(row.after) if name in plans), None)
            if row.after and base is None:
                self._leave_out(row, f"it needs one of the rows {', '.join(row.after)}")
                continue
            if base is not None:
                self.bases[row.name] = base
            try:
                if row.search is not None:
                    plans[row.name] = (self._searched(row), None)
                elif row.name == "unified" and base is not None:
                    plans[row.name] = (self._kept(row, plans[base][0]), base)
                elif base is not None:
                    plans[row.name] = (self._kv_selected(row, base), None)
            except InputError as error:
                # The error concerns this row alone: files and sizes were checked before.
                self._leave_out(row, str(error))
        return plans

    def _kept(self, row: Row, plan: PruningPlan) -> PruningPlan:
        plan.save(self._path(row))
        return PruningPlan.load(self._path(row))

    def _searched(self, row: Row) -> PruningPlan:
        path = self._path(row)
        resume = (path / JOURNAL_FILE).is_file()
        wanted = search_settings(row, self.settings, self._sizes, path, resume=resume)
        if not (path / PLAN_FILE).is_file():
            logger.info("%s: searching", row.title)
            with self.watch.search() as report:
                score, compute = self.settings.score(), self.settings.compute()
                prune(score, compute, wanted, on_progress=report)
        return PruningPlan.load(path)

    def _kv_selected(self, row: Row, base: str) -> PruningPlan:
        path, settings = self._path(row), self.settings
        if not (path / PLAN_FILE).is_file():
            logger.info("%s: selecting KV", row.title)
            wanted = KVSelectSettings.checked(
                plan=str(self._out / ROWS_DIRECTORY / base),
                out=str(path),
                target_reduction=settings.target_reduction,
                seed=settings.seed,
            )
            with self.watch.search() as report:
                kv_select(settings.score(), settings.compute(), wanted, on_progress=report)
        return PruningPlan.load(path)

    def _measured(
        self,
        row: Row,
        plans: Mapping[str, tuple[PruningPlan, str | None]],
        compute: PieceCompute,
        before: list[RowOutcome],
    ) -> RowOutcome:
        """Measure a row's outcome; results in its file are not measured again."""
        path, (plan, base) = self._path(row), plans[row.name]
        shared = next((earlier for earlier in before if earlier.name == base), None)
        if shared is not None:
            outcome = shared.model_copy(update={"name": row.name, "base": base, "search": None})
        else:
            outcome = RowOutcome.load(path) or _begun(row, plan)
            if outcome.plan != plan.fingerprint:
                raise InputError(
                    f"{path}: outcomes are of plan {outcome.plan}, but the plan is "
                    f"{plan.fingerprint}; delete the row's directory to make it again"
                )
            with self.watch.evaluation() as progress:
                compute.use(plan)
                weights, wanted = self._signature.weights_fingerprint, self.settings.evaluation()
                journal = Journal(path / ROW_FILE, piece_identity(compute, weights, plan, wanted))
                measurer = Measurer(compute, plan, wanted, progress, journal)
                outcome = self._with_data(outcome, measurer, path)
                journal.close()
                outcome = self._with_speed(outcome, measurer, compute)
        outcome.save(path)  # The file keeps data sets of earlier runs.
        data = {name: outcome.data[name] for name in self._data}
        return outcome.model_copy(update={"data": data})

    def _with_data(self, row_outcome: RowOutcome, measurer: Measurer, path: Path) -> RowOutcome:
        for name, data in self._data.items():
            known = row_outcome.data.get(name)
            if known is None:
                outcome = measure_data(measurer, name, data)
                row_outcome = row_outcome.model_copy(
                    update={"data": {**row_outcome.data, name: outcome}}
                )
                row_outcome.save(path)
            elif known.sha256 != data.files[0].sha256:
                raise InputError(
                    f"{path}: {name} was measured on another file than {self.settings.data[name]}; "
                    "give it another name, or the same file"
                )
        return row_outcome

    def _with_speed(
        self, outcome: RowOutcome, measurer: Measurer, compute: PieceCompute
    ) -> RowOutcome:
        settings = self.settings.evaluation()
        timings: tuple[LatencyResult, ...] = outcome.latency
        if settings.num_runs and not timings:
            timings = tuple(
                measurer.latency(size, length)
                for length in settings.timed_lengths
                for size in settings.batch_sizes
            )
        length = [settings.num_prompt_tokens]
        sent = [
            compute.measure(Sides.prompt_bytes, length, side).bytes_sent
            for side in ("dense", "plan")
        ]
        update = {
            "latency": timings,
            "timed_bytes": (sent[0], sent[1]),
            "weights": compute.measure(_weight_bytes),
        }
        return outcome.model_copy(update=update)

    def _paper(self, measured: list[RowOutcome], compute: PieceCompute) -> Paper:
        settings = self.settings
        device, dtype = compute.measure(placed)
        warned = caveats(settings, measured, dtype)
        warned += [
            f"{name}: {count:,} prompts stand in what plans were chosen or trained on"
            for name, count in self._overlaps.items()
        ]
        machine = this_machine(device=device, num_threads=settings.threads)
        caption = from_directory(settings.model).caption
        notes = [f"the model: {caption}"] if caption else []
        notes += definitions(settings, self._rows, self.bases)
        return Paper(settings, tuple(measured), dict(self.left_out), machine, notes, warned)


def _read(settings: ReproduceSettings, checkpoint: Checkpoint) -> dict[str, EvaluationData]:
    """Read all data sets, and check that every one has a single kind of example."""
    tokenizer = load_tokenizer(checkpoint.path)
    data_sets = {}
    for name, path in settings.data.items():
        data = read_data(
            [path],
            tokenizer,
            max_positions=text_config(checkpoint.config).max_position_embeddings,
            settings=settings.evaluation(),
        )
        kinds = [kind for kind in ("completions", "choices", "texts") if getattr(data, kind)]
        if kinds != [kind_of_data(data)]:
            raise DataError(
                f"{path}: holds {' and '.join(kinds)}; a data set has one metric, so give each "
                "kind a file of its own"
            )
        data_sets[name] = data
    return data_sets


def _check_subject(file: Path, wanted: Mapping[str, Any]) -> None:
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        old, new = (
            {**record["settings"], "weights": record["weights"]} for record in (there, wanted)
        )
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file}: is not what a reproduction writes; give another --out") from None
    differing = [f"{k}: was {old.get(k)!r}, now {new[k]!r}" for k in new if old.get(k) != new[k]]
    if len(differing) == 1 and is_outdated(old["weights"], new["weights"]):
        raise InputError(f"{file}: the reproduction {renewal_hint(file.parent)}")
    if differing:
        raise InputError(
            f"{file}: the rows here are of other settings ({'; '.join(differing)}); repeat them to "
            "go on, or give another --out"
        )


def _begun(row: Row, plan: PruningPlan) -> RowOutcome:
    record = plan.provenance.get("kv_select", plan.provenance)
    cost = None
    if row is not DENSE:
        cost = SearchCost(
            evaluations=record["evaluations"], seconds=record["seconds"], score=record["score"]
        )
    return RowOutcome(
        name=row.name,
        plan=plan.fingerprint,
        prefill_removed=plan.removed("prefill"),
        decode_removed=plan.removed("decode"),
        search=cost,
    )


def _weight_bytes(sides: Sides) -> WeightBytes:
    """Bytes of the parameters of both stages' models, and of their union."""
    parameters: list[dict[int, torch.Tensor]] = [
        {p.data_ptr(): p for p in stage.model.parameters()}
        for stage in (sides.plan.prefill, sides.plan.decode)
    ]
    sums = [
        sum(p.nbytes for p in tensors.values())
        for tensors in (*parameters, parameters[0] | parameters[1])
    ]
    return WeightBytes(prefill=sums[0], decode=sums[1], unified=sums[2])
