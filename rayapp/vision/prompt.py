"""The language model's input: text embeddings, with each image's kept tokens in its place.

Shapes: N = tokens of an image, T = tokens run, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from rayapp.errors import RequestError
from rayapp.vision.selection import EncodedImage

Positions = Literal["original", "compact"]


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embeddings and positions that prefill runs instead of token ids.

    ``hidden_TE`` enters block 0 at ``positions_T`` (int64, ascending). ``next_position`` is that of
    the first answer token. ``num_prompt_tokens`` counts the unpruned prompt, all of its
    ``num_visual_tokens`` included (newlines too). ``image_spans`` has the ``(start, stop)`` of
    every image among the T tokens run.
    """

    hidden_TE: torch.Tensor
    positions_T: torch.Tensor
    next_position: int
    num_prompt_tokens: int
    num_visual_tokens: int
    image_spans: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are run, T, which is the number of KV entries of every block."""
        return int(self.hidden_TE.shape[0])

    @property
    def num_visual_tokens_removed(self) -> int:
        """Number of image tokens that are not run."""
        return self.num_prompt_tokens - self.num_tokens

    @property
    def is_compact(self) -> bool:
        """True if positions leave no gaps where tokens were removed."""
        return self.next_position < self.num_prompt_tokens


def text_prompt(
    token_ids: Sequence[int], embed: Callable[[torch.Tensor], torch.Tensor]
) -> PromptEmbeddings:
    """Embed a prompt without images; the arguments are those of :func:`assemble`."""
    length = len(token_ids)
    return PromptEmbeddings(
        hidden_TE=embed(torch.tensor([token_ids], dtype=torch.int64))[0],
        positions_T=torch.arange(length),
        next_position=length,
        num_prompt_tokens=length,
        num_visual_tokens=0,
        image_spans=(),
    )


def num_unpruned(token_ids: Sequence[int], image_tokens: Sequence[int]) -> int:
    """Number of tokens of the unpruned prompt, with all tokens of an image for its placeholder."""
    return len(token_ids) - len(image_tokens) + sum(image_tokens)


def check_places(token_ids: Sequence[int], image_token_id: int, num_images: int) -> None:
    """Raise :class:`RequestError` unless the prompt has exactly one placeholder per image."""
    num_places = sum(token == image_token_id for token in token_ids)
    if num_places != num_images:
        raise RequestError(
            f"the prompt has {num_places} image placeholders but {num_images} images were sent; "
            "send one image per placeholder, and do not write the placeholder as text"
        )


def assemble(
    token_ids: Sequence[int],
    images: Sequence[EncodedImage],
    kept: Sequence[torch.Tensor] | None,
    *,
    embed: Callable[[torch.Tensor], torch.Tensor],
    image_token_id: int,
    positions: Positions = "original",
) -> PromptEmbeddings:
    """Put the kept tokens of every image at the place of its placeholder.

    Args:
        token_ids: The prompt, one placeholder per image.
        images: Features of the images, in prompt order.
        kept: The kept places of every image, ascending; None keeps all.
        embed: A function from token ids ``(1, T)`` to embeddings ``(1, T, E)``.
        image_token_id: The id of the image placeholder.
        positions: ``original`` leaves the gaps of removed tokens, ``compact`` closes them.

    Raises:
        RequestError: Placeholders and images do not match.
    """
    check_places(token_ids, image_token_id, len(images))
    text_TE = embed(torch.tensor([token_ids], dtype=torch.int64))[0]
    prompt, taken, spans = _Growing(), 0, []
    at = [index for index, token in enumerate(token_ids) if token == image_token_id]
    for number, (index, image) in enumerate(zip(at, images, strict=True)):
        prompt.add(text_TE[taken:index], torch.arange(index - taken), index - taken)
        kept_K = torch.arange(image.num_tokens) if kept is None else kept[number]
        features_KE = image.features_ND[kept_K.to(image.features_ND.device)]
        spans.append(prompt.add(features_KE.to(text_TE), kept_K.cpu(), image.num_tokens))
        taken = index + 1
    num_left = len(token_ids) - taken
    prompt.add(text_TE[taken:], torch.arange(num_left), num_left)
    places_T = torch.cat(prompt.places)
    compact = positions == "compact"
    return PromptEmbeddings(
        hidden_TE=torch.cat(prompt.hidden),
        positions_T=torch.arange(prompt.num_run) if compact else places_T,
        next_position=prompt.num_run if compact else prompt.num_unpruned,
        num_prompt_tokens=prompt.num_unpruned,
        num_visual_tokens=sum(image.num_tokens for image in images),
        image_spans=tuple(spans),
    )


@dataclass
class _Growing:
    """A prompt under construction: runs of text and images, one after the other."""

    hidden: list[torch.Tensor] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)
    num_unpruned: int = 0
    num_run: int = 0

    def add(
        self, hidden_KE: torch.Tensor, kept_K: torch.Tensor, num_tokens: int
    ) -> tuple[int, int]:
        """Append K kept of ``num_tokens`` tokens; return their span in the tokens run."""
        start = self.num_run
        self.hidden.append(hidden_KE)
        self.places.append(kept_K + self.num_unpruned)
        self.num_unpruned += num_tokens
        self.num_run += int(kept_K.shape[0])
        return start, self.num_run
