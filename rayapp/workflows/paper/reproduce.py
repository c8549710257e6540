"""A paper's tables for a user's checkpoint: search every row's plan, then measure every plan.

The output directory keeps all results: a plan directory per row with its search and its outcomes
per example, and the tables, written anew after every row. A second run with ``resume`` does not
compute existing results again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayapp.errors import DataError, InputError
from rayapp.evaluation.data import EvaluationData, read_data
from rayapp.evaluation.evaluate import num_threads, piece_identity, placed
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.paper.count import Count, Job, few_lines, probed_rate, tokens_of
from rayapp.evaluation.paper.outcome import (
    ROW_FILE,
    RowOutcome,
    SearchCost,
    WeightBytes,
    kind_of_data,
    measure_data,
)
from rayapp.evaluation.paper.overlap import checked_overlaps
from rayapp.evaluation.paper.presets import rows_of
from rayapp.evaluation.paper.rows import Row, chosen_rows
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.paper.tables import Paper, caveats, definitions, mean_accuracy
from rayapp.evaluation.pieces.compute import PieceCompute, Subject
from rayapp.evaluation.pieces.journal import Journal
from rayapp.evaluation.pieces.measurer import Measurer
from rayapp.evaluation.progress import ProgressCallback as EvaluationProgress
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.sides import Sides
from rayapp.models.architecture import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import from_directory, locate
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import PruningPlan, is_outdated, renewal_hint
from rayapp.pruning.progress import ProgressCallback as SearchProgress
from rayapp.pruning.search.sensitivity import Sensitivity
from rayapp.workflows.evaluate import place_of
from rayapp.workflows.paper.plans import PaperPlans, Planned
from rayapp.workflows.paper.published import with_files
from rayapp.workflows.sensitivity import map_blocks

logger = logging.getLogger(__name__)

SUBJECT_FILE = "reproduction.json"
TABLES_DIRECTORY = "tables"
MAPS_DIRECTORY = "maps"
DENSE_FILE = "dense.json"
"""The file beside which the pieces of the dense model lie, which all rows share."""


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
    return _opened(settings, watch).run()


def count_work(settings: ReproduceSettings, watch: Watch) -> Count:
    """Count what is done and what is left of the tables, in tokens and in hours.

    Raises:
        InputError: Model, data, sizes or directory cannot be used, as in :func:`reproduce`.
    """
    return _opened(settings, watch).counted()


def _opened(settings: ReproduceSettings, watch: Watch) -> _Reproduction:
    directory = locate(settings.model, settings.revision).directory
    there = settings.model_copy(update={"model": str(directory), "revision": None})
    of_files, calibrations = with_files(there)
    return _Reproduction(of_files, watch, calibrations)


@dataclass
class _Reproduction:
    """The state of one run of :func:`reproduce`."""

    settings: ReproduceSettings
    watch: Watch
    calibrations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        settings = self.settings
        checkpoint = Checkpoint(settings.model)
        self._signature = checkpoint.signature()
        self._rows = chosen_rows(settings, rows_of(settings.preset, self._signature.num_blocks))
        self._data = _read(settings, checkpoint)
        self._overlaps = checked_overlaps(settings)
        self._out = Path(settings.out)
        self._made = PaperPlans(settings, self.watch.search, self._signature, self._rows)
        self._maps: list[Sensitivity] = []
        self._of_dense = Journal(None, {})

    def run(self) -> Paper:
        """Run all searches before all measurements: model and evaluators do not share memory."""
        self._claim_directory()
        logger.info("%s", self._count(None).sentence())
        if self.settings.preset == "paper" and self.settings.maps:
            self._maps = self._mapped()
        plans = self._made.plans(self._maps)
        with self._computing() as compute:
            logger.info("%s", self._count(self._rate(compute)).sentence())
            self._of_dense = self._journal(compute, self._out / DENSE_FILE, PruningPlan())
            measured: list[RowOutcome] = []
            for row in self._rows:
                if row.name in plans:
                    measured.append(self._measured(row, plans, compute, measured))
                    paper = self._paper(measured, compute)
                    paper.write(self._out / TABLES_DIRECTORY)
                    told = mean_accuracy(paper, row.name), self._count(self._rate(compute))
                    logger.info("%s: done%s; %s", row.title, told[0], told[1].sentence())
        return paper

    def counted(self) -> Count:
        """Count what is done and what is left, and measure a rate if no row has one."""
        with self._computing() as compute:
            return self._count(self._rate(compute))

    @contextmanager
    def _computing(self) -> Iterator[PieceCompute]:
        settings = self.settings
        subject = Subject(Path(settings.model), settings.evaluation())
        place = place_of(settings.model_settings(), settings.spread())
        with num_threads(settings.threads), place.open(subject) as compute:
            compute.use(PruningPlan())
            yield compute

    def _mapped(self) -> list[Sensitivity]:
        with self.watch.evaluation() as progress:
            maps = map_blocks(
                self.settings.score(),
                self.settings.compute(),
                self.calibrations,
                self._out / MAPS_DIRECTORY,
                progress=progress,
            )
            return list(maps)

    def _count(self, rate: float | None) -> Count:
        """The work of all rows that can be made; ``rate`` in tokens per second, if it is known."""
        jobs = []
        for row in self._rows:
            if row.name in self._made.left_out:
                continue
            known = RowOutcome.load(self._made.path(row))
            left = [d for name, d in self._data.items() if not (known and name in known.data)]
            shares = row.name == "unified"  # its outcome is another row's
            tokens = 0 if shares else 2 * sum(map(tokens_of, left))
            sizes = " and ".join(f"{size:g}" for size in self._made.sizes[row.name])
            search = self._made.search_tokens(row)
            jobs.append(Job(row.title, sizes, search, tokens, 0 if shares else len(left)))
        return Count(jobs, rate)

    def _rate(self, compute: PieceCompute) -> float:
        """Tokens per second of both sides: of rows that are done, or of a few lines now."""
        known = [RowOutcome.load(self._made.path(row)) for row in self._rows]
        tokens = sum(outcome.tokens for outcome in known if outcome)
        seconds = sum(outcome.seconds for outcome in known if outcome)
        if seconds:
            return tokens / seconds
        return probed_rate(compute, few_lines(self._data.values()))

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

    def _measured(
        self,
        row: Row,
        plans: Mapping[str, Planned],
        compute: PieceCompute,
        before: list[RowOutcome],
    ) -> RowOutcome:
        """Measure a row's outcome; results in its file are not measured again."""
        path, (plan, base) = self._made.path(row), plans[row.name]
        shared = next((earlier for earlier in before if earlier.name == base), None)
        if shared is not None:
            outcome = shared.model_copy(update={"name": row.name, "base": base, "search": None})
        else:
            outcome = RowOutcome.load(path) or _begun(row, plan, before)
            if outcome.plan != plan.fingerprint:
                raise InputError(
                    f"{path}: outcomes are of plan {outcome.plan}, but the plan is "
                    f"{plan.fingerprint}; delete the row's directory to make it again"
                )
            # Files from before rows knew it learn it here.
            only_decode = plan.only_changes_decode
            outcome = outcome.model_copy(update={"only_decode": only_decode})
            with self.watch.evaluation() as progress:
                compute.use(plan)
                wanted, journal = (
                    self.settings.evaluation(),
                    self._journal(compute, path / ROW_FILE, plan),
                )
                measurer = Measurer(compute, plan, wanted, progress, journal, self._of_dense)
                outcome = self._with_data(outcome, measurer, path)
                journal.close()
                outcome = self._with_speed(row, outcome, measurer, compute)
        outcome.save(path)  # The file keeps data sets of earlier runs.
        data = {name: outcome.data[name] for name in self._data}
        return outcome.model_copy(update={"data": data})

    def _journal(self, compute: PieceCompute, file: Path, plan: PruningPlan) -> Journal:
        """The pieces that were measured of a plan before; they lie beside ``file``."""
        weights, wanted = self._signature.weights_fingerprint, self.settings.evaluation()
        return Journal(file, piece_identity(compute, weights, plan, wanted))

    def _with_data(self, row_outcome: RowOutcome, measurer: Measurer, path: Path) -> RowOutcome:
        for name, data in self._data.items():
            known = row_outcome.data.get(name)
            if known is None:
                began_s = time.perf_counter()
                outcome = measure_data(measurer, name, data)
                update = {
                    "data": {**row_outcome.data, name: outcome},
                    "tokens": row_outcome.tokens + 2 * tokens_of(data),
                    "seconds": row_outcome.seconds + time.perf_counter() - began_s,
                }
                row_outcome = row_outcome.model_copy(update=update)
                row_outcome.save(path)
            elif known.sha256 != data.files[0].sha256:
                raise InputError(
                    f"{path}: {name} was measured on another file than {self.settings.data[name]}; "
                    "give it another name, or the same file"
                )
        return row_outcome

    def _with_speed(
        self, row: Row, outcome: RowOutcome, measurer: Measurer, compute: PieceCompute
    ) -> RowOutcome:
        settings = self.settings.evaluation()
        timings: tuple[LatencyResult, ...] = outcome.latency
        if settings.num_runs and not (timings or row.narrows):
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
            "weights": None if row.narrows else compute.measure(WeightBytes.of),
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
        notes += definitions(settings, self._rows, self._made.bases)
        left_out = dict(self._made.left_out)
        return Paper(
            settings, tuple(measured), self._rows, left_out, machine, notes, warned, self._maps
        )


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


def _begun(row: Row, plan: PruningPlan, before: Sequence[RowOutcome]) -> RowOutcome:
    """The outcome of a row before it is measured.

    Several searches may end at one plan, whose answers are the same however it was found: they are
    taken from the row that was measured first.
    """
    twin = next((earlier for earlier in before if earlier.plan == plan.fingerprint), None)
    record = plan.provenance.get("kv_select", plan.provenance)
    cost = None
    if row.search is not None or (row.after and not row.encoding):
        cost = SearchCost(
            evaluations=record["evaluations"], seconds=record["seconds"], score=record["score"]
        )
    return RowOutcome(
        name=row.name,
        plan=plan.fingerprint,
        prefill_removed=plan.removed("prefill"),
        decode_removed=plan.removed("decode"),
        search=cost,
        data=twin.data if twin else {},
    )
