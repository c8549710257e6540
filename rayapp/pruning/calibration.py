"""Calibration files: JSON lines to checked, tokenised chunks of fixed content.

A chunk is the unit of batching and of memory: rows of similar prompt length, padded on the right,
cut once for all candidates. Shapes: B = lines of a chunk, T = prompt tokens, C = continuation
tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from rayapp.errors import DataError

CHUNK_TOKENS = 4096
"""Tokens of a chunk, padding included (project default: with half as many, what a block costs
beside its products weighs on candidates that change decode alone)."""

_Kind = TypeVar("_Kind", bound=BaseModel)


class Line(BaseModel):
    """One line of a calibration file; lines without a task belong to one nameless task."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)
    task: str = ""
    image: str | None = None


@dataclass(frozen=True)
class TokenizedLine:
    """Token ids of one line; the continuation is the completion and the end marker."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    task: str


@dataclass(frozen=True)
class Chunk:
    """Lines that are run as one batch.

    Attributes:
        lines: Indices into :attr:`Calibration.lines`.
        prompts_BT: Prompt token ids, int64, padded on the right with 0.
        prompt_lengths_B: Real prompt tokens.
        continuations_BC: Continuation token ids, int64, padded on the right with 0.
        continuation_lengths_B: Real continuation tokens.
        key: Hash of the content.
    """

    lines: tuple[int, ...]
    prompts_BT: torch.Tensor
    prompt_lengths_B: torch.Tensor
    continuations_BC: torch.Tensor
    continuation_lengths_B: torch.Tensor
    key: str


@dataclass(frozen=True)
class Calibration:
    """A tokenised calibration set, cut into chunks."""

    lines: tuple[TokenizedLine, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content and of how it is cut; file names do not count."""
        return _digest(
            [(line.task, line.prompt, line.continuation) for line in self.lines]
        ) + _digest([chunk.lines for chunk in self.chunks])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(sorted({line.task for line in self.lines}))


def load_calibration(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Calibration:
    """Read, check, tokenise and cut a calibration file.

    Args:
        path: JSON lines ``{"prompt": str, "completion": str}``, optionally ``"task"`` and
            ``"image"``.
        tokenizer: Tokenises prompts as the service does; names the end marker.
        max_positions: Context of the model in tokens; None checks nothing.
        chunk_tokens: Tokens of a chunk, padding included; a longer line is a chunk of its own.

    Raises:
        DataError: The file cannot be read or is empty, or a line (named) is malformed or too long.
    """
    lines = [
        tokenize_line(line, tokenizer, f"{path} line {number}", max_positions)
        for number, line in read_lines(path)
    ]
    return cut(lines, chunk_tokens=chunk_tokens)


def read_lines(path: str | Path) -> list[tuple[int, Line]]:
    """Checked lines with their numbers, from 1; blank lines are skipped.

    Raises:
        DataError: The file cannot be read or holds no line, or a line (named) is malformed.
    """
    return [
        (number, checked_line(Line, fields, f"{path} line {number}"))
        for number, fields in read_objects(path)
    ]


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


def cut(lines: Sequence[TokenizedLine], *, chunk_tokens: int = CHUNK_TOKENS) -> Calibration:
    """Cut lines into chunks by prompt length, as many to a chunk as its padded size allows."""
    order = sorted(
        range(len(lines)), key=lambda i: (len(lines[i].prompt), len(lines[i].continuation), i)
    )
    groups: list[list[int]] = []
    for index in order:
        if groups and _padded_tokens(lines, [*groups[-1], index]) <= chunk_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return Calibration(tuple(lines), tuple(_chunk(lines, tuple(group)) for group in groups))


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
    if line.image is not None:
        raise DataError(
            f"{where}: has an image, and this model reads text only; drop the line or the key"
        )
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


def _padded_tokens(lines: Sequence[TokenizedLine], group: Sequence[int]) -> int:
    prompt = max(len(lines[i].prompt) for i in group)
    return len(group) * (prompt + max(len(lines[i].continuation) for i in group))


def _chunk(lines: Sequence[TokenizedLine], group: tuple[int, ...]) -> Chunk:
    prompts = [lines[i].prompt for i in group]
    continuations = [lines[i].continuation for i in group]
    return Chunk(
        lines=group,
        prompts_BT=_padded(prompts),
        prompt_lengths_B=torch.tensor([len(ids) for ids in prompts]),
        continuations_BC=_padded(continuations),
        continuation_lengths_B=torch.tensor([len(ids) for ids in continuations]),
        key=_digest([prompts, continuations]),
    )


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    padded = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
