"""All methods of visual pruning on the same questions about images, dense beside them.

All blocks run and all KV is kept: only visual tokens differ.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.errors import DataError, InputError, PlanError
from rayapp.evaluation.data import EvaluationData, read_data
from rayapp.evaluation.evaluate import num_threads
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.visual.matches import Matches, visual_matches
from rayapp.evaluation.visual.pictures import views
from rayapp.evaluation.visual.prompts import VisualPrompts
from rayapp.evaluation.visual.result import (
    Groups,
    StageGain,
    VisualQuality,
    VisualRow,
    VisualSample,
    exact_match,
)
from rayapp.models.architecture import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.loading import load_model
from rayapp.models.stack import BlockStack
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import PruningPlan, VisualTokens
from rayapp.settings import DType, Settings
from rayapp.vision.images import decode_file
from rayapp.vision.inputs import ImageIntake
from rayapp.vision.llava import check_takes_images, load_image_processor
from rayapp.vision.reader import ImageReader, ImageSupport
from rayapp.vision.selection import METHODS

BOTH, STAGES = "trimtokenator", ("alignment", "diversity")


class StudySettings(Settings):
    """The methods, budgets and samples of a comparison.

    ``budgets`` are numbers of visual tokens kept per image. ``methods`` None takes every method
    that the model allows. ``sweep_budgets`` are the budgets at which TrimTokenator's first stage
    passes on every one of ``shares``. ``samples`` questions are pictured, with ``sample_budget``
    tokens kept (None: 64, or the largest budget if 64 is none).
    """

    budgets: tuple[int, ...] = Field(min_length=1)
    methods: tuple[str, ...] | None = None
    sweep_budgets: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    samples: int = Field(default=3, ge=0)
    sample_budget: int | None = None

    @property
    def pictured(self) -> int:
        """Number of tokens kept in pictures; raises :class:`InputError` if it is no budget."""
        if self.sample_budget is None:
            return 64 if 64 in self.budgets else max(self.budgets)
        if self.sample_budget not in self.budgets:
            raise InputError(
                f"{self.sample_budget} tokens in pictures are none of the budgets "
                f"{' '.join(map(str, self.budgets))}; choose one of these"
            )
        return self.sample_budget


def study_of(budgets: Sequence[int]) -> StudySettings:
    """The study of all methods at these budgets."""
    return StudySettings(budgets=tuple(sorted(set(budgets), reverse=True)))


def compare(
    model: str | Path,
    data: Sequence[str | Path],
    study: StudySettings,
    *,
    settings: EvaluationSettings,
    dtype: DType = "auto",
    device: str = "cpu",
    progress: ProgressCallback = silent,
) -> VisualQuality:
    """Measure the exact match of every method at every budget.

    Args:
        model: Directory of a model that takes images.
        data: JSON lines; lines about no image are left out.
        study: The comparison to make.
        settings: The limit, split and threads.
        dtype: Element type; near ties between batch shapes flip less often in float32.
        device: The device to run on.
        progress: Called question by question.

    Raises:
        ModelError: The model takes no images.
        PlanError: A chosen method cannot be applied to the model.
        DataError: The data cannot be used, or have no question about an image.
        InputError: The pictures' number of tokens is none of the budgets.
    """
    with num_threads(settings.num_threads):
        return _Study(Path(model), data, study, settings, dtype, device).measured(progress)


@dataclass(frozen=True)
class _Judged:
    """The questions that the dense model, and every rule, answered rightly."""

    lines: list[TokenizedImageLine]
    groups: Groups
    dense: Matches
    rules: dict[tuple[str, int, float | None], Matches]

    def row(self, rule: VisualTokens) -> VisualRow:
        return VisualRow.of(rule, self.rules[_key(rule)], self.dense, self.groups)

    def gain(self, num_keep: int, alone: str) -> StageGain:
        both, one = (self.rules[name, num_keep, None] for name in (BOTH, alone))
        return StageGain.of(num_keep, alone, both, one, self.groups)


def _key(rule: VisualTokens) -> tuple[str, int, float | None]:
    return rule.method, int(rule.num_keep), rule.num_aligned


class _Study:
    """A model, questions, and the methods that prune its visual tokens."""

    def __init__(
        self,
        model: Path,
        data: Sequence[str | Path],
        study: StudySettings,
        settings: EvaluationSettings,
        dtype: DType,
        device: str,
    ) -> None:
        self._begun = time.perf_counter(), time.process_time()
        self._study, self._settings, self._pictured = study, settings, study.pictured
        checkpoint = Checkpoint(model)
        check_takes_images(checkpoint.config)
        self._data = _read(checkpoint, data, settings)
        self._loaded = load_model(model, dtype=dtype, device=device)
        self._processor = load_image_processor(model)
        stack = BlockStack(self._loaded.model, PruningPlan(), "prefill")
        support = ImageSupport(self._processor)
        self._methods = _methods(ImageReader(self._loaded.model, stack, support), study.methods)
        self._prompts = VisualPrompts(
            self._loaded.model,
            stack,
            self._processor,
            cls_attention="cls_attention" in self._methods,
        )

    def measured(self, progress: ProgressCallback) -> VisualQuality:
        judged = self._judge(progress)
        visual = counts(judged.lines)
        alone = [s for s in STAGES if BOTH in self._methods and s in self._methods]
        return VisualQuality(
            model=self._loaded.signature,
            dtype=str(self._loaded.model.dtype).removeprefix("torch."),
            data=self._data.files,
            split=self._settings.split,
            num_examples={task: len(group) for task, group in judged.groups.items()},
            num_visual_tokens=(min(visual), max(visual)),
            dense=exact_match(judged.dense, judged.groups),
            rows=tuple(judged.row(rule) for rule in self._rules),
            stages=tuple(
                judged.gain(keep, stage) for keep in self._study.budgets for stage in alone
            ),
            sweep=tuple(judged.row(rule) for rule in self._sweep),
            samples=tuple(self._samples(judged)),
            machine=this_machine(
                device=str(self._loaded.model.device), num_threads=self._settings.num_threads
            ),
            wall_s=time.perf_counter() - self._begun[0],
            cpu_s=time.process_time() - self._begun[1],
        )

    @property
    def _rules(self) -> list[VisualTokens]:
        """Rules of every method at every budget."""
        budgets = self._study.budgets
        return [VisualTokens(method=m, num_keep=k) for m in self._methods for k in budgets]

    @property
    def _sweep(self) -> list[VisualTokens]:
        """Rules of TrimTokenator with other shares, if they leave enough tokens to choose from."""
        fewest = min(counts(self._data.image_lines))
        return [
            VisualTokens(method=BOTH, num_keep=keep, num_aligned=share)
            for keep in self._study.sweep_budgets
            for share in self._study.shares
            if share * fewest >= keep
        ]

    def _judge(self, progress: ProgressCallback) -> _Judged:
        lines, rules = self._data.image_lines, [*self._rules, *self._sweep]
        tasks = sorted({line.task for line in lines})
        groups = {t: [i for i, line in enumerate(lines) if line.task == t] for t in tasks}
        dense, *matches = visual_matches(
            self._prompts,
            [None, *rules],
            lines,
            end_token_ids=self._loaded.eos_token_ids,
            progress=progress,
        )
        return _Judged(lines, groups, dense, dict(zip(map(_key, rules), matches, strict=True)))

    def _samples(self, judged: _Judged) -> list[VisualSample]:
        """One question of each of the first tasks, at another place in each, so images differ."""
        groups = [*judged.groups.values()][: self._study.samples]
        shown = [group[number % len(group)] for number, group in enumerate(groups)]
        return [self._sample(judged, index, self._pictured) for index in shown]

    def _sample(self, judged: _Judged, index: int, keep: int) -> VisualSample:
        line = judged.lines[index]
        question, decode = self._prompts.ask(line), self._loaded.tokenizer.decode
        kept = {m: question.kept(VisualTokens(method=m, num_keep=keep)) for m in self._methods}
        shown = [
            view
            for number, (path, image) in enumerate(zip(line.images, question.images, strict=True))
            for view in views(
                self._processor,
                decode_file(path).pixels,
                image.layout,
                {method: places[number] for method, places in kept.items()},
            )
        ]
        return VisualSample(
            task=line.task,
            question=decode(line.words),
            answer=decode(line.continuation[:-1]),
            num_keep=keep,
            is_match={m: bool(judged.rules[m, keep, None][index]) for m in self._methods},
            views=tuple(shown),
        )


def counts(lines: Sequence[TokenizedImageLine]) -> list[int]:
    """Numbers of visual tokens of the questions' images before pruning."""
    return [len(line.prompt) - len(line.asked) + len(line.images) for line in lines]


def _read(
    checkpoint: Checkpoint, data: Sequence[str | Path], settings: EvaluationSettings
) -> EvaluationData:
    evaluation_data = read_data(
        data,
        load_tokenizer(checkpoint.path),
        max_positions=text_config(checkpoint.config).max_position_embeddings,
        settings=settings,
        images=ImageIntake.of(checkpoint.config),
    )
    if not evaluation_data.image_lines:
        raise DataError("the data hold no question about an image; give lines with `image`")
    return evaluation_data


def _methods(reader: ImageReader, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The wanted methods, or all that the model allows."""
    methods = []
    for method in METHODS if wanted is None else wanted:
        try:
            reader.check_rule(VisualTokens(method=method, num_keep=1))
        except PlanError:
            if wanted is not None:
                raise
        else:
            methods.append(method)
    return tuple(methods)
