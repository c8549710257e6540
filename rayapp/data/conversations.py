"""Conversations: a user's turns, and prompts under a model's own chat template.

A line is ``{"turns": [str, ...]}``, as MT-bench and EAGLE publish them; Arena-Hard's turns are
objects with a ``content``. Other keys are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, field_validator
from transformers import PreTrainedTokenizerBase

from rayapp.errors import DataError


class ConversationLine(BaseModel):
    """The user's turns of one conversation, first turn first."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    turns: list[str] = Field(min_length=1)
    task: str = ""

    @field_validator("turns", mode="before")
    @classmethod
    def _contents(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return [turn.get("content") if isinstance(turn, dict) else turn for turn in value]

    @field_validator("turns")
    @classmethod
    def _not_blank(cls, value: list[str]) -> list[str]:
        if not all(turn.strip() for turn in value):
            raise ValueError("a turn is blank; give at least one character")
        return value


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, said: Sequence[str], where: str
) -> tuple[int, ...]:
    """Token ids of a conversation up to where the assistant's next answer begins.

    Args:
        tokenizer: The model's tokenizer, with its chat template.
        said: What user and assistant said in turn; the user began, and spoke last.
        where: The line's file and number, for errors.

    Raises:
        DataError: The model has no chat template, or the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: a conversation, and this model has no chat template; use a model that was "
            "tuned to chat, or plain prompts"
        )
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]
    try:
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            f"{where}: the model's chat template refuses it ({error}); leave it out"
        ) from None
    return tuple(tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"])
