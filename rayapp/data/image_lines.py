"""Completions about images: read, checked and tokenised like any other, for models that see.

A line is a completion with a path in ``"image"``, or several in ``"images"``; paths are relative to
the data file. Images come first unless the prompt has their placeholders. Images are aligned
(:mod:`rayapp.vision.tokens`) with the prompt's words, placeholders left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayapp.data.lines import ImageLine, Line, TokenizedLine, tokenize_line
from rayapp.engine.local import ImagePrompt, Prompt, with_places
from rayapp.errors import DataError, RequestError
from rayapp.vision.images import check_number
from rayapp.vision.inputs import ImageIntake
from rayapp.vision.prompt import check_places


@dataclass(frozen=True, kw_only=True)
class TokenizedImageLine(TokenizedLine):
    """Token ids of a completion about images.

    Attributes:
        prompt: The unpruned prompt: a placeholder for every token of every image.
        asked: Token ids of the prompt as it is sent, with one placeholder per image.
        words: Token ids of the user's words.
        images: Files of the images, in the order of the placeholders.
    """

    asked: tuple[int, ...]
    words: tuple[int, ...]
    images: tuple[Path, ...]

    @property
    def image_prompt(self) -> ImagePrompt:
        """The prompt that a pipeline gets for this line."""
        return ImagePrompt(self.asked, self.images, self.words)


def prompt_of(line: TokenizedLine) -> Prompt:
    """The prompt that a pipeline gets for any line."""
    return line.image_prompt if isinstance(line, TokenizedImageLine) else line.prompt


class ImageLineReader:
    """Tokenises image lines for one model.

    Every image is decoded once, so that an unreadable one is named.

    Args:
        tokenizer: The model's tokenizer, which names the end marker.
        intake: Checks and counts images; None if the model is text-only.
        max_positions: Context of the model in tokens.
        ends_in_text: Whether the last prompt token must be text, because decode runs it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        intake: ImageIntake | None,
        max_positions: int,
        *,
        ends_in_text: bool = False,
    ) -> None:
        self._tokenizer, self._intake, self._max_positions = tokenizer, intake, max_positions
        self._ends_in_text = ends_in_text
        self._counts: dict[Path, int] = {}

    def read(self, line: ImageLine, where: str, directory: Path) -> TokenizedImageLine:
        """Token ids of a line whose paths begin at ``directory``.

        Raises:
            DataError: The line (named by ``where``) cannot be used: the model is text-only, an
                image is missing or unreadable, or it is too long.
        """
        if self._intake is None:
            raise DataError(
                f"{where}: has an image, and this model reads text only; drop the line or the key"
            )
        try:
            check_number(len(line.paths), self._intake.limits)
            counts = [
                self._num_tokens(directory / path, self._intake, f"{where}: image {path!r}")
                for path in line.paths
            ]
            return self._tokenized(line, where, directory, counts, self._intake.image_token_id)
        except RequestError as error:
            raise DataError(f"{where}: {error}") from None

    def _num_tokens(self, path: Path, intake: ImageIntake, where: str) -> int:
        """Number of an image's tokens, remembered because many questions may be about one image."""
        if path in self._counts:
            return self._counts[path]
        try:
            if not path.is_file():
                raise DataError(f"{where} is no file; give a path relative to the data file")
            (taken,) = intake.take_all([path])
        except (RequestError, OSError) as error:
            raise DataError(f"{where}: {error}") from None
        self._counts[path] = taken.num_tokens
        return taken.num_tokens

    def _tokenized(
        self,
        line: ImageLine,
        where: str,
        directory: Path,
        counts: Sequence[int],
        place_id: int,
    ) -> TokenizedImageLine:
        place = str(self._tokenizer.convert_ids_to_tokens(place_id))
        prompt = with_places(line.prompt, place, len(counts))
        plain = Line(prompt=prompt, completion=line.completion, task=line.task, ends=line.ends)
        tokens = tokenize_line(plain, self._tokenizer, where, None)
        check_places(tokens.prompt, place_id, len(counts))
        if self._ends_in_text and tokens.prompt[-1] == place_id:
            raise DataError(
                f"{where}: the prompt ends with an image, but under this plan decode runs its last "
                "token; put text after the image"
            )
        unpruned = tuple(_expanded(tokens.prompt, place_id, counts))
        total = len(unpruned) + len(tokens.continuation)
        if total > self._max_positions:
            raise DataError(
                f"{where}: {len(unpruned)} prompt tokens, {sum(counts)} of them of images, + "
                f"{len(tokens.continuation)} of the completion"
                f"{' and the end marker' if line.ends else ''} = {total}, but "
                f"the model's context is {self._max_positions}; shorten the line"
            )
        words = self._tokenizer(
            line.prompt.replace(place, ""), add_special_tokens=False, verbose=False
        )["input_ids"]
        images = tuple(directory / path for path in line.paths)
        return TokenizedImageLine(
            prompt=unpruned,
            continuation=tokens.continuation,
            task=line.task,
            ends=line.ends,
            asked=tokens.prompt,
            words=tuple(words),
            images=images,
        )


def _expanded(token_ids: Sequence[int], place_id: int, counts: Sequence[int]) -> Iterator[int]:
    """The prompt with every placeholder repeated for each token of its image."""
    left = iter(counts)
    for token in token_ids:
        yield from [token] * (next(left) if token == place_id else 1)
