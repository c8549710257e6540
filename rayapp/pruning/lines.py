"""Lines of calibration and evaluation files: read, checked, tokenised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from rayapp.errors import DataError
from rayapp.kv.forecast import RunPrompt

_Kind = TypeVar("_Kind", bound=BaseModel)


class Line(BaseModel):
    """One line of a calibration file; lines without a task belong to one nameless task."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)
    task: str = ""
    image: None = None


class ImageLine(BaseModel):
    """A line that asks about images; their paths are relative to the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)
    task: str = ""
    image: str | None = Field(default=None, min_length=1)
    images: list[str] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> ImageLine:
        if (self.image is None) == (self.images is None):
            raise ValueError("has both `image` and `images`; keep one of them")
        return self

    @property
    def paths(self) -> list[str]:
        """As they are written."""
        return self.images if self.images is not None else [str(self.image)]


@dataclass(frozen=True)
class TokenizedLine:
    """Token ids of one line; the continuation is the completion and the end marker.

    Attributes:
        prompt: What prefill runs of it.
        continuation: What it is answered with.
        task: The task that the line belongs to.
        positions: Of the prompt's tokens and of the first answer token, where visual tokens that
            were removed leave gaps; None: one after the other, from 0.
        num_removed: Visual tokens that are not run.
        image_keys: Names of the images' contents, and of how they were pruned.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    task: str
    positions: tuple[int, ...] | None = None
    num_removed: int = 0
    image_keys: tuple[str, ...] = ()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the unpruned prompt."""
        return len(self.prompt) + self.num_removed

    @property
    def run_prompt(self) -> RunPrompt:
        """What its KV message is weighed by."""
        return RunPrompt(
            self.num_prompt_tokens, self.num_removed, self.positions and self.positions[:-1]
        )


def has_images(fields: Mapping[str, Any]) -> bool:
    """Whether a line names images, rightly or not."""
    return fields.get("image") is not None or fields.get("images") is not None


def read_lines(path: str | Path) -> list[tuple[int, Line | ImageLine]]:
    """Checked lines with their numbers, from 1; blank lines are skipped.

    Raises:
        DataError: The file cannot be read or holds no line, or a line (named) is malformed.
    """
    return [
        (number, parse_completion(fields, f"{path} line {number}"))
        for number, fields in read_objects(path)
    ]


def parse_completion(fields: dict[str, Any], where: str) -> Line | ImageLine:
    """A checked line, about images or not; raises :class:`DataError`, naming ``where``."""
    if has_images(fields):
        return checked_line(ImageLine, fields, where)
    return checked_line(Line, fields, where)


def read_objects(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with their line numbers, from 1; blank lines are skipped.

    Raises:
        DataError: The file cannot be read or holds no line, or a line (named) is no JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}); give a file of JSON lines") from None
    numbered = enumerate(text.split("\n"), start=1)
    lines = [
        (number, _object(raw, f"{path} line {number}")) for number, raw in numbered if raw.strip()
    ]
    if not lines:
        raise DataError(
            f'{path}: holds no line; write {{"prompt": ..., "completion": ...}} per line'
        )
    return lines


def checked_line(kind: type[_Kind], fields: dict[str, Any], where: str) -> _Kind:
    """A line of some kind; raises :class:`DataError` naming ``where`` and every broken rule."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise DataError(
            f"{where}: " + "; ".join(_explain(kind, each) for each in error.errors())
        ) from None


def _object(raw: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}); write one JSON object per line"
        ) from None
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: a {type(fields).__name__}, not a JSON object; write one JSON object per line"
        )
    return fields


def _explain(kind: type[BaseModel], error: Any) -> str:
    key, message = ".".join(map(str, error["loc"])), str(error["msg"]).removeprefix("Value error, ")
    needed = [name for name, each in kind.model_fields.items() if each.is_required()]
    rules = {
        "missing": f"`{key}` is missing; every line needs {_listed(needed)}",
        "extra_forbidden": f"unknown key `{key}`; use {_listed(list(kind.model_fields))}",
        "string_too_short": f"`{key}` is empty; give at least one character",
        "string_type": f"`{key}` is not a string; put it in quotes",
    }
    return rules.get(error["type"], f"`{key}`: {message}" if key else message)


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def tokenize_line(
    line: Line, tokenizer: PreTrainedTokenizerBase, where: str, max_positions: int | None
) -> TokenizedLine:
    """Token ids of a line; raises :class:`DataError` where it cannot be used, naming ``where``."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"{where}: the tokenizer names no end marker; set its eos_token")
    # A model_max_length below the context would only log a warning here: our own rule is stricter.
    prompt = tokenizer(line.prompt, verbose=False)["input_ids"]
    completion = tokenizer(line.completion, add_special_tokens=False, verbose=False)["input_ids"]
    for name, ids in (("prompt", prompt), ("completion", completion)):
        if not ids:
            raise DataError(f"{where}: the {name} has no token; give text that the tokenizer knows")
    total = len(prompt) + len(completion) + 1
    if max_positions is not None and total > max_positions:
        raise DataError(
            f"{where}: {len(prompt)} prompt tokens + {len(completion)} completion tokens + the "
            f"end marker = {total}, but the model's context is {max_positions}; shorten the line"
        )
    return TokenizedLine(tuple(prompt), (*completion, tokenizer.eos_token_id), line.task)
