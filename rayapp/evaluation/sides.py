"""The dense model and a plan over one model, answering the same examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rayapp.engine.local import LocalPipeline
from rayapp.evaluation.answers import judge_answers
from rayapp.evaluation.choices import AnsweredQuestions, Question, choice_likelihoods
from rayapp.evaluation.completions import JudgedCompletions
from rayapp.evaluation.latency import measure_latency
from rayapp.evaluation.likelihood import TwoStages, likelihoods
from rayapp.evaluation.perplexity import ScoredWindows, Windows
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.prompt_bytes import PromptBytes
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.loading import LoadedModel
from rayapp.plan import PruningPlan
from rayapp.pruning.calibration import TokenizedLine

_Found = TypeVar("_Found")


class Sides:
    """Measures examples of every kind on both sides.

    Args:
        loaded: The whole dense model; healed tensors of the plan are read from its directory.
        plan: What stands beside it.
        settings: Batches and timings.
        progress: Called as the work proceeds.

    Raises:
        PlanError: The plan was made for another model, or its healed tensors cannot be used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: PruningPlan,
        settings: EvaluationSettings,
        progress: ProgressCallback = silent,
    ) -> None:
        self.dense = TwoStages(loaded.model, PruningPlan())
        self.plan = TwoStages(loaded.model, plan)
        self._settings, self._progress = settings, progress
        self._end_token_ids = loaded.eos_token_ids
        self._pipelines = [
            LocalPipeline(loaded.model, plan=side.plan, max_num_seqs=settings.max_num_seqs)
            for side in (self.dense, self.plan)
        ]

    def completions(self, task: str, lines: Sequence[TokenizedLine]) -> JudgedCompletions:
        """Likelihoods, then greedy answers through the engine that serves."""
        found = self._in_order(
            f"{task}: likelihood", likelihoods(self.dense, self.plan, lines), len(lines)
        )
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
        return JudgedCompletions(lines, found, judged[0], judged[1])

    def choices(self, task: str, questions: Sequence[Question]) -> AnsweredQuestions:
        """Log-likelihoods of all choices."""
        dense, plan = (
            self._in_order(
                f"{task}: {name} choices", choice_likelihoods(side, questions), len(questions)
            )
            for name, side in (("dense", self.dense), ("plan", self.plan))
        )
        sent = PromptBytes.of(self.plan, (len(question.prompt) for question in questions))
        return AnsweredQuestions(questions, dense, plan, sent)

    def texts(self, task: str, windows: Windows) -> ScoredWindows:
        """Likelihoods of all windows."""
        lines = windows.lines
        found = self._in_order(
            f"{task}: windows", likelihoods(self.dense, self.plan, lines), len(lines)
        )
        sent = PromptBytes.of(self.plan, (len(line.prompt) for line in lines))
        return ScoredWindows(windows, found, sent)

    def latency(self, batch_size: int) -> LatencyResult:
        """Interleaved timings of one batch size."""
        return measure_latency(
            self.dense, self.plan, self._settings, batch_size=batch_size, progress=self._progress
        )

    def _in_order(self, what: str, found: Iterable[tuple[int, _Found]], count: int) -> list[_Found]:
        by_index: dict[int, _Found] = {}
        for index, each in found:
            by_index[index] = each
            self._progress(what, len(by_index), count)
        return [by_index[index] for index in range(count)]
