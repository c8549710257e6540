"""Calibration files: JSON lines become checked, tokenised chunks of fixed content.

A chunk is the unit of batching and of memory. Its rows have similar prompt lengths and are padded
on the right; the lines are cut into chunks once, for all candidates. Shapes: B = lines of a chunk,
T = prompt tokens, C = continuation tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.data.lines import ImageLine, TokenizedLine, read_lines, tokenize_line
from rayapp.errors import DataError
from rayapp.pruning.evaluator.visual_words import ImageWordReader, VisualWords
from rayapp.pruning.settings.score import CHUNK_TOKENS


@dataclass(frozen=True)
class Chunk:
    """Lines that are run as one batch.

    Attributes:
        lines: Indices into :attr:`Calibration.lines`.
        prompts_BT: Prompt token ids, int64, padded on the right with 0.
        prompt_lengths_B: Number of real tokens of every prompt.
        continuations_BC: Continuation token ids, int64, padded on the right with 0; at least two
            columns.
        continuation_lengths_B: Number of real tokens of every continuation.
        positions_BT: Positions of the prompt's tokens, int64; a single row if no line has gaps.
        answer_positions_B: Positions of the first answer tokens.
        key: Hash of the chunk's content.
    """

    lines: tuple[int, ...]
    prompts_BT: torch.Tensor
    prompt_lengths_B: torch.Tensor
    continuations_BC: torch.Tensor
    continuation_lengths_B: torch.Tensor
    positions_BT: torch.Tensor
    answer_positions_B: torch.Tensor
    key: str


@dataclass(frozen=True)
class Calibration:
    """A tokenised calibration set, cut into chunks.

    ``words`` are the visual words that its images add to a model's vocabulary.
    """

    lines: tuple[TokenizedLine, ...]
    chunks: tuple[Chunk, ...]
    words: VisualWords | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the set's content and of its cut into chunks; file names do not count."""
        return _digest(
            [
                (line.task, line.prompt, line.continuation, *_about_images(line))
                for line in self.lines
            ]
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
    images: ImageWordReader | None = None,
) -> Calibration:
    """Read, check, tokenise and cut a calibration file.

    Args:
        path: JSON lines ``{"prompt": str, "completion": str}``, optionally ``"task"``, and
            ``"image"`` or ``"images"``.
        tokenizer: Tokenises prompts as the service does, and names the end marker.
        max_positions: Context of the model in tokens; None skips the check.
        chunk_tokens: Tokens of a chunk, padding included; a longer line is a chunk of its own.
        images: Reads lines about images; None if the model is text-only.

    Raises:
        DataError: The file cannot be read or is empty, or a line (named) is malformed, too long or
            about an image that cannot be used.
    """
    lines = []
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        if not isinstance(line, ImageLine):
            lines.append(tokenize_line(line, tokenizer, where, max_positions))
        elif images is None:
            raise DataError(
                f"{where}: has an image, and this model reads text only; drop the line or the key"
            )
        else:
            lines.append(images.read(line, where, Path(path).parent))
    calibration = cut(lines, chunk_tokens=chunk_tokens)
    return calibration if images is None else replace(calibration, words=images.take())


def cut(lines: Sequence[TokenizedLine], *, chunk_tokens: int = CHUNK_TOKENS) -> Calibration:
    """Cut lines into chunks by prompt length; a chunk takes lines until its padded size is full."""
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


def _padded_tokens(lines: Sequence[TokenizedLine], group: Sequence[int]) -> int:
    prompt = max(len(lines[i].prompt) for i in group)
    return len(group) * (prompt + max(len(lines[i].continuation) for i in group))


def _chunk(lines: Sequence[TokenizedLine], group: tuple[int, ...]) -> Chunk:
    prompts = [lines[i].prompt for i in group]
    continuations = [lines[i].continuation for i in group]
    about_images = [_about_images(lines[i]) for i in group]
    positions_BT, answer_positions_B = _positions(lines, group)
    return Chunk(
        lines=group,
        prompts_BT=_padded(prompts),
        prompt_lengths_B=torch.tensor([len(ids) for ids in prompts]),
        continuations_BC=_padded(continuations, width=2),  # so that decode runs a token
        continuation_lengths_B=torch.tensor([len(ids) for ids in continuations]),
        positions_BT=positions_BT,
        answer_positions_B=answer_positions_B,
        key=_digest([prompts, continuations, *([about_images] if any(about_images) else [])]),
    )


def _positions(
    lines: Sequence[TokenizedLine], group: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the prompts' tokens, and of the first answer tokens."""
    longest = max(len(lines[i].prompt) for i in group)
    ends = [len(lines[i].prompt) for i in group]
    if all(lines[i].positions is None for i in group):
        return torch.arange(longest)[None], torch.tensor(ends)
    rows = [lines[i].positions or range(end + 1) for i, end in zip(group, ends, strict=True)]
    answers_B = torch.tensor([row[-1] for row in rows])
    # Padding may have any position, since no token attends to it.
    return _padded([row[:-1] for row in rows]), answers_B


def _about_images(line: TokenizedLine) -> tuple[object, ...]:
    """The difference between image lines of equal ids: images' content, their pruning, gaps."""
    return (line.image_keys, line.positions) if line.image_keys else ()


def _padded(rows: Sequence[Sequence[int]], *, width: int = 0) -> torch.Tensor:
    padded = torch.zeros((len(rows), max(width, *map(len, rows))), dtype=torch.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
