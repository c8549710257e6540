"""Images from strangers: right pixels for every ordinary kind, a clear 4xx for everything else."""

from __future__ import annotations

import base64
import io
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from rayapp.errors import RequestError
from rayapp.vision.images import (
    ImageLimits,
    decode_file,
    decode_image,
    parse_data_url,
)

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
LIMITS = ImageLimits()
RED, GREEN, BLUE = (230, 20, 30), (20, 200, 40), (10, 30, 220)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def quadrants(mode: str = "RGB") -> Image.Image:
    """Red, green, blue, white; large enough that JPEG keeps the colours."""
    image = Image.new("RGB", (64, 48), "white")
    image.paste(RED, (0, 0, 32, 24))
    image.paste(GREEN, (32, 0, 64, 24))
    image.paste(BLUE, (0, 24, 32, 48))
    return image.convert(mode)


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    return [image.getpixel(at) for at in ((8, 8), (56, 8), (8, 40), (56, 40))]


def near(found: object, expected: object, tolerance: int = 12) -> bool:
    return bool(np.abs(np.array(found, int) - np.array(expected, int)).max() <= tolerance)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_rgb_and_a_digest_of_its_bytes(form: str) -> None:
    data = encode(quadrants(), form)
    decoded = decode_image(data, FORMATS[form])
    assert decoded.pixels.mode == "RGB"
    assert decoded.pixels.size == (64, 48)
    assert near(corners(decoded.pixels), [RED, GREEN, BLUE, (255, 255, 255)])
    assert decoded.digest == decode_image(data).digest
    assert decoded.digest != decode_image(encode(quadrants().rotate(90), form)).digest


@pytest.mark.parametrize(
    ("mode", "form"),
    [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("L", "WEBP")],
)
def test_other_colour_modes_become_rgb(mode: str, form: str) -> None:
    decoded = decode_image(encode(quadrants(mode), form)).pixels
    assert decoded.mode == "RGB"
    reference = quadrants(mode).convert("RGB")
    assert near(corners(decoded), corners(reference), 30 if form == "JPEG" else 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparent_pixels_lie_on_white(form: str) -> None:
    image = quadrants("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 24))
    image.paste((0, 0, 0, 128), (32, 0, 64, 24))
    options = {"lossless": True} if form == "WEBP" else {}
    found = corners(decode_image(encode(image, form, **options)).pixels)
    assert near(found, [(255,) * 3, (127,) * 3, BLUE, (255,) * 3], 3)


@pytest.mark.parametrize("mode", ["LA", "P", "RGB", "L"])
def test_every_kind_of_transparency_counts(mode: str) -> None:
    if mode == "LA":
        data = encode(Image.new("LA", (8, 8), (0, 0)))
    elif mode == "P":
        data = encode(Image.new("P", (8, 8), 0), transparency=0)
    else:
        black = 0 if mode == "L" else (0, 0, 0)
        data = encode(Image.new(mode, (8, 8), black), transparency=black)
    assert decode_image(data).pixels.getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp))).pixels)
    assert near(decoded[..., 0], ramp >> 8, 1)
    assert decoded.max() == 255


def test_sixteen_bit_transparency_counts() -> None:
    ramp = np.full((4, 4), 300, dtype=np.uint16)
    ramp[0, 0] = 40000
    data = encode(Image.fromarray(ramp))
    at = data.index(b"IDAT") - 4
    with_key = data[:at] + chunk(b"tRNS", struct.pack(">H", 300)) + data[at:]
    decoded = np.asarray(decode_image(with_key).pixels)
    assert decoded[0, 0].tolist() == [156] * 3
    assert decoded[1:].min() == 255


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quadrants().transpose(undo[orientation]) if orientation > 1 else quadrants()
    decoded = decode_image(encode(stored, form, exif=exif)).pixels
    assert decoded.size == (64, 48)
    assert near(corners(decoded), [RED, GREEN, BLUE, (255, 255, 255)])


