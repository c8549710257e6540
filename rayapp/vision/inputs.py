"""An image as a request carries it: its bytes, and the number of its tokens.

The number follows from the image's size and the model's configuration alone, so the process that
accepts a request knows its unpruned length without a vision tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from transformers import PreTrainedConfig

from rayapp.errors import RequestError
from rayapp.models.architecture import MULTIMODAL_TYPES
from rayapp.vision.images import DecodedImage, check_number, decode_image
from rayapp.vision.layout import image_layout
from rayapp.vision.limits import ImageLimits

ImageSource = bytes | str | Path


@dataclass(frozen=True)
class ImageInput:
    """One encoded image of a prompt; ``num_tokens`` are its tokens in the unpruned prompt.

    ``data`` is empty once a request has left prefill behind.
    """

    data: bytes
    digest: str
    num_tokens: int

    @property
    def without_data(self) -> ImageInput:
        """The same image without bytes, for a stage that never reads them."""
        return ImageInput(b"", self.digest, self.num_tokens)


@dataclass(frozen=True)
class ImageIntake:
    """Checks images and counts their tokens for one model, without loading any of its weights.

    Args:
        config: The configuration of a model that takes images.
        limits: Limits of the images in one request.
    """

    config: PreTrainedConfig
    limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def image_token_id(self) -> int:
        """The id of the placeholder, which stands for one image in a prompt."""
        return int(self.config.image_token_id)

    @classmethod
    def of(cls, config: PreTrainedConfig, limits: ImageLimits | None = None) -> ImageIntake | None:
        """Make the intake of a model, None if it is text-only."""
        if config.model_type not in MULTIMODAL_TYPES:
            return None
        return cls(config, limits or ImageLimits())

    def take(self, data: bytes, media_type: str | None = None) -> ImageInput:
        """Accept an image: it is decoded once, so that a broken one is refused before it waits.

        Raises:
            RequestError: The image cannot be decoded within the limits.
        """
        image = decode_image(data, media_type, limits=self.limits)
        return ImageInput(data, image.digest, self.num_tokens(image.pixels))

    def take_all(self, sources: Sequence[ImageSource]) -> tuple[ImageInput, ...]:
        """Accept the images of one prompt, from bytes or files.

        Raises:
            RequestError: There are too many images, or one of them is unreadable or outside the
                limits.
        """
        check_number(len(sources), self.limits)
        return tuple(self.take(_bytes(source, self.limits)) for source in sources)

    def num_tokens(self, pixels: Image.Image) -> int:
        """Number of tokens of an image in the prompt, newlines included."""
        return image_layout(self.config, (pixels.height, pixels.width)).num_tokens

    def decode(self, image: ImageInput) -> DecodedImage:
        """Decode an accepted image to pixels, or raise :class:`RequestError`."""
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
