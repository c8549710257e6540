"""What all request bodies are made of: bounded numbers, and text that can be encoded."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

MAX_NAME_CHARS = 512


def encodable(value: Any) -> Any:
    """Refuse a string with half of a surrogate pair: JSON can spell it, but it is no text."""
    texts = value if isinstance(value, list) else [value]
    try:
        for text in texts:
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair; send valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(encodable)]
Name = Annotated[Text, StringConstraints(max_length=MAX_NAME_CHARS)]


class Body(BaseModel):
    """Settings of all request bodies: every number has bounds; NaN and infinity are refused."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())
