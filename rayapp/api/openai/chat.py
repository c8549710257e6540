"""A conversation as text: the model's own chat template, with a placeholder where an image stands.

Templates come in two kinds: some read a message's content as text, some as a list of parts. A
template of the second kind is recognised by its use of a part's ``type``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rayapp.api.openai.messages import ChatMessage, ContentPart
from rayapp.errors import RequestError

_READS_PARTS = re.compile(r"""\[\s*['"]type['"]\s*\]|\.type\b|attr\(\s*['"]type['"]""")


class ChatTemplate:
    """Renders conversations up to where the assistant's answer begins.

    Args:
        tokenizer: The served model's tokenizer; its chat template is the only one ever used.
        image_token_id: The id of the image placeholder; None if the model takes no images.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._takes_images = image_token_id is not None
        self._placeholder = (
            "" if image_token_id is None else str(tokenizer.convert_ids_to_tokens(image_token_id))
        )

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Render a conversation as the text of a prompt.

        Raises:
            RequestError: The model has no chat template, its template refuses the messages, or a
                text contains an image placeholder.
        """
        template = self._tokenizer.chat_template
        if not template:
            raise RequestError("this model has no chat template; use /v1/completions")
        self._check_texts(messages)
        as_parts = self._takes_images and _READS_PARTS.search(str(template)) is not None
        turns = [
            {"role": _role(message), "content": self._content(message, as_parts=as_parts)}
            for message in messages
        ]
        try:
            text: Any = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}") from None
        return str(text)

    def adds_special_tokens(self, text: str) -> bool:
        """True if a rendered prompt still lacks the special tokens that prompts begin with.

        Multimodal processors add them unless the template did; text templates are complete.
        """
        begin = self._tokenizer.bos_token
        return self._takes_images and not (begin and text.startswith(str(begin)))

    def _check_texts(self, messages: Sequence[ChatMessage]) -> None:
        if self._placeholder and any(self._placeholder in message.text for message in messages):
            raise RequestError(
                f"a message holds the text {self._placeholder!r}, which stands for an image here; "
                "send images as parts of type image_url, and leave it out of texts"
            )

    def _content(self, message: ChatMessage, *, as_parts: bool) -> str | list[dict[str, str]]:
        if as_parts:
            return [_part(part) for part in message.parts]
        # LLaVA's own convention: an image, a line break, the words.
        image = f"{self._placeholder}\n"
        return "".join(image if part.image_url else part.text for part in message.parts)


def _role(message: ChatMessage) -> str:
    """The role as chat templates know it: OpenAI's ``developer`` is their ``system``."""
    return "system" if message.role == "developer" else message.role


def _part(part: ContentPart) -> dict[str, str]:
    return {"type": "image"} if part.image_url else {"type": "text", "text": part.text}
