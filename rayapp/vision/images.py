"""Images from strangers, decoded within bounded time and memory.

These properties are checked before a pixel is decoded: bytes, kind (the content must be of the kind
that the sender claims), width x height, aspect ratio, animation, and the number of scans of a
progressive JPEG. Then the image is turned upright (EXIF), laid on white where it is transparent,
and made 8-bit RGB; colour profiles are not applied. Animated images are refused, not cut to their
first frame: neither an image nor a part of one is ever silently ignored.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rayapp.errors import RequestError
from rayapp.vision.limits import ImageLimits

# Pillow's format names by media type; no other format is ever opened.
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_ALIASES = {"image/jpg": "image/jpeg"}
_DATA_URL = re.compile(r"data:([^;,]*)(;[^,]*)?,", re.IGNORECASE)
# A scan passes over the whole image and costs its sender a few bytes. Encoders write about ten.
_MAX_SCANS = 100


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image: upright 8-bit RGB pixels, and a digest of the bytes that they came from."""

    pixels: Image.Image
    digest: str


def check_number(num_images: int, limits: ImageLimits) -> None:
    """Raise :class:`RequestError` if a request has more images than allowed."""
    if num_images > limits.max_images:
        raise RequestError(
            f"{num_images} images, but at most {limits.max_images} are allowed; send fewer"
        )


def parse_data_url(url: str, limits: ImageLimits) -> tuple[bytes, str]:
    """Read the bytes and media type of a ``data:`` URL in base64.

    Raises:
        RequestError: The URL is malformed, too long, or of another kind.
    """
    head = _DATA_URL.match(url[:256])
    if head is None or (head[2] or "").lower() != ";base64":
        raise RequestError(
            "an image's data URL must begin with data:image/<png, jpeg or webp>;base64,"
        )
    encoded = url[head.end() :]
    _check_bytes(len(encoded) * 3 // 4 - 2, limits)
    try:
        data = binascii.a2b_base64(encoded.encode("ascii"), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise RequestError(f"an image's data URL is not base64 ({error}); encode it anew") from None
    return data, head[1].lower()


def decode_file(path: str | Path, limits: ImageLimits | None = None) -> DecodedImage:
    """Decode an image file, whatever its name says; raises :class:`RequestError`."""
    limits = limits or ImageLimits()
    try:
        with Path(path).open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    return decode_image(data, limits=limits)


def decode_image(
    data: bytes, media_type: str | None = None, *, limits: ImageLimits | None = None
) -> DecodedImage:
    """Decode one PNG, JPEG or WebP image.

    Args:
        data: The encoded image.
        media_type: The media type that the sender claims, which must be true. None trusts the
            content.
        limits: Limits of an image; None takes the defaults.

    Raises:
        RequestError: The image is too large, broken, animated, or of another type than claimed.
    """
    limits = limits or ImageLimits()
    _check_bytes(len(data), limits)
    kind = _sniff(data)
    if kind is None:
        raise RequestError(
            f"the image's {len(data)} bytes are no PNG, JPEG or WebP; send one of these"
        )
    claimed = None if media_type is None else media_type.lower()
    if claimed is not None and _ALIASES.get(claimed, claimed) != kind:
        raise RequestError(f"the image is sent as {media_type!r} but holds {kind}; correct one")
    if kind == "image/webp":
        _check_size(*_webp_size(data), limits)
    if kind == "image/jpeg" and data.count(b"\xff\xda") > _MAX_SCANS:
        raise RequestError(f"the JPEG has more than {_MAX_SCANS} scans; save it as a baseline JPEG")
    return DecodedImage(_decode(data, FORMATS[kind], limits), hashlib.sha256(data).hexdigest())


def _check_bytes(num_bytes: int, limits: ImageLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise RequestError(
            f"an image has more than {limits.max_bytes} bytes, the most allowed; "
            "send a smaller or more compressed one"
        )


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise RequestError(
            f"an image of {width} x {height} pixels is larger than the {limits.max_pixels} pixels "
            "allowed; send a smaller one"
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise RequestError(
            f"an image of {width} x {height} pixels is longer than {limits.max_aspect_ratio:g} "
            "times its breadth; crop it"
        )


def _sniff(data: bytes) -> str | None:
    """The media type according to the first bytes, None if it is no known one."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read width and height from the header: Pillow would allocate the canvas before that."""
    kind, body = data[12:16], data[20:30]
    if len(body) == 10 and kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if len(body) == 10 and kind == b"VP8 ":
        sides = (int.from_bytes(body[start : start + 2], "little") & 0x3FFF for start in (6, 8))
        return next(sides), next(sides)
    if len(body) >= 5 and kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    raise RequestError("the WebP image has no readable header; save it anew")


def _decode(data: bytes, form: str, limits: ImageLimits) -> Image.Image:
    """Decode to upright 8-bit RGB pixels; a decoder's exceptions become :class:`RequestError`."""
    try:
        with Image.open(io.BytesIO(data), formats=[form]) as image:
            _check_size(*image.size, limits)
            if getattr(image, "n_frames", 1) > 1:
                raise RequestError("the image is animated; send one still image")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise RequestError(
            f"the image has more than the {limits.max_pixels} pixels allowed; send a smaller one"
        ) from None
    except MemoryError:
        raise RequestError("the image does not fit into memory; send a smaller one") from None
    except Exception as error:  # noqa: BLE001 - decoders raise anything on broken input
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "broken"
        raise RequestError(f"the {form} image cannot be decoded ({reason}); save it anew") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip 16 bits of grey, not scale them.
        deep = np.asarray(image)
        grey = np.where(deep == image.info.get("transparency", -1), 255, deep >> 8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")
