"""Evaluation of a plan: the dense model beside it on the same examples, then speed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from rayapp.data.seen import Seen
from rayapp.evaluation.data import AS_TEXT, EvaluationData, read_data
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.measures.choices import AnsweredQuestions, choice_result
from rayapp.evaluation.measures.completions import JudgedCompletions, completion_result
from rayapp.evaluation.measures.margins import Answers, quality_of
from rayapp.evaluation.measures.perplexity import ScoredWindows, text_result
from rayapp.evaluation.measures.rollouts import Opening, rollout_result
from rayapp.evaluation.met import meet
from rayapp.evaluation.pieces.compute import HERE, PieceCompute, Place, Subject
from rayapp.evaluation.pieces.journal import Journal
from rayapp.evaluation.pieces.measurer import Measurer, second_openings
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.quality import FORMS, RolloutResult
from rayapp.evaluation.result import (
    MEAN,
    ChoiceResult,
    EvaluationResult,
    LatencyResult,
    PlanSummary,
    TaskResult,
    TextResult,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.sides import Sides
from rayapp.models.architecture import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import from_directory
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import PruningPlan
from rayapp.vision.inputs import ImageIntake

logger = logging.getLogger(__name__)

_DEFAULT_SETTINGS = EvaluationSettings()
NAMELESS = "examples"
AnyData = Sequence[str | Path]
"""Files of lines, or directories of them."""

_Row = TypeVar("_Row", TaskResult, ChoiceResult, TextResult, RolloutResult)
_Group = TypeVar("_Group", JudgedCompletions, AnsweredQuestions, ScoredWindows)


def evaluate(
    model: str | Path,
    plan: PruningPlan | str | Path | None,
    data: AnyData,
    *,
    settings: EvaluationSettings = _DEFAULT_SETTINGS,
    place: Place = HERE,
    out: str | Path | None = None,
    texts: AnyData = (),
    progress: ProgressCallback = silent,
) -> EvaluationResult:
    """Measure a plan's losses and savings beside the dense model on the same examples.

    Completions (about images too) give answer NLL, KL and exact match, multiple choice gives
    accuracy, texts give perplexity, and conversations generation. Bytes are always measured, and
    latency if ``num_runs`` is above 0.

    Everything is checked before anything is run. Results are written to ``out`` task by task, and
    pieces of a task to a journal beside it, so that an interrupted evaluation goes on.

    Args:
        model: A checkpoint directory.
        plan: A plan, its file or its directory; None is the dense model (beside itself).
        data: Files of JSON lines of any kind (:mod:`rayapp.evaluation.data`).
        settings: The settings of the evaluation.
        place: Where to compute, in which element type and on which device; this process by default.
        out: JSON file for the result.
        texts: Files whose lines are read as texts for perplexity, whatever their kind.
        progress: Called as the work proceeds.

    Raises:
        ModelError: The model cannot be used.
        PlanError: The plan is malformed or was made for another model.
        DataError: A file cannot be read or holds no example, or a line (named) is malformed.
    """
    chosen, subject, examples = checked_inputs(model, plan, data, texts, settings)
    with num_threads(settings.num_threads), place.open(subject) as compute:
        where = None if out is None else Path(out)
        begun = _begun(compute, subject, chosen, examples, where)
        weights = begun.model.weights_fingerprint
        journal = Journal(where, piece_identity(compute, weights, chosen, settings))
        measurer = Measurer(compute, chosen, settings, progress, journal)
        tokenizer = load_tokenizer(subject.model)
        result = _Evaluation(measurer, begun, chosen, tokenizer, where).run(examples)
        journal.close()
    return result


def checked_inputs(
    model: str | Path,
    plan: PruningPlan | str | Path | None,
    data: AnyData,
    texts: AnyData,
    settings: EvaluationSettings,
) -> tuple[PruningPlan, Subject, EvaluationData]:
    """The inputs of an evaluation, checked before any weights are read.

    Raises:
        InputError: The inputs are refused as by :func:`evaluate`.
    """
    chosen, checkpoint = _chosen(plan), Checkpoint(model)
    examples = _read(checkpoint, chosen, data, texts, settings)
    with_images = bool(examples.image_lines) or chosen.visual_tokens is not None
    return chosen, Subject(Path(checkpoint.path), settings, with_images=with_images), examples


def _begun(
    compute: PieceCompute,
    subject: Subject,
    plan: PruningPlan,
    data: EvaluationData,
    out: Path | None,
) -> EvaluationResult:
    """The result before anything is measured."""
    settings = subject.settings
    compute.use(plan)
    device, dtype = compute.measure(placed)
    met = meet(out, settings.split, data.files, plan.fingerprint)
    return EvaluationResult(
        model=Checkpoint(subject.model).signature(),
        model_caption=from_directory(subject.model).caption,
        dtype=dtype,
        plan=_summary(plan),
        settings=settings,
        data=data.files,
        machine=this_machine(device=device, num_threads=settings.num_threads),
        test_met_by=met,
    )


def placed(sides: Sides) -> tuple[str, str]:
    """The device and element type that a model computes in."""
    model = sides.loaded.model
    return str(model.device), str(model.dtype).removeprefix("torch.")


def piece_identity(
    compute: PieceCompute, weights: str, plan: PruningPlan, settings: EvaluationSettings
) -> dict[str, Any]:
    """Everything that pieces depend on beside their examples; ``weights`` is the fingerprint."""
    device, dtype = compute.measure(placed)
    versions = this_machine(device=device, num_threads=settings.num_threads).versions
    sizes = {"max_num_seqs", "max_rollout_tokens", "num_threads"}
    return {
        "weights": weights,
        "plan": plan.fingerprint,
        "dtype": dtype,
        "device": device,
        "products": "packed",
        "versions": versions,
        **settings.model_dump(mode="json", include=sizes),
    }


def _chosen(plan: PruningPlan | str | Path | None) -> PruningPlan:
    if plan is None or isinstance(plan, PruningPlan):
        return plan or PruningPlan()
    return PruningPlan.load(plan)


def _read(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    data: AnyData,
    texts: AnyData,
    settings: EvaluationSettings,
) -> EvaluationData:
    """Check plan and data against the checkpoint without its weights."""
    plan.check_model(checkpoint.signature())
    return read_data(
        data,
        load_tokenizer(checkpoint.path),
        max_positions=text_config(checkpoint.config).max_position_embeddings,
        settings=settings,
        images=ImageIntake.of(checkpoint.config),
        first_token=plan.first_token,
        texts=texts,
    )


def _summary(plan: PruningPlan) -> PlanSummary:
    return PlanSummary(
        fingerprint=plan.fingerprint,
        is_empty=plan.is_empty,
        prefill_removed=plan.removed("prefill"),
        decode_removed=plan.removed("decode"),
    )


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Evaluation:
    """The state of one evaluation, which goes task by task."""

    def __init__(
        self,
        measurer: Measurer,
        begun: EvaluationResult,
        plan: PruningPlan,
        tokenizer: Any,
        out: Path | None,
    ) -> None:
        self._measurer, self._result, self._out = measurer, begun, out
        self._settings, self._tokenizer = begun.settings, tokenizer
        self._plan, self._record = plan, Seen.by(plan.provenance)
        self._seen: dict[str, str] = {}
        self._answers: dict[str, Answers] = {}
        self._windows: dict[str, ScoredWindows] = {}

    def run(self, data: EvaluationData) -> EvaluationResult:
        """Measure everything; finished tasks are kept in the result file."""
        self._seen = {
            task: self._record.told(task.removesuffix(AS_TEXT), origin.files, origin.prompts)
            for task, origin in data.origins.items()
        }
        if data.completions:
            self._completions(data)
        if data.choices:
            self._choices(data)
        if data.texts:
            self._texts(data)
        for task, openings in data.openings.items():
            self._rollouts(task, openings)
        image = next((path for line in data.image_lines for path in line.images), None)
        timings: list[LatencyResult] = []
        for length in self._settings.timed_lengths if self._settings.num_runs else ():
            for batch_size in self._settings.batch_sizes:
                timings.append(self._measurer.latency(batch_size, length, image))
                self._keep(latency=tuple(timings))
        self._keep(complete=True)
        return self._result

    def _completions(self, data: EvaluationData) -> None:
        measured: dict[str, JudgedCompletions] = {}
        for task, lines in data.completions.items():
            group = self._measurer.completions(task or NAMELESS, lines)
            measured[task], self._answers[task] = group, Answers.of_completions(group)
            row = completion_result(task, [group], self._settings)
            self._keep(tasks=(*self._result.tasks, self._marked(row)))
        self._keep(mean=completion_result(MEAN, self._unseen(measured), self._settings))
        self._keep_quality()

    def _choices(self, data: EvaluationData) -> None:
        measured: dict[str, AnsweredQuestions] = {}
        metric = self._settings.choice_metric
        for task, questions in data.choices.items():
            group = self._measurer.choices(task or NAMELESS, questions)
            measured[task], self._answers[task] = group, Answers.of_choices(group, metric)
            row = choice_result(task, [group], self._settings)
            self._keep(choices=(*self._result.choices, self._marked(row)))
        self._keep(choice_mean=choice_result(MEAN, self._unseen(measured), self._settings))
        self._keep_quality()

    def _texts(self, data: EvaluationData) -> None:
        for task, windows in data.texts.items():
            self._windows[task] = self._measurer.texts(task or NAMELESS, windows)
            row = text_result(task, [self._windows[task]], self._settings)
            self._keep(texts=(*self._result.texts, self._marked(row)))
        self._keep(text_mean=text_result(MEAN, self._unseen(self._windows), self._settings))
        self._keep_quality()

    def _rollouts(self, task: str, openings: Sequence[Opening]) -> None:
        """Rollouts by the form of their prompts; second turns follow the dense first answers."""
        for form in FORMS:
            some = [opening for opening in openings if opening.form == form]
            if not some:
                continue
            done = self._measurer.rollouts(f"{task or NAMELESS}, {form}", some)
            row = rollout_result(
                task, form, done, self._settings, by_prefill=self._plan.first_token == "prefill"
            )
            self._keep(rollouts=(*self._result.rollouts, self._marked(row)))
            openings = [*openings, *second_openings(some, done, self._tokenizer)]

    def _marked(self, row: _Row) -> _Row:
        """A row that says how the plan has seen its task."""
        task = row.source if isinstance(row, RolloutResult) else row.task
        return row.model_copy(update={"seen": self._seen.get(task, "")})

    def _unseen(self, measured: Mapping[str, _Group]) -> list[_Group]:
        """The tasks that enter a mean: those that the plan has not seen, or else all of them."""
        unseen = [group for task, group in measured.items() if not self._seen.get(task)]
        return unseen or list(measured.values())

    def _keep_quality(self) -> None:
        told = self._answers, self._windows, self._seen, self._settings
        self._keep(quality=quality_of(*told, only_decode=self._plan.only_changes_decode))

    def _keep(self, **rows: object) -> None:
        self._result = self._result.model_copy(update=rows)
        if self._out is not None:
            self._result.save(self._out)
