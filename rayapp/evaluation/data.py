"""Evaluation files: JSON lines of three kinds, sorted by task.

A line is a completion ``{"prompt", "completion"}``, a multiple choice ``{"prompt", "choices",
"answer"}`` or a text ``{"text"}``; any line may name its ``"task"``. A completion may be about
images (:mod:`rayapp.data.image_lines`). A file may mix kinds, but a task may not, because its
numbers would be of two sorts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rayapp.data.image_lines import ImageLineReader, TokenizedImageLine
from rayapp.data.json_lines import checked_line, read_objects
from rayapp.data.lines import (
    ChoiceLine,
    ImageLine,
    Line,
    TokenizedLine,
    has_images,
    parse_line,
    tokenize_line,
)
from rayapp.errors import DataError
from rayapp.evaluation.measures.choices import Question, tokenize_question
from rayapp.evaluation.measures.perplexity import TextLine, Windows, cut_windows
from rayapp.evaluation.result import DataFile
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.plan import Stage
from rayapp.vision.inputs import ImageIntake

Kind = Literal["completions", "choices", "texts"]
EvaluationLine = Line | ImageLine | ChoiceLine | TextLine


@dataclass(frozen=True)
class EvaluationData:
    """Tokenised examples by task, sorted by its name.

    A task has at most ``limit`` examples.
    """

    files: tuple[DataFile, ...]
    completions: Mapping[str, Sequence[TokenizedLine]] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    texts: Mapping[str, Windows] = field(default_factory=dict)

    @property
    def image_lines(self) -> list[TokenizedImageLine]:
        """Completions about images."""
        lines = (line for task in self.completions.values() for line in task)
        return [line for line in lines if isinstance(line, TokenizedImageLine)]


def read_data(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int,
    settings: EvaluationSettings,
    images: ImageIntake | None = None,
    first_token: Stage = "prefill",
) -> EvaluationData:
    """Read, check and tokenise files of lines of any kind.

    Args:
        paths: The files.
        tokenizer: Tokenises prompts as the service does.
        max_positions: Context of the model in tokens.
        settings: Settings of the evaluation; they limit examples and say how texts are cut.
        images: Checks and counts images; None if the model is text-only.
        first_token: The stage that samples the first token, and runs the last prompt token.

    Raises:
        DataError: There is no file, one cannot be read or is empty, a line (named) is malformed,
            too long or about an image that cannot be used, or a task has lines of two kinds.
    """
    if not paths:
        raise DataError("no data: give at least one file of JSON lines")
    reader = ImageLineReader(tokenizer, images, max_positions, ends_in_text=first_token == "decode")
    sorter = _Sorter(tokenizer, max_positions, reader)
    files = tuple(sorter.read(Path(path)) for path in paths)
    limit = settings.limit
    return EvaluationData(
        files,
        {task: lines[:limit] for task, lines in sorted(sorter.completions.items())},
        {task: questions[:limit] for task, questions in sorted(sorter.choices.items())},
        {
            task: cut_windows(
                texts, tokenizer, settings=settings, max_positions=max_positions, task=task
            )
            for task, texts in sorted(sorter.texts.items())
        },
    )


def parse_any(fields: dict[str, Any], where: str) -> EvaluationLine:
    """A checked line of any kind; raises :class:`DataError`, naming ``where``."""
    if "text" not in fields:
        return parse_line(fields, where)
    if has_images(fields):
        raise DataError(
            f"{where}: has an image and `text`, but only completions may have images; "
            "write `prompt` and `completion`, or drop the image"
        )
    return checked_line(TextLine, fields, where)


def kind_of(line: EvaluationLine) -> Kind:
    """The kind of measurement that fits a line."""
    if isinstance(line, TextLine):
        return "texts"
    return "choices" if isinstance(line, ChoiceLine) else "completions"


class _Sorter:
    """Lines by kind and task, sorted as they are read."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_positions: int, images: ImageLineReader
    ) -> None:
        self._tokenizer, self._max_positions = tokenizer, max_positions
        self._images = images
        self._kinds: dict[str, tuple[Kind, str]] = {}
        self.completions: dict[str, list[TokenizedLine]] = {}
        self.choices: dict[str, list[Question]] = {}
        self.texts: dict[str, list[str]] = {}

    def read(self, path: Path) -> DataFile:
        objects = read_objects(path)
        for number, fields in objects:
            where = f"{path} line {number}"
            line = parse_any(fields, where)
            self._check_kind(line, where)
            self._add(line, where, path.parent)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return DataFile(name=path.name, sha256=digest, num_examples=len(objects))

    def _check_kind(self, line: EvaluationLine, where: str) -> None:
        kind = kind_of(line)
        known, first = self._kinds.setdefault(line.task, (kind, where))
        if kind != known:
            name = f"task {line.task!r}" if line.task else "the nameless task"
            raise DataError(
                f"{where}: {name} holds {kind} here and {known} in {first}; "
                "give every kind a task of its own"
            )

    def _add(self, line: EvaluationLine, where: str, directory: Path) -> None:
        options = (self._tokenizer, where, self._max_positions)
        if isinstance(line, TextLine):
            self.texts.setdefault(line.task, []).append(line.text)
        elif isinstance(line, ChoiceLine):
            self.choices.setdefault(line.task, []).append(tokenize_question(line, *options))
        else:
            tokenized = (
                self._images.read(line, where, directory)
                if isinstance(line, ImageLine)
                else tokenize_line(line, *options)
            )
            self.completions.setdefault(line.task, []).append(tokenized)
