"""Prompts in tokens, made from text, token ids or messages off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from rayapp.api.openai.chat import ChatTemplate
from rayapp.api.openai.images import ImageLoader
from rayapp.api.openai.messages import ChatMessage
from rayapp.errors import RequestError
from rayapp.vision.inputs import ImageInput, ImageIntake
from rayapp.vision.prompt import check_places, num_unpruned

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt with one placeholder per image, and the user's words as tokens."""

    token_ids: tuple[int, ...]
    images: tuple[ImageInput, ...] = ()
    text_token_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the unpruned prompt."""
        return num_unpruned(self.token_ids, [image.num_tokens for image in self.images])


class PromptReader:
    """Tokenizes prompts on its own thread, so that a long text delays no other answer's tokens.

    There is only one such thread, because a tokenizer is not thread-safe.

    Args:
        tokenizer: The served model's tokenizer; its chat template is the only one ever used.
        images: The intake that checks and counts images; None if the model takes none.
        model_name: The model's name, for the text of refusals.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageIntake | None = None,
        *,
        model_name: str = "model",
    ) -> None:
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._intake = images
        self._images = ImageLoader(images) if images else None
        self._template = ChatTemplate(tokenizer, images.image_token_id if images else None)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayapp-tokenize")

    async def texts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Prompt]:
        """Tokenize texts; the result has one list of ids per text."""
        return await self._run(
            lambda: [
                Prompt(self._encode(text, add_special_tokens=add_special_tokens)) for text in texts
            ]
        )

    async def text(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return await self._run(lambda: str(self._tokenizer.decode(token_ids)))

    async def chat(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Tokenize a conversation, up to where the assistant's answer begins.

        Raises:
            RequestError: The model has no chat template, its template refuses the messages, or the
                conversation has images that the model cannot take.
        """
        urls = [url for message in messages for url in message.image_urls]
        images: tuple[ImageInput, ...] = ()
        if urls and self._images is None:
            raise RequestError(
                f"model `{self._model_name}` takes no images: it is text-only; send text, or ask a "
                "model that does"
            )
        if urls and self._images is not None:
            images = await self._images.load(urls)
        return await self._run(lambda: self._chat(messages, images))

    def expanded(self, prompt: Prompt) -> list[int]:
        """Token ids of the unpruned prompt: one placeholder per token of an image."""
        counts = iter(prompt.images)
        place = self._intake.image_token_id if self._intake and prompt.images else None
        ids: list[int] = []
        for token in prompt.token_ids:
            ids += [token] * (next(counts).num_tokens if token == place else 1)
        return ids

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(encoded["input_ids"])

    def _chat(self, messages: Sequence[ChatMessage], images: tuple[ImageInput, ...]) -> Prompt:
        text = self._template.render(messages)
        special = self._template.adds_special_tokens(text)
        token_ids = self._encode(text, add_special_tokens=special)
        if self._intake is not None:
            check_places(token_ids, self._intake.image_token_id, len(images))
        if not images:
            return Prompt(token_ids)
        words = [message.text for message in messages if message.role == "user" and message.text]
        return Prompt(token_ids, images, self._encode(words[-1]) if words else ())
