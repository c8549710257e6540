"""The adapter of LLaVA-1.5 and LLaVA-NeXT: it encodes images and builds the prompt's embeddings.

The vision tower and the projector run as the model's own ``get_image_features`` runs them. Cached
features were encoded alone: encoded among other images they are the same only up to rounding.
Shapes: N = tokens of an image, newlines included; P = views (base and tiles), C = channels,
R x S = the merged grid, M = text tokens, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from rayapp.errors import ModelError, PlanError
from rayapp.models.architecture import MULTIMODAL_TYPES
from rayapp.models.stack import BlockStack
from rayapp.plan import VisualTokens
from rayapp.vision.attention import captured_cls_attention, last_token_attention
from rayapp.vision.images import DecodedImage
from rayapp.vision.layout import ImageLayout, image_layout, merged_grid, num_views
from rayapp.vision.prompt import PromptEmbeddings, assemble
from rayapp.vision.selection import EncodedImage, keep_places, keep_places_of_prompts


def check_takes_images(config: PreTrainedConfig) -> None:
    """Raise :class:`ModelError` if there is no adapter for the architecture, and name it."""
    if config.model_type not in MULTIMODAL_TYPES:
        raise ModelError(
            f"model type {config.model_type!r} takes no images here; "
            f"use one of {', '.join(MULTIMODAL_TYPES)}"
        )
    if config.model_type == "llava_next" and config.vision_feature_select_strategy != "default":
        raise ModelError(
            f"llava_next with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} is not supported; use 'default'"
        )


def load_image_processor(path: str | Path) -> Any:
    """Load the image processor of a model directory, without torchvision.

    Raises:
        ModelError: The directory has no image processor, or it cannot be read.
    """
    try:
        return AutoImageProcessor.from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 - whatever a foreign parser raises is the user's file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: no usable image processor ({reason}); save one beside the model"
        ) from None


def image_processor_of(path: str | Path, config: PreTrainedConfig) -> Any | None:
    """Load the image processor of a model that takes images; None for a text-only model."""
    if config.model_type not in MULTIMODAL_TYPES:
        return None
    check_takes_images(config)
    return load_image_processor(path)


@dataclass(frozen=True)
class PreparedImages:
    """Input of the tower: scaled and normalised images.

    ``pixels`` are those of all images; ``sizes`` are their ``(height, width)`` before scaling, None
    for a tower that sees one view per image.
    """

    images: tuple[DecodedImage, ...]
    pixels: torch.Tensor
    sizes: torch.Tensor | None


class LlavaAdapter:
    """Encodes images and builds the embeddings of prompts for one prefill stage.

    Args:
        model: The model with tower and projector, as it was loaded. A stage's copy would not do:
            copies share the hooks with which transformers records hidden states, and a second
            copy that installs them records everything twice.
        stack: The prefill stage over the same model.
        image_processor: The processor that :func:`load_image_processor` returns.

    Raises:
        ModelError: The model is of another kind or text-only, or its tower was not loaded.
    """

    def __init__(self, model: PreTrainedModel, stack: BlockStack, image_processor: Any) -> None:
        check_takes_images(model.config)
        self.stack = stack
        self._model: Any = model
        self._process = image_processor
        self._config: Any = model.config
        tower = self._model.model.vision_tower
        if any(parameter.is_meta for parameter in tower.parameters()):
            raise ModelError("the vision tower was not loaded; load the model for prefill")
        self.image_token_id: int = self._config.image_token_id

    def prepare(self, images: Sequence[DecodedImage]) -> PreparedImages:
        """Scale and normalise images, on the CPU."""
        inputs = self._process(images=[image.pixels for image in images], return_tensors="pt")
        return PreparedImages(tuple(images), inputs["pixel_values"], inputs.get("image_sizes"))

    def encode(self, image: DecodedImage, *, cls_attention: bool = False) -> EncodedImage:
        """Run the vision tower and the projector once over one image.

        Args:
            image: An image that :mod:`rayapp.vision.images` decoded.
            cls_attention: Whether to keep the tower's CLS attention too, for method
                ``cls_attention``.
        """
        return self.encode_prepared(self.prepare([image]), cls_attention=cls_attention)[0]

    @torch.inference_mode()
    def encode_prepared(
        self, prepared: PreparedImages, *, cls_attention: bool = False
    ) -> list[EncodedImage]:
        """Run :meth:`encode` for several images at once; their features share one memory."""
        model, layer = self._model.model, self._config.vision_feature_layer
        parameter = next(model.vision_tower.parameters())
        pixels = prepared.pixels.to(parameter.device, parameter.dtype)
        extra = {} if prepared.sizes is None else {"image_sizes": prepared.sizes}
        capture = captured_cls_attention(model.vision_tower, layer) if cls_attention else None
        with capture or nullcontext([]) as rows:
            output = model.get_image_features(pixel_values=pixels, return_dict=True, **extra)
        attention = self._per_image(prepared, rows[0]) if rows else [None] * len(prepared.images)
        return [
            EncodedImage(
                features_ND, self._layout(features_ND.shape[0], image), image.digest, scores_N
            )
            for image, features_ND, scores_N in zip(
                prepared.images, output.pooler_output, attention, strict=True
            )
        ]

    def _layout(self, num_tokens: int, image: DecodedImage) -> ImageLayout:
        """Layout of an image's pools; a :class:`ModelError` if its tokens do not fit the grid."""
        layout = image_layout(self._config, (image.pixels.height, image.pixels.width))
        if layout.num_tokens != num_tokens:
            raise ModelError(
                f"{self._config.model_type}: an image gave {num_tokens} visual tokens, but its "
                f"patches make {layout.num_tokens}; this vision tower is not supported"
            )
        return layout

    def _per_image(
        self, prepared: PreparedImages, views_PN: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """Scores ``(N,)`` of every image, from the scores of all views of all images."""
        if prepared.sizes is None:
            return [self._in_prompt_order(view_1N, None) for view_1N in views_PN.split(1)]
        sizes = [tuple(size) for size in prepared.sizes.tolist()]
        parts = views_PN.split([num_views(self._config, size) for size in sizes])
        return [self._in_prompt_order(*each) for each in zip(parts, sizes, strict=True)]

    def _in_prompt_order(
        self, views_PN: torch.Tensor, size: tuple[int, int] | None
    ) -> torch.Tensor:
        """Scores ``(N,)`` of all views in the order of the prompt's tokens, 0 at newlines."""
        if size is None:
            return views_PN[0]
        merged_RS = merged_grid(self._config, views_PN[1:], size)
        newlines_R1 = merged_RS.new_zeros(merged_RS.shape[0], 1)
        return torch.cat([views_PN[0], torch.cat([merged_RS, newlines_R1], dim=1).flatten()])

    @torch.inference_mode()
    def text_embeddings(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Embeddings ``(M, E)`` of the user's words, placeholders left out."""
        words = [token for token in token_ids if token != self.image_token_id]
        return self.stack.embed(torch.tensor([words], dtype=torch.int64))[0]

    @torch.inference_mode()
    def embed_prompt(
        self,
        token_ids: Sequence[int],
        images: Sequence[EncodedImage],
        rule: VisualTokens | None = None,
        *,
        text_token_ids: Sequence[int] = (),
    ) -> PromptEmbeddings:
        """Build the embeddings that the prefill stage runs.

        Args:
            token_ids: The whole prompt, one placeholder per image.
            images: The encoded images in prompt order.
            rule: The rule to prune by; None keeps all tokens.
            text_token_ids: The user turn's tokens, without template and system prompt, with which
                images are aligned.

        Raises:
            RequestError: Placeholders and images do not match.
            PlanError: The rule names no method, or its numbers are contradictory.
        """
        if rule is None or not images:
            return self._assemble(token_ids, images, None)
        attention = None
        if rule.method == "fastv":
            dense = self._assemble(token_ids, images, None)
            attention_T = last_token_attention(self.stack, dense.hidden_TE)
            attention = [attention_T[start:stop] for start, stop in dense.image_spans]
        text_ME = self.text_embeddings(text_token_ids)
        kept = keep_places(rule, images, text_ME, text_attention=attention)
        return self._assemble(token_ids, images, kept, rule)

    @torch.inference_mode()
    def embed_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[EncodedImage]],
        rule: VisualTokens | None = None,
        *,
        texts: Sequence[Sequence[int]],
    ) -> list[PromptEmbeddings]:
        """Run :meth:`embed_prompt` for several prompts, pruning all images at once if possible.

        Args:
            prompts: Token ids of every prompt, one placeholder per image.
            images: The encoded images of every prompt, in its order.
            rule: The rule to prune by; None keeps all tokens.
            texts: The user's words of every prompt, as token ids.

        Raises:
            RequestError: Placeholders and images of a prompt do not match.
            PlanError: The rule cannot be applied, or its method is ``fastv``, which runs every
                prompt by itself.
        """
        if rule is not None and rule.method == "fastv":
            raise PlanError("method fastv takes prompts one by one; choose another method")
        if rule is None:
            return [self._assemble(*each, None) for each in zip(prompts, images, strict=True)]
        embedded = [self.text_embeddings(text) for text in texts]
        kept = keep_places_of_prompts(rule, images, embedded)
        return [self._assemble(*each, rule) for each in zip(prompts, images, kept, strict=True)]

    def _assemble(
        self,
        token_ids: Sequence[int],
        images: Sequence[EncodedImage],
        kept: Sequence[torch.Tensor] | None,
        rule: VisualTokens | None = None,
    ) -> PromptEmbeddings:
        return assemble(
            token_ids,
            images,
            kept,
            embed=self.stack.embed,
            image_token_id=self.image_token_id,
            positions="original" if rule is None else rule.positions,
        )
