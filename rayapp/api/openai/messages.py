"""Messages of a conversation: words and images, each as OpenAI's interface spells them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rayapp.api.openai.fields import Body, Name, Text, encodable

MAX_PARTS = 256


class ImageUrl(Body):
    """Location of an image: a ``data:`` URL, or an address that the service allows."""

    url: Text
    detail: Name | None = None

    @field_validator("detail")
    @classmethod
    def _is_automatic(cls, value: str | None) -> str | None:
        if value not in (None, "auto"):
            raise ValueError(f"detail {value!r} is not supported by this server; leave it out")
        return value


class ContentPart(Body):
    """One part of a message: text, or an image."""

    type: Name
    text: Text = ""
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _is_known(self) -> ContentPart:
        if self.type not in ("text", "image_url"):
            raise ValueError(
                f"a part of type {self.type!r} cannot be read; send parts of type text or image_url"
            )
        if (self.type == "image_url") != (self.image_url is not None):
            raise ValueError(
                "a part {'type': 'image_url'} holds {'image_url': {'url': ...}}, and no other does"
            )
        return self


Parts = Annotated[list[ContentPart], Field(max_length=MAX_PARTS)]


class ChatMessage(Body):
    """One turn of a conversation; other keys (``name`` and so on) are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_calls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in ("tool_calls", "function_call"):
                if values.get(name):
                    raise ValueError(f"`{name}` is not supported by this server; leave it out")
            _check_content(values.get("content"))
        return values

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs `content`")
        if self.role != "user" and self.image_urls:
            raise ValueError(f"a message of role {self.role} holds an image; users send images")
        return self

    @property
    def text(self) -> str:
        """Return the message's words as one string."""
        return "".join(part.text for part in self.parts)

    @property
    def parts(self) -> list[ContentPart]:
        """Return the message as a list of parts, in order."""
        if self.content is None or isinstance(self.content, str):
            return [ContentPart(type="text", text=self.content)] if self.content else []
        return self.content

    @property
    def image_urls(self) -> list[str]:
        """Return the locations of the message's images, in order."""
        return [part.image_url.url for part in self.parts if part.image_url]


def _check_content(content: Any) -> None:
    """Raise a single clear error before pydantic's union raises one for every member."""
    if content is None or isinstance(content, str):
        encodable(content)
        return
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(
            "`content` is a text or a list of parts {'type': 'text', 'text': ...} and "
            "{'type': 'image_url', 'image_url': {'url': ...}}"
        )
    if len(content) > MAX_PARTS:
        raise ValueError(f"{len(content)} parts are more than {MAX_PARTS}; join them")
    for part in content:
        ContentPart.model_validate(part)
