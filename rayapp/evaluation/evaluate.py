"""Evaluation of a plan: the dense model beside it on the same examples, then speed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayapp.evaluation.data import EvaluationData, read_data
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.measures.choices import AnsweredQuestions, choice_result
from rayapp.evaluation.measures.completions import JudgedCompletions, completion_result
from rayapp.evaluation.measures.perplexity import ScoredWindows, text_result
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.result import MEAN, EvaluationResult, LatencyResult, PlanSummary
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.sides import Sides
from rayapp.models.blocks import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import from_directory
from rayapp.models.loading import load_model, load_tokenizer
from rayapp.plan import PruningPlan
from rayapp.settings import DType
from rayapp.vision.inputs import ImageIntake
from rayapp.vision.llava import image_processor_of

logger = logging.getLogger(__name__)

_DEFAULT_SETTINGS = EvaluationSettings()
NAMELESS = "examples"


def evaluate(
    model: str | Path,
    plan: PruningPlan | str | Path | None,
    data: Sequence[str | Path],
    *,
    settings: EvaluationSettings = _DEFAULT_SETTINGS,
    dtype: DType = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    progress: ProgressCallback = silent,
) -> EvaluationResult:
    """Measure a plan's losses and savings beside the dense model on the same examples.

    Completions (about images too) give answer NLL, KL and exact match, multiple choice gives
    accuracy, and texts give perplexity. Bytes are always measured, and latency if ``num_runs`` is
    above 0.

    Everything is checked before anything is run. Results are written to ``out`` task by task, so a
    failure loses only the task in which it happened.

    Args:
        model: A checkpoint directory.
        plan: A plan, its file or its directory; None is the dense model (beside itself).
        data: Files of JSON lines of any kind (:mod:`rayapp.evaluation.data`).
        settings: The settings of the evaluation.
        dtype: Element type of the engine; ``auto`` is the checkpoint's own.
        device: The device to run on.
        out: JSON file for the result.
        progress: Called as the work proceeds.

    Raises:
        ModelError: The model cannot be used.
        PlanError: The plan is malformed or was made for another model.
        DataError: A file cannot be read or holds no example, or a line (named) is malformed.
    """
    chosen, checkpoint = _chosen(plan), Checkpoint(model)
    examples = _read(checkpoint, chosen, data, settings)
    processor = _image_processor(checkpoint, chosen, examples)
    with num_threads(settings.num_threads):
        loaded = load_model(model, dtype=dtype, device=device)
        start = EvaluationResult(
            model=loaded.signature,
            model_caption=from_directory(model).caption,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            plan=_summary(chosen),
            settings=settings,
            data=examples.files,
            machine=this_machine(device=str(loaded.model.device), num_threads=settings.num_threads),
        )
        sides = Sides(loaded, chosen, settings, progress, processor)
        return _Evaluation(sides, start, out).run(examples)


def _chosen(plan: PruningPlan | str | Path | None) -> PruningPlan:
    if plan is None or isinstance(plan, PruningPlan):
        return plan or PruningPlan()
    return PruningPlan.load(plan)


def _read(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    data: Sequence[str | Path],
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
    )


def _image_processor(checkpoint: Checkpoint, plan: PruningPlan, data: EvaluationData) -> Any | None:
    """The model's image processor if one is needed; None for a text-only model."""
    if not data.image_lines and plan.visual_tokens is None:
        return None
    return image_processor_of(checkpoint.path, checkpoint.config)


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

    def __init__(self, sides: Sides, start: EvaluationResult, out: str | Path | None) -> None:
        self._sides, self._result, self._out = sides, start, out
        self._settings = start.settings

    def run(self, data: EvaluationData) -> EvaluationResult:
        """Measure everything; finished tasks are kept in the result file."""
        if data.completions:
            self._completions(data)
        if data.choices:
            self._choices(data)
        if data.texts:
            self._texts(data)
        image = next((path for line in data.image_lines for path in line.images), None)
        timings: list[LatencyResult] = []
        for batch_size in self._settings.batch_sizes if self._settings.num_runs else ():
            timings.append(self._sides.latency(batch_size, image))
            self._keep(latency=tuple(timings))
        self._keep(complete=True)
        return self._result

    def _completions(self, data: EvaluationData) -> None:
        measured: list[JudgedCompletions] = []
        for task, lines in data.completions.items():
            measured.append(self._sides.completions(task or NAMELESS, lines))
            row = completion_result(task, measured[-1:], self._settings)
            self._keep(tasks=(*self._result.tasks, row))
        self._keep(mean=completion_result(MEAN, measured, self._settings))

    def _choices(self, data: EvaluationData) -> None:
        measured: list[AnsweredQuestions] = []
        for task, questions in data.choices.items():
            measured.append(self._sides.choices(task or NAMELESS, questions))
            row = choice_result(task, measured[-1:], self._settings)
            self._keep(choices=(*self._result.choices, row))
        self._keep(choice_mean=choice_result(MEAN, measured, self._settings))

    def _texts(self, data: EvaluationData) -> None:
        measured: list[ScoredWindows] = []
        for task, windows in data.texts.items():
            measured.append(self._sides.texts(task or NAMELESS, windows))
            row = text_result(task, measured[-1:], self._settings)
            self._keep(texts=(*self._result.texts, row))
        self._keep(text_mean=text_result(MEAN, measured, self._settings))

    def _keep(self, **rows: object) -> None:
        self._result = self._result.model_copy(update=rows)
        if self._out is not None:
            self._result.save(self._out)
