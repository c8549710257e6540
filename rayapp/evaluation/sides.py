"""The two sides of an evaluation: the dense model and a plan, answering the same examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.errors import IntegrityError
from rayapp.evaluation.measures.answers import judge_answers
from rayapp.evaluation.measures.choices import AnsweredQuestions, Question, choice_likelihoods
from rayapp.evaluation.measures.completions import JudgedCompletions
from rayapp.evaluation.measures.latency import TimedImage, measure_latency
from rayapp.evaluation.measures.likelihood import (
    LineLikelihood,
    TwoStages,
    image_likelihoods,
    likelihoods,
)
from rayapp.evaluation.measures.perplexity import ScoredWindows, Windows
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.loading import LoadedModel
from rayapp.plan import PruningPlan
from rayapp.vision.reader import ImageReader, ImageSupport

_Found = TypeVar("_Found")


class Sides:
    """Measures examples of every kind on both sides.

    Args:
        loaded: The whole dense model; healed tensors of the plan are read from its directory.
        plan: The plan beside it.
        settings: Sizes of batches, and timings.
        progress: Called as the work proceeds.
        image_processor: The model's image processor, if there are images to read or visual tokens
            to prune.

    Raises:
        PlanError: The plan was made for another model, its healed tensors cannot be used, or it
            prunes visual tokens in a way that this model does not allow.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        plan: PruningPlan,
        settings: EvaluationSettings,
        progress: ProgressCallback = silent,
        image_processor: Any = None,
    ) -> None:
        self.dense = TwoStages(loaded.model, PruningPlan())
        self.plan = TwoStages(loaded.model, plan)
        self._settings, self._progress = settings, progress
        self._model, self._image_processor = loaded.model, image_processor
        self._end_token_ids = loaded.eos_token_ids
        self._pipelines = [
            LocalPipeline(
                loaded.model,
                plan=side.plan,
                max_num_seqs=settings.max_num_seqs,
                image_processor=image_processor,
            )
            for side in (self.dense, self.plan)
        ]
        dense, other = (pipeline.images for pipeline in self._pipelines)
        if dense is not None and other is not None:
            other.cache = dense.cache  # an encoded image depends on no plan

    def completions(self, task: str, lines: Sequence[TokenizedLine]) -> JudgedCompletions:
        """Measure likelihoods, then greedy answers through the engine that serves."""
        sums = self._in_order(f"{task}: likelihood", self._likelihoods(lines), len(lines))
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
        return JudgedCompletions(lines, sums, judged[0], judged[1])

    def _likelihoods(self, lines: Sequence[TokenizedLine]) -> Iterator[tuple[int, LineLikelihood]]:
        """Likelihoods of text in batches, then of lines about images one by one."""
        about_images = {
            number: line
            for number, line in enumerate(lines)
            if isinstance(line, TokenizedImageLine)
        }
        texts = [number for number in range(len(lines)) if number not in about_images]
        for place, sums in likelihoods(self.dense, self.plan, [lines[n] for n in texts]):
            yield texts[place], sums
        dense, plan = self._pipelines
        image_sums = image_likelihoods(dense, plan, list(about_images.values()))
        yield from zip(about_images, image_sums, strict=True)

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
        sums = self._in_order(
            f"{task}: windows", likelihoods(self.dense, self.plan, lines), len(lines)
        )
        sent = PromptBytes.of(self.plan, (len(line.prompt) for line in lines))
        return ScoredWindows(windows, sums, sent)

    def latency(self, batch_size: int, image: Path | None = None) -> LatencyResult:
        """Interleaved timings of one batch size, of text or of prompts that begin with an image."""
        return measure_latency(
            self.dense,
            self.plan,
            self._settings,
            batch_size=batch_size,
            progress=self._progress,
            image=self._timed(image) if image else None,
        )

    def _timed(self, path: Path) -> TimedImage:
        reader = self._pipelines[0].images
        if reader is None:
            raise IntegrityError(f"{path} is to be timed without an image processor")
        (taken,) = reader.intake.take_all([path])
        support = ImageSupport(self._image_processor, max_cache_bytes=0)
        make = partial(ImageReader, self._model, support=support)
        return TimedImage(taken, reader.intake.image_token_id, make)

    def _in_order(
        self, what: str, results: Iterable[tuple[int, _Found]], count: int
    ) -> list[_Found]:
        by_index: dict[int, _Found] = {}
        for index, result in results:
            by_index[index] = result
            self._progress(what, len(by_index), count)
        return [by_index[index] for index in range(count)]
