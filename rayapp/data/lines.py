"""Lines of calibration and evaluation files: completions and multiple choice, checked, tokenised.

Benchmarks may stay as they are published (:mod:`rayapp.data.published_lines`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from rayapp.data.final_numbers import ANSWER_TOKENS, marked_number
from rayapp.data.json_lines import checked_line, read_objects
from rayapp.data.published_lines import as_choices, as_completion
from rayapp.errors import DataError
from rayapp.kv.forecast import RunPrompt


class Line(BaseModel):
    """One line of a calibration file; lines without a task belong to one nameless task.

    ``ends`` is false if the completion is cut off, as a text is: no end marker follows it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)
    task: str = ""
    ends: bool = True
    image: None = None


class ImageLine(BaseModel):
    """A line that asks about images; their paths are relative to the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)
    task: str = ""
    ends: bool = True
    image: str | None = Field(default=None, min_length=1)
    images: list[str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> ImageLine:
        if (self.image is None) == (self.images is None):
            raise ValueError("has both `image` and `images`; keep one of them")
        return self

    @property
    def paths(self) -> list[str]:
        """Paths of the images, as the line gives them."""
        return self.images if self.images is not None else [str(self.image)]


class ChoiceLine(BaseModel):
    """A line of a multiple-choice file; ``answer`` is the index of the right choice, from 0.

    Choices are compared without an end marker; ``ends`` concerns searches, which learn from the
    right one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)
    answer: int
    task: str = ""
    ends: bool = True

    @model_validator(mode="after")
    def _check(self) -> ChoiceLine:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"`answer` is {self.answer}, but the {len(self.choices)} choices are numbered "
                f"0 to {len(self.choices) - 1}"
            )
        blank = [number for number, choice in enumerate(self.choices) if not choice.strip()]
        if blank:
            raise ValueError(f"`choices.{blank[0]}` is blank; give at least one character")
        return self

    @property
    def answered(self) -> Line:
        """The prompt with its right choice, as a search or healing learns from it."""
        right = self.choices[self.answer]
        return Line(prompt=self.prompt, completion=right, task=self.task, ends=self.ends)


@dataclass(frozen=True)
class TokenizedLine:
    """Token ids of one line; the continuation is the completion and, if it ends, the end marker.

    Attributes:
        prompt: Token ids of the prompt that prefill runs.
        continuation: Token ids of the answer.
        task: The task that the line belongs to.
        positions: Positions of the prompt's tokens and of the first answer token, if removed visual
            tokens leave gaps; None counts from 0 without gaps.
        num_removed: Number of visual tokens that are not run.
        image_keys: Names of the images' contents, and of the way they were pruned.
        ends: Whether the continuation's last token is the end marker.
        number: The final number of a worked completion, by which answers are judged; empty of
            another one, whose answers are judged by their tokens.
        longest: Number of tokens that an answer may have which is judged by its number.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    task: str
    positions: tuple[int, ...] | None = None
    num_removed: int = 0
    image_keys: tuple[str, ...] = ()
    ends: bool = True
    number: str = ""
    longest: int = 0

    @property
    def num_answer_tokens(self) -> int:
        """Number of greedy tokens that an answer is judged by.

        A single token is judged by two, since the KV of one is never sent.
        """
        return max(2, len(self.continuation), self.longest)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of the unpruned prompt."""
        return len(self.prompt) + self.num_removed

    @property
    def run_prompt(self) -> RunPrompt:
        """The prompt as prefill runs it, which its KV message is weighed by."""
        return RunPrompt(
            self.num_prompt_tokens, self.num_removed, self.positions and self.positions[:-1]
        )


def has_images(fields: Mapping[str, Any]) -> bool:
    """Whether a line has a key for images, valid or not."""
    return fields.get("image") is not None or fields.get("images") is not None


def read_lines(path: str | Path) -> list[tuple[int, Line | ImageLine]]:
    """Checked completions with their line numbers, from 1; blank lines are skipped.

    A multiple-choice line is completed with its right choice (PDTrim calibrates on PIQA and MMLU).

    Raises:
        DataError: The file cannot be read or has no line, or a line (named) is malformed.
    """
    parsed = [
        (number, parse_line(fields, f"{path} line {number}"))
        for number, fields in read_objects(path)
    ]
    return [(n, line.answered if isinstance(line, ChoiceLine) else line) for n, line in parsed]


def parse_line(
    fields: dict[str, Any], where: str, *, whole_answers: bool = False
) -> Line | ImageLine | ChoiceLine:
    """Check a line of the kind that its keys show; raises :class:`DataError`, naming ``where``.

    ``whole_answers`` scores published questions about letters by their answers instead.
    """
    published = as_choices(fields, where, whole_answers=whole_answers)
    fields = published or as_completion(fields, where) or fields
    choices = {"choices", "answer"} & set(fields)
    if choices and has_images(fields):
        raise DataError(
            f"{where}: has an image and `{min(choices)}`, but only completions may have images; "
            "write `prompt` and `completion`, or drop the image"
        )
    if choices:
        return checked_line(ChoiceLine, fields, where)
    if has_images(fields):
        return checked_line(ImageLine, fields, where)
    return checked_line(Line, fields, where)


def tokenize_line(
    line: Line, tokenizer: PreTrainedTokenizerBase, where: str, max_positions: int | None
) -> TokenizedLine:
    """Tokenise a line; raises :class:`DataError` if it cannot be used, naming ``where``."""
    if line.ends and tokenizer.eos_token_id is None:
        raise DataError(
            f'{where}: the tokenizer names no end marker; set its eos_token, or write "ends": false'
        )
    # Our rule is stricter than the tokenizer's: a model_max_length below the context only logs a
    # warning.
    prompt = tokenizer(line.prompt, verbose=False)["input_ids"]
    completion = tokenizer(line.completion, add_special_tokens=False, verbose=False)["input_ids"]
    for name, ids in (("prompt", prompt), ("completion", completion)):
        if not ids:
            raise DataError(f"{where}: the {name} has no token; give text that the tokenizer knows")
    end = (tokenizer.eos_token_id,) if line.ends else ()
    # A single token is judged by two greedy ones, since one alone sends no KV.
    total = len(prompt) + max(2, len(completion) + len(end))
    if max_positions is not None and total > max_positions:
        marker = " + the end marker" if end else ""
        raise DataError(
            f"{where}: {len(prompt)} prompt tokens + {len(completion)} completion tokens{marker} "
            f"= {total}, but the model's context is {max_positions}; shorten the line"
        )
    number = marked_number(line.completion) or ""
    room = ANSWER_TOKENS if max_positions is None else max_positions - len(prompt)
    return TokenizedLine(
        tuple(prompt),
        (*completion, *end),
        line.task,
        ends=line.ends,
        number=number,
        longest=min(ANSWER_TOKENS, room) if number else 0,
    )
