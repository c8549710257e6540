"""The reader turns a request's images into embeddings for prefill, with a cache of encoded images.

The vision tower runs once per image content: its output is kept under the SHA-256 of the image's
bytes and the fingerprint of the weights. The cache is bounded by bytes, and drops the least
recently used image first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from rayapp.errors import IntegrityError, PlanError
from rayapp.models.blocks import signature_of
from rayapp.models.stack import BlockStack
from rayapp.plan import VisualTokens
from rayapp.vision.attention import FASTV_BLOCK
from rayapp.vision.cache import ImageCache
from rayapp.vision.inputs import ImageInput, ImageIntake
from rayapp.vision.limits import IMAGE_CACHE_BYTES, ImageLimits
from rayapp.vision.llava import LlavaAdapter
from rayapp.vision.prompt import PromptEmbeddings
from rayapp.vision.selection import EncodedImage, check_rule


@dataclass(frozen=True)
class ImageSupport:
    """Everything beside the model that an image reader needs.

    Args:
        processor: The processor that :func:`rayapp.vision.llava.load_image_processor` returns.
        limits: Limits of the images in a request.
        max_cache_bytes: Limit of the cache of encoded images.
    """

    processor: Any
    limits: ImageLimits = field(default_factory=ImageLimits)
    max_cache_bytes: int = IMAGE_CACHE_BYTES


class ImageReader:
    """Encodes and prunes the images of prompts for one prefill stage; it is not thread-safe.

    Args:
        model: The model as it was loaded, with its vision tower.
        stack: The prefill stage over the model.
        support: The image processor and the limits.

    Raises:
        ModelError: The model takes no images, or its tower was not loaded.
    """

    def __init__(self, model: PreTrainedModel, stack: BlockStack, support: ImageSupport) -> None:
        self._adapter = LlavaAdapter(model, stack, support.processor)
        self._tower_type = model.config.vision_config.model_type
        self._fingerprint = signature_of(model).weights_fingerprint
        self.intake = ImageIntake(model.config, support.limits)
        self.cache = ImageCache(support.max_cache_bytes)

    def check_rule(self, rule: VisualTokens) -> None:
        """Raise :class:`PlanError` if this model and stage cannot prune by ``rule``."""
        check_rule(rule)
        attending = sum(self._adapter.stack.attends)
        if rule.method == "fastv" and attending < FASTV_BLOCK:
            raise PlanError(
                f"visual_tokens.method fastv reads attention block {FASTV_BLOCK}, but prefill "
                f"attends in {attending} blocks only; choose another method"
            )
        if rule.method == "cls_attention" and self._tower_type != "clip_vision_model":
            raise PlanError(
                f"visual_tokens.method cls_attention needs a tower with a CLS token, this model's "
                f"is {self._tower_type!r}; choose another method"
            )

    def embed(
        self,
        token_ids: Sequence[int],
        images: Sequence[ImageInput],
        rule: VisualTokens | None,
        text_token_ids: Sequence[int],
    ) -> PromptEmbeddings:
        """Build the embeddings that prefill runs for a prompt with images.

        Args:
            token_ids: The prompt, one placeholder per image.
            images: The images in prompt order.
            rule: The rule to prune by; None keeps all tokens.
            text_token_ids: The user's words, with which images are aligned.

        Raises:
            RequestError: An image cannot be decoded, or placeholders and images do not match.
            PlanError: The rule cannot be applied here.
        """
        if rule is not None:
            self.check_rule(rule)
        wants_cls = rule is not None and rule.method == "cls_attention"
        encoded = [self._encoded(image, cls_attention=wants_cls) for image in images]
        return self._adapter.embed_prompt(token_ids, encoded, rule, text_token_ids=text_token_ids)

    def _encoded(self, image: ImageInput, *, cls_attention: bool) -> EncodedImage:
        key = (image.digest, self._fingerprint)
        encoded = self.cache.get(key, cls_attention=cls_attention)
        if encoded is None:
            encoded = self._adapter.encode(self.intake.decode(image), cls_attention=cls_attention)
            self.cache.put(key, encoded)
        if encoded.num_tokens != image.num_tokens:
            raise IntegrityError(
                f"an image was taken in as {image.num_tokens} tokens but has {encoded.num_tokens}"
            )
        return encoded
