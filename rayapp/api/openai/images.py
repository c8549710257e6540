"""Images of a request, fetched and checked off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rayapp.vision.fetch import image_bytes
from rayapp.vision.images import check_number
from rayapp.vision.inputs import ImageInput, ImageIntake

# Every thread may keep one decoded image, so this bounds memory too (project default).
_NUM_THREADS = 4


class ImageLoader:
    """Fetches and checks images on a few threads of its own.

    Args:
        intake: Checks and counts images for the served model.
    """

    def __init__(self, intake: ImageIntake) -> None:
        self._intake = intake
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="rayapp-images")

    async def load(self, urls: Sequence[str]) -> tuple[ImageInput, ...]:
        """Load the images behind ``data:`` URLs, or behind addresses that the limits allow.

        Raises:
            RequestError: There are too many images, or one of them cannot be fetched in time or is
                outside the limits.
        """
        check_number(len(urls), self._intake.limits)
        loop = asyncio.get_running_loop()
        loading = [loop.run_in_executor(self._threads, self._load, url) for url in urls]
        return tuple(await asyncio.gather(*loading))

    def _load(self, url: str) -> ImageInput:
        data, media_type = image_bytes(url, self._intake.limits)
        return self._intake.take(data, media_type)
