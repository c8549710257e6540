"""From text, token ids or messages to prompts in tokens, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rayapp.api.schema import ChatMessage
from rayapp.errors import RequestError

Result = TypeVar("Result")


class PromptReader:
    """Tokenizes on one thread of its own, so that a long text delays no other answer's tokens.

    One thread, because tokenizers may be used by only one at a time.

    Args:
        tokenizer: Of the served model; its chat template is the only one ever used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rayapp-tokenize")

    async def texts(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[int, ...]]:
        """Token ids of each text."""
        return await self._run(
            lambda: [self._encode(text, add_special_tokens=add_special_tokens) for text in texts]
        )

    async def chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Raises:
            RequestError: The model has no chat template, or its template refuses the messages.
        """
        return await self._run(lambda: self._encode(self._render(messages)))

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(encoded["input_ids"])

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if not self._tokenizer.chat_template:
            raise RequestError("this model has no chat template; use /v1/completions")
        try:
            text: Any = self._tokenizer.apply_chat_template(
                [_turn(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}") from None
        return str(text)


def _turn(message: ChatMessage) -> dict[str, str]:
    """As chat templates read it; they know no role ``developer``, which OpenAI put for system."""
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.text}
