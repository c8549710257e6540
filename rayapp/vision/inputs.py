"""What a request carries of an image: its bytes, and how many tokens it stands for.

The count follows from the image's size and the model's configuration alone, so whoever takes a
request in knows its unpruned length without a vision tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import PreTrainedConfig

from rayapp.errors import RequestError
from rayapp.models.blocks import MULTIMODAL_TYPES
from rayapp.vision.images import DecodedImage, check_number, decode_image
from rayapp.vision.layout import image_layout
from rayapp.vision.limits import ImageLimits

ImageSource = bytes | str | Path


@dataclass(frozen=True)
class ImageInput:
    """One encoded image of a prompt; ``num_tokens`` are its tokens in the unpruned prompt.

    ``data`` is empty where a request has left prefill behind.
    """

    data: bytes
    digest: str
    num_tokens: int

    @property
    def without_data(self) -> ImageInput:
        """The same image for a stage that never looks at it."""
        return ImageInput(b"", self.digest, self.num_tokens)


@dataclass(frozen=True)
class ImageIntake:
    """Checks and counts images for one model; loads nothing of it.

    Args:
        config: Of a model that takes images.
        limits: What one request may send.
    """

    config: PreTrainedConfig
    limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def image_token_id(self) -> int:
        """The placeholder: one of them stands for an image in a prompt."""
        return int(self.config.image_token_id)

    @classmethod
    def of(cls, config: PreTrainedConfig, limits: ImageLimits | None = None) -> ImageIntake | None:
        """The intake of a model, None where it is text-only."""
        if config.model_type not in MULTIMODAL_TYPES:
            return None
        return cls(config, limits or ImageLimits())

    def take(self, data: bytes, media_type: str | None = None) -> ImageInput:
        """An image that was decoded once, so that a broken one is refused before it waits.

        Raises:
            RequestError: It cannot be decoded within the limits.
        """
        image = decode_image(data, media_type, limits=self.limits)
        return ImageInput(data, image.digest, self.num_tokens(image.pixels))

    def take_all(self, sources: Sequence[ImageSource]) -> tuple[ImageInput, ...]:
        """The images of one prompt, from bytes or files.

        Raises:
            RequestError: Too many, unreadable, or not to be decoded within the limits.
        """
        check_number(len(sources), self.limits)
        return tuple(self.take(_bytes(source, self.limits)) for source in sources)

    def num_tokens(self, pixels: Image.Image) -> int:
        """Tokens that an image stands for, newlines included."""
        return image_layout(self.config, (pixels.height, pixels.width)).num_tokens

    def decode(self, image: ImageInput) -> DecodedImage:
        """The pixels of an image that was taken in; raises :class:`RequestError`."""
        if hashlib.sha256(image.data).hexdigest() != image.digest:
            raise RequestError("an image's bytes are not those of its digest; send it again")
        return decode_image(image.data, limits=self.limits)


def _bytes(source: ImageSource, limits: ImageLimits) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        with Path(source).open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except OSError as error:
        raise RequestError(f"{source}: cannot be read ({error.strerror})") from None
