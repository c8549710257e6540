"""A cache of encoded images, so that an image that comes again skips the vision tower."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from rayapp.vision.limits import IMAGE_CACHE_BYTES
from rayapp.vision.selection import EncodedImage


@dataclass(frozen=True)
class CacheCounts:
    """Counts of a cache of encoded images; every miss ran the vision tower."""

    hits: int
    misses: int
    num_images: int
    num_bytes: int
    max_bytes: int


class ImageCache:
    """A cache of encoded images by key, which drops the least recently used image first.

    Args:
        max_bytes: Limit of the cache's bytes; an image that is larger alone is not kept.
    """

    def __init__(self, max_bytes: int = IMAGE_CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._images: OrderedDict[tuple[str, str], EncodedImage] = OrderedDict()
        self._hits = self._misses = 0

    def __len__(self) -> int:
        return len(self._images)

    @property
    def counts(self) -> CacheCounts:
        """The number of hits, misses, images and bytes."""
        return CacheCounts(self._hits, self._misses, len(self), self.nbytes, self.max_bytes)

    def get(self, key: tuple[str, str], *, cls_attention: bool = False) -> EncodedImage | None:
        """Return the image of a key, which counts as used now; None if the cache does not have it.

        With ``cls_attention``, an image that was encoded without it does not count.
        """
        image = self._images.get(key)
        if image is None or (cls_attention and image.cls_attention_N is None):
            self._misses += 1
            return None
        self._hits += 1
        self._images.move_to_end(key)
        return image

    def put(self, key: tuple[str, str], image: EncodedImage) -> None:
        """Store an image in place of the older one of its key, and drop others to make room."""
        older = self._images.pop(key, None)
        self.nbytes += image.nbytes - (older.nbytes if older else 0)
        self._images[key] = image
        while self.nbytes > self.max_bytes:
            _, dropped = self._images.popitem(last=False)
            self.nbytes -= dropped.nbytes
