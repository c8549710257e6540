"""One question about images under many rules of pruning; work that rules share is done once.

An image is encoded once, the user's words are embedded once per question, FastV's attention is read
once per question, and methods that look at no words choose once per image. The embeddings equal
those of :class:`rayapp.vision.reader.ImageReader`, bit for bit (tested).
Shapes: N = tokens of an image, K = kept, M = words, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.models.stack import BlockStack
from rayapp.plan import VisualTokens
from rayapp.vision.attention import last_token_attention
from rayapp.vision.cache import ImageCache
from rayapp.vision.images import decode_file
from rayapp.vision.limits import ImageLimits
from rayapp.vision.llava import LlavaAdapter
from rayapp.vision.prompt import PromptEmbeddings, assemble
from rayapp.vision.selection import EncodedImage, keep_places

WORDLESS = frozenset({"diversity", "random", "grid", "downsampling", "divprune", "cls_attention"})
"""Names of the methods that choose by the image alone."""


class VisualPrompts:
    """Asks questions of one prefill stage; quickest where questions about one image are adjacent.

    Args:
        model: The model as it was loaded, with its vision tower.
        stack: The prefill stage over it.
        image_processor: The model's image processor.
        cls_attention: Whether a rule of method ``cls_attention`` will be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: BlockStack,
        image_processor: Any,
        *,
        cls_attention: bool = True,
    ) -> None:
        self.stack = stack
        self.adapter = LlavaAdapter(model, stack, image_processor)
        self._cls_attention = cls_attention
        self._limits, self._cache = ImageLimits(), ImageCache()
        self._last: tuple[Any, dict[str, list[torch.Tensor]]] = ((), {})

    def ask(self, line: TokenizedImageLine) -> AskedLine:
        """One question, ready to be pruned by any number of rules."""
        images = [self._encoded(str(path)) for path in line.images]
        if line.images != self._last[0]:
            self._last = (line.images, {})
        return AskedLine(self, line, images, self._last[1])

    def _encoded(self, path: str) -> EncodedImage:
        """An image, encoded once; the cache is keyed by path, since files do not change."""
        encoded = self._cache.get((path, ""))
        if encoded is None:
            image = decode_file(path, self._limits)
            encoded = self.adapter.encode(image, cls_attention=self._cls_attention)
            self._cache.put((path, ""), encoded)
        return encoded


class AskedLine:
    """The material of one question that rules choose from.

    Args:
        prompts: The prompts that the question belongs to.
        line: The question.
        images: Its images, encoded.
        wordless: Places that methods without words chose from these images so far, by rule.
    """

    def __init__(
        self,
        prompts: VisualPrompts,
        line: TokenizedImageLine,
        images: Sequence[EncodedImage],
        wordless: dict[str, list[torch.Tensor]],
    ) -> None:
        self.line, self.images = line, images
        self._prompts, self._wordless = prompts, wordless

    @cached_property
    def _text_ME(self) -> torch.Tensor:
        return self._prompts.adapter.text_embeddings(self.line.words)

    @cached_property
    def _text_attention(self) -> list[torch.Tensor]:
        """Attention of the unpruned prompt's last token to the tokens of each image, ``(N,)``."""
        dense = self.embed(None)
        attention_T = last_token_attention(self._prompts.stack, dense.hidden_TE)
        return [attention_T[start:stop] for start, stop in dense.image_spans]

    def kept(self, rule: VisualTokens) -> list[torch.Tensor]:
        """Kept places of every image, ascending, ``(K,)`` each."""
        key = rule.model_dump_json()
        if key in self._wordless:
            return self._wordless[key]
        attention = self._text_attention if rule.method == "fastv" else None
        kept = keep_places(rule, self.images, self._text_ME, text_attention=attention)
        if rule.method in WORDLESS:
            self._wordless[key] = kept
        return kept

    @torch.inference_mode()
    def embed(self, rule: VisualTokens | None) -> PromptEmbeddings:
        """The embeddings that the prefill stage runs under ``rule``; None keeps everything."""
        return assemble(
            self.line.asked,
            self.images,
            None if rule is None else self.kept(rule),
            embed=self._prompts.stack.embed,
            image_token_id=self._prompts.adapter.image_token_id,
            positions="original" if rule is None else rule.positions,
        )
