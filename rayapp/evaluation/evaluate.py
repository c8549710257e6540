"""Evaluate a plan: the dense model beside it on the same examples, then speed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rayapp.engine.local import LocalPipeline
from rayapp.errors import DataError
from rayapp.evaluation.answers import JudgedAnswer, judge_answers
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.latency import measure_latency
from rayapp.evaluation.likelihood import LineLikelihood, TwoStages, likelihoods
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.result import (
    MEAN,
    DataFile,
    EvaluationResult,
    LatencyResult,
    PlanSummary,
    TaskResult,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.blocks import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.loading import DType, LoadedModel, load_model, load_tokenizer
from rayapp.plan import PruningPlan
from rayapp.pruning.calibration import TokenizedLine, load_calibration

logger = logging.getLogger(__name__)

_DEFAULT_SETTINGS = EvaluationSettings()


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
    """Measure answer NLL, KL, exact match, bytes and latency of a plan beside the dense model.

    Everything is checked before anything is run. What is measured is written to ``out`` task by
    task, so a failure loses nothing but the task that it fell into.

    Args:
        model: A checkpoint directory.
        plan: A plan, its file or its directory; None is the dense model (beside itself).
        data: Files of JSON lines ``{"prompt", "completion"}``, optionally ``"task"``.
        settings: What to measure.
        dtype: Element type of the engine; ``auto`` is the checkpoint's own.
        device: Where to run.
        out: JSON file for the result.
        progress: Called as the work proceeds.

    Raises:
        ModelError: The model cannot be used.
        PlanError: The plan is malformed or was made for another model.
        DataError: A file cannot be read or holds no example, or a line (named) is malformed.
    """
    chosen = _chosen(plan)
    files, tasks = _read(Checkpoint(model), chosen, data, settings)
    with _threads(settings.num_threads):
        loaded = load_model(model, dtype=dtype, device=device)
        start = EvaluationResult(
            model=loaded.signature,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            plan=_summary(chosen),
            settings=settings,
            data=files,
            machine=this_machine(device=str(loaded.model.device), num_threads=settings.num_threads),
        )
        return _Evaluation(loaded, chosen, start, out, progress).run(tasks)


def _chosen(plan: PruningPlan | str | Path | None) -> PruningPlan:
    if plan is None or isinstance(plan, PruningPlan):
        return plan or PruningPlan()
    return PruningPlan.load(plan)


def _read(
    checkpoint: Checkpoint,
    plan: PruningPlan,
    data: Sequence[str | Path],
    settings: EvaluationSettings,
) -> tuple[tuple[DataFile, ...], dict[str, list[TokenizedLine]]]:
    """Check plan and data against the checkpoint without its weights; examples by task, sorted."""
    plan.check_model(checkpoint.signature())
    if not data:
        raise DataError("no data: give at least one file of JSON lines with prompt and completion")
    tokenizer = load_tokenizer(checkpoint.path)
    limit = text_config(checkpoint.config).max_position_embeddings
    files, tasks = [], dict[str, list[TokenizedLine]]()
    for path in map(Path, data):
        lines = load_calibration(path, tokenizer, max_positions=limit).lines
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(DataFile(name=path.name, sha256=digest, num_examples=len(lines)))
        for line in lines:
            tasks.setdefault(line.task, []).append(line)
    return tuple(files), {task: tasks[task][: settings.limit] for task in sorted(tasks)}


def _summary(plan: PruningPlan) -> PlanSummary:
    return PlanSummary(
        fingerprint=plan.fingerprint,
        is_empty=plan.is_empty,
        prefill_removed=plan.removed("prefill"),
        decode_removed=plan.removed("decode"),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Examples:
    """What was measured on each example of one task."""

    lines: Sequence[TokenizedLine]
    likelihoods: list[LineLikelihood]
    dense: list[JudgedAnswer]
    plan: list[JudgedAnswer]

    @property
    def points_lost(self) -> list[float]:
        """Per example, in percentage points: 100, 0 or -100."""
        pairs = zip(self.dense, self.plan, strict=True)
        return [100.0 * (dense.is_match - plan.is_match) for dense, plan in pairs]

    @property
    def token_kl(self) -> list[float]:
        """Per example, the mean over its continuation tokens."""
        return [sums.kl / sums.num_tokens for sums in self.likelihoods]

    @property
    def num_tokens(self) -> list[float]:
        """Per example, continuation tokens."""
        return [float(sums.num_tokens) for sums in self.likelihoods]


class _Evaluation:
    """One evaluation on its way, task by task."""

    def __init__(
        self,
        loaded: LoadedModel,
        plan: PruningPlan,
        start: EvaluationResult,
        out: str | Path | None,
        progress: ProgressCallback,
    ) -> None:
        self._result = start
        self._settings = start.settings
        self._out = out
        self._progress = progress
        self._end_token_ids = loaded.eos_token_ids
        self._sides = (TwoStages(loaded.model, PruningPlan()), TwoStages(loaded.model, plan))
        self._pipelines = [
            LocalPipeline(loaded.model, plan=side.plan, max_num_seqs=self._settings.max_num_seqs)
            for side in self._sides
        ]

    def run(self, tasks: dict[str, list[TokenizedLine]]) -> EvaluationResult:
        """Measure everything; keeps what is done in the result file."""
        measured: list[_Examples] = []
        results: list[TaskResult] = []
        for task, lines in tasks.items():
            measured.append(self._examples(task or "examples", lines))
            results.append(_aggregate(task, [measured[-1]], self._settings))
            self._keep(tasks=tuple(results))
        self._keep(mean=_aggregate(MEAN, measured, self._settings))
        timings: list[LatencyResult] = []
        for batch_size in self._settings.batch_sizes if self._settings.num_runs else ():
            timings.append(
                measure_latency(
                    *self._sides, self._settings, batch_size=batch_size, progress=self._progress
                )
            )
            self._keep(latency=tuple(timings))
        self._keep(complete=True)
        return self._result

    def _keep(self, **found: object) -> None:
        self._result = self._result.model_copy(update=found)
        if self._out is not None:
            self._result.save(self._out)

    def _examples(self, task: str, lines: list[TokenizedLine]) -> _Examples:
        sums: dict[int, LineLikelihood] = {}
        for index, found in likelihoods(*self._sides, lines):
            sums[index] = found
            self._progress(f"{task}: likelihood", len(sums), len(lines))
        judged = [
            judge_answers(
                pipeline,
                lines,
                end_token_ids=self._end_token_ids,
                progress=self._progress,
                what=f"{task}: {name} answers",
            )
            for name, pipeline in zip(("dense", "plan"), self._pipelines, strict=True)
        ]
        return _Examples(lines, [sums[i] for i in range(len(lines))], judged[0], judged[1])


def _aggregate(task: str, groups: Sequence[_Examples], settings: EvaluationSettings) -> TaskResult:
    """One row: a task, or the mean over tasks."""
    seed, resamples = settings.seed, settings.num_resamples
    weights = [group.num_tokens for group in groups]
    lengths = [len(line.prompt) for group in groups for line in group.lines]
    transfers = [answer.transfer for group in groups for answer in group.plan]
    return TaskResult(
        task=task,
        num_examples=len(lengths),
        num_tokens=round(sum(sum(group) for group in weights)),
        min_prompt_tokens=min(lengths),
        mean_prompt_tokens=sum(lengths) / len(lengths),
        max_prompt_tokens=max(lengths),
        dense_nll=_mean([_token_nll(group, "dense_nll") for group in groups]),
        plan_nll=_mean([_token_nll(group, "plan_nll") for group in groups]),
        kl=upper_bound(
            [group.token_kl for group in groups],
            weights=weights,
            seed=seed,
            num_resamples=resamples,
        ),
        dense_exact_match=_mean([_mean([a.is_match for a in group.dense]) for group in groups]),
        plan_exact_match=_mean([_mean([a.is_match for a in group.plan]) for group in groups]),
        points_lost=upper_bound(
            [group.points_lost for group in groups], seed=seed, num_resamples=resamples
        ),
        bytes_full=sum(record.bytes_full for record in transfers),
        bytes_sent=sum(record.bytes_sent for record in transfers),
        overhead_bytes=sum(record.overhead_bytes for record in transfers),
    )


def _token_nll(group: _Examples, side: str) -> float:
    return sum(getattr(sums, side) for sums in group.likelihoods) / sum(group.num_tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
