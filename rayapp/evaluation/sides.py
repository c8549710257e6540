"""The two sides of an evaluation: the dense model and a plan, answering the same examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.errors import IntegrityError
from rayapp.evaluation.measures.answers import JudgedAnswer, judge_answers
from rayapp.evaluation.measures.choices import Question, choice_likelihoods
from rayapp.evaluation.measures.latency import TimedImage, measure_latency
from rayapp.evaluation.measures.likelihood import (
    LineLikelihood,
    TwoStages,
    image_likelihoods,
    likelihoods,
)
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.measures.rollouts import Opening, Rollout, roll_out
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.loading import LoadedModel
from rayapp.plan import PruningPlan
from rayapp.vision.reader import ImageReader, ImageSupport

_Found = TypeVar("_Found")


class Sides:
    """Measures examples of every kind on both sides; a call is one batch, as it is given.

    Args:
        loaded: The whole dense model; healed tensors of the plan are read from its directory.
        plan: The plan beside it.
        settings: Sizes of batches, and timings.
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
        image_processor: Any = None,
    ) -> None:
        self.dense = TwoStages(loaded.model, PruningPlan())
        self.plan = TwoStages(loaded.model, plan)
        self.loaded = loaded
        self._settings = settings
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

    def measured(self, kind: str, examples: Sequence[Any]) -> list[Any]:
        """Measure examples of one kind (:mod:`rayapp.evaluation.pieces.piece`), in their order."""
        measures: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
            "likelihood": self.likelihoods,
            "dense answers": partial(self.answers, "dense"),
            "plan answers": partial(self.answers, "plan"),
            "dense choices": partial(self.choices, "dense"),
            "plan choices": partial(self.choices, "plan"),
            "rollouts": self.rollouts,
        }
        return list(measures[kind](examples))

    def likelihoods(self, lines: Sequence[TokenizedLine]) -> list[LineLikelihood]:
        """Likelihoods of completions or windows, teacher-forced."""
        images = [line for line in lines if isinstance(line, TokenizedImageLine)]
        if not images:
            return _in_order(likelihoods(self.dense, self.plan, lines), len(lines))
        if len(images) < len(lines):
            raise IntegrityError("lines about images are measured apart from others")
        dense, plan = self._pipelines
        return list(image_likelihoods(dense, plan, images))

    def answers(self, side: str, lines: Sequence[TokenizedLine]) -> list[JudgedAnswer]:
        """Greedy answers of ``dense`` or ``plan`` through the engine that serves."""
        pipeline = self._pipelines[side == "plan"]
        return judge_answers(
            pipeline,
            lines,
            end_token_ids=self._end_token_ids,
            decode=self.loaded.tokenizer.decode,
        )

    def choices(self, side: str, questions: Sequence[Question]) -> list[tuple[float, ...]]:
        """Log-likelihoods of all choices on the side of ``dense`` or ``plan``, by question."""
        stages = self.plan if side == "plan" else self.dense
        return _in_order(choice_likelihoods(stages, questions), len(questions))

    def rollouts(self, openings: Sequence[Opening]) -> list[Rollout]:
        """Greedy answers of both sides, and the plan along the dense model's."""
        return roll_out(
            self._pipelines[0],
            self._pipelines[1],
            (self.dense, self.plan),
            [opening.prompt for opening in openings],
            max_tokens=self._settings.max_rollout_tokens,
        )

    def prompt_bytes(self, lengths: Sequence[int], side: str = "plan") -> PromptBytes:
        """KV messages of text prompts of these lengths, on one side."""
        return PromptBytes.of(self.plan if side == "plan" else self.dense, lengths)

    def latency(
        self,
        batch_size: int,
        length: tuple[int, int] | None = None,
        image: Path | None = None,
    ) -> LatencyResult:
        """Interleaved timings of one batch size and length, of text or of prompts with an image.

        ``length`` are tokens of prompt and answer; None takes the first of the settings.
        """
        return measure_latency(
            self.dense,
            self.plan,
            self._settings,
            batch_size=batch_size,
            length=length,
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


def _in_order(results: Iterable[tuple[int, _Found]], count: int) -> list[_Found]:
    by_index = dict(results)
    return [by_index[index] for index in range(count)]