@pytest.mark.parametrize("form", FORMATS)
def test_one_pixel_is_an_image(form: str) -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), RED), form)).pixels.size == (1, 1)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_images_are_refused(form: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), form)
    with pytest.raises(RequestError):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animated_images_are_refused(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    with pytest.raises(RequestError, match="animated"):
        decode_image(data)


@pytest.mark.parametrize(("claimed", "form"), [("image/png", "JPEG"), ("image/jpeg", "WEBP")])
def test_a_wrong_media_type_is_refused(claimed: str, form: str) -> None:
    with pytest.raises(RequestError, match=claimed):
        decode_image(encode(quadrants(), form), claimed)
    assert decode_image(encode(quadrants(), "JPEG"), "image/JPG")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_never_opened(form: str) -> None:
    with pytest.raises(RequestError, match="no PNG, JPEG or WebP"):
        decode_image(encode(quadrants(), form))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
def test_headers_alone_are_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        decode_image(data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    """A few kilobytes that say they are a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(5_000_000), 1)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def jpeg_bomb() -> bytes:
    """A huge frame in the header of a small progressive file."""
    data = bytearray(encode(quadrants(), "JPEG", progressive=True))
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def webp_bomb() -> bytes:
    data = bytearray(encode(quadrants("RGBA"), "WEBP", lossless=True, exif=Image.Exif()))
    if data[12:16] == b"VP8L":
        data[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    else:
        data[24:30] = b"\xfe\x3f\x00\xfe\x3f\x00"
    return bytes(data)


def scan_bomb() -> bytes:
    """One scan after the other, each a few bytes and a pass over the image."""
    data = encode(quadrants().resize((2000, 2000)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * 2000 + data[-2:]


@pytest.mark.parametrize(
    "bomb", [lambda: png_bomb(60_000, 60_000), jpeg_bomb, webp_bomb, scan_bomb]
)
def test_bombs_are_refused_at_once_and_unopened(bomb: Callable[[], bytes]) -> None:
    data = bomb()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    with pytest.raises(RequestError, match=r"pixels|scans"):
        decode_image(data)
    assert time.process_time() - begun < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_text_bombs_inside_a_png_are_bounded() -> None:
    data = encode(Image.new("RGB", (4, 4)))
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000), 1))
    begun = time.process_time()
    with pytest.raises(RequestError):
        decode_image(data[:33] + text + data[33:])
    assert time.process_time() - begun < 2.0


def test_caps_are_exact() -> None:
    data = encode(quadrants())
    assert decode_image(data, limits=ImageLimits(max_pixels=64 * 48, max_bytes=len(data)))
    with pytest.raises(RequestError, match="64 x 48"):
        decode_image(data, limits=ImageLimits(max_pixels=64 * 48 - 1))
    with pytest.raises(RequestError, match=f"more than {len(data) - 1} bytes"):
        decode_image(data, limits=ImageLimits(max_bytes=len(data) - 1))


def test_a_thread_is_no_image() -> None:
    """Scaled to the tower's size on the short side, its long side would be millions of pixels."""
    for size in ((3, 301), (301, 3)):
        with pytest.raises(RequestError, match="crop it"):
            decode_image(encode(Image.new("RGB", size)))
    assert decode_image(encode(Image.new("RGB", (3, 300))))


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def test_data_urls() -> None:
    data = encode(quadrants())
    assert parse_data_url(data_url(data), LIMITS) == (data, "image/png")
    assert parse_data_url(data_url(data, "IMAGE/PNG"), LIMITS) == (data, "image/png")


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;charset=utf-8,abc",
        "data:image/png;base64,a",
        "data:image/png;base64,????",
        "data:image/png;base64,ÄÖÜß",
        "data:image/png;base64,QUJD\n",
        "data:" + "x" * 5000 + ";base64,QUJD",
    ],
)
def test_malformed_data_urls_are_refused(url: str) -> None:
    with pytest.raises(RequestError, match="data URL"):
        parse_data_url(url, LIMITS)


def test_a_long_data_url_is_refused_before_it_is_decoded() -> None:
    limits = ImageLimits(max_bytes=300)
    assert len(parse_data_url(data_url(bytes(300)), limits)[0]) == 300
    with pytest.raises(RequestError, match="300 bytes"):
        parse_data_url(data_url(bytes(306)), limits)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.png"
    path.write_bytes(encode(quadrants(), "JPEG"))
    assert decode_file(path).pixels.size == (64, 48)
    with pytest.raises(RequestError, match="bytes"):
        decode_file(path, ImageLimits(max_bytes=100))
    with pytest.raises(RequestError, match="cannot be read"):
        decode_file(tmp_path / "missing.png")


SAMPLES = [encode(quadrants(), form) for form in FORMATS]
BOUNDED = ImageLimits(max_pixels=10_000)


def refusal(action: Callable[[], object]) -> RequestError | None:
    """The refusal of an action, None if it is accepted; other exceptions fail the test."""
    try:
        action()
    except RequestError as error:
        return error
    return None


def decodes_or_refuses(data: bytes) -> None:
    begun = time.process_time()
    error = refusal(lambda: decode_image(data, limits=BOUNDED))
    assert error is None or (error.status == 400 and "\n" not in str(error))
    assert time.process_time() - begun < 5.0


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([s[:16] for s in SAMPLES]), st.binary(max_size=400))
@example(b"", b"")
def test_random_bytes_never_escape(head: bytes, tail: bytes) -> None:
    decodes_or_refuses(head + tail)


@settings(
    max_examples=250,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=12),
    st.integers(0, 40),
)
def test_damaged_images_never_escape(sample: bytes, edits: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(sample)
    for place, value in edits:
        damaged[place % len(damaged)] = value
    decodes_or_refuses(bytes(damaged[: len(damaged) - cut]))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["", "data:", "data:image/png;base64,"]))
def test_random_urls_never_escape(text: str, head: str) -> None:
    error = refusal(lambda: parse_data_url(head + text, LIMITS))
    assert error is None or error.status == 400
