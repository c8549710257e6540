"""Limits on images that strangers send; plain data, without torch or Pillow."""

from __future__ import annotations

import re

from pydantic import ConfigDict, Field, field_validator

from rayapp.settings import Strict

IMAGE_CACHE_BYTES = 768 * 2**20
"""Size of the cache of encoded images: about 150 of LLaVA-1.5-7B in 16 bits (project default)."""

MOST_PIXELS = 89_478_485  # Above it Pillow warns of bombs, above twice as many it refuses.
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


class ImageLimits(Strict):
    """Limits of the images that one request may send (the numbers are project defaults)."""

    model_config = ConfigDict(title="What requests may send of images")

    max_images: int = Field(
        default=8, ge=0, description="Most images of one request; 0 refuses images."
    )
    max_bytes: int = Field(
        default=20 * 2**20,
        ge=1,
        description="Most bytes of one image as it is sent; 20 MiB by default.",
        json_schema_extra={"option": "max_image_bytes"},
    )
    max_pixels: int = Field(
        default=25_000_000,
        ge=1,
        le=MOST_PIXELS,
        description="Most pixels (width x height) of one image.",
        json_schema_extra={"option": "max_image_pixels"},
    )
    max_aspect_ratio: float = Field(
        default=100.0,
        ge=1.0,
        # Processors scale the short side up, and the long one with it.
        description="Most times that an image's long side may exceed its short one.",
        json_schema_extra={"option": "max_image_aspect_ratio"},
    )
    allowed_hosts: frozenset[str] = Field(
        default=frozenset(),
        description="Host that images may be fetched from; may be given several times.",
        json_schema_extra={"option": "image_host"},
    )
    fetch_timeout_s: float = Field(
        default=10.0,
        gt=0.0,
        description="Seconds that fetching one image may take.",
        json_schema_extra={"option": "image_fetch_timeout_s"},
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: frozenset[str]) -> frozenset[str]:
        """Lower the case of host names for look-ups, and refuse strings that could never match."""
        names = frozenset(host.lower() for host in hosts)
        wrong = sorted(name for name in names if not _HOST.fullmatch(name))
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no host name; write it like images.example.com")
        return names
