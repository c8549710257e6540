"""Requests of OpenAI's interface: every field bounded, and nothing silently left undone.

Fields that we know but cannot honour are refused by name, unless they hold the value that changes
nothing (:data:`NEUTRAL`). Keys that nobody knows are ignored, because clients send their own.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictInt,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from rayapp.api.openai.fields import Body, Name, Text, encodable
from rayapp.api.openai.messages import ChatMessage
from rayapp.engine.sampling_params import SamplingParams
from rayapp.plan import VisualTokens

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_BODY_BYTES_WITH_IMAGES = 64 * 1024 * 1024
MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_ANSWERS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0
MAX_MESSAGES = 1024
_SEED_MODULUS = 2**63
# An odd number near 2**63 / golden ratio, so that seeds of neighbouring choices lie far apart.
_SEED_STRIDE = 0x4F1BBCDCBFA53E0B

_NOTHING: tuple[Any, ...] = (None, "", [], {})
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, True),
    "allowed_token_ids": _NOTHING,
    "audio": _NOTHING,
    "bad_words": _NOTHING,
    "chat_template": _NOTHING,
    "chat_template_kwargs": _NOTHING,
    "continue_final_message": (None, False),
    "documents": _NOTHING,
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "min_p": (None, 0),
    "modalities": (None, [], ["text"]),
    "prompt_embeds": _NOTHING,
    "prompt_logprobs": (None, False),
    "response_format": (None, {}, {"type": "text"}),
    "skip_special_tokens": (None, True),
    "stop_token_ids": _NOTHING,
    "structured_outputs": _NOTHING,
    "suffix": _NOTHING,
    "tool_choice": (None, "none", "auto"),
    "tools": _NOTHING,
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": _NOTHING,
}


def _refuse_unsupported(values: Any, honoured: frozenset[str]) -> Any:
    if not isinstance(values, dict):
        return values
    for name in (values.keys() & NEUTRAL.keys()) - honoured:
        if not any(values[name] == neutral for neutral in NEUTRAL[name]):
            raise ValueError(f"`{name}` is not supported by this server; leave it out")
    count, best_of = values.get("n") or 1, values.get("best_of")
    if best_of is not None and best_of != count:
        raise ValueError("`best_of` is not supported by this server; leave it out or give n")
    return values


def _listed_stop(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _readable_union(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Replace pydantic's errors by one line: which member of a union was meant cannot be known."""
    try:
        return handler(value)
    except ValueError:
        raise ValueError(
            "a prompt is a text, a list of texts, a list of token ids, or a list of lists of "
            f"token ids; at most {MAX_PROMPTS} prompts, none of them empty lists"
        ) from None


Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenIds = Annotated[list[StrictInt], Field(min_length=1)]
TokenPrompts = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
StopString = Annotated[Text, StringConstraints(max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]


class StreamOptions(Body):
    """OpenAI's ``stream_options``: how a stream ends. Keys of other servers are ignored."""

    include_usage: bool = False


class AnswerRequest(Body):
    """Fields that completions and chat completions have in common.

    Null stands for the default, as in OpenAI's interface.
    """

    _nullable: ClassVar[frozenset[str]] = frozenset(
        {
            *("n", "temperature", "top_p", "top_k", "stream", "ignore_eos", "min_tokens"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
        }
    )

    _honoured: ClassVar[frozenset[str]] = frozenset()

    model: Name | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="0 or -1 keeps all tokens")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_listed_stop)
    ] = Field(default_factory=list)
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    logit_bias: dict[TokenId, Bias] = Field(default_factory=dict, max_length=MAX_BIASED_TOKENS)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, values: Any) -> Any:
        values = _refuse_unsupported(values, cls._honoured)
        if isinstance(values, dict):
            return {k: v for k, v in values.items() if v is not None or k not in cls._nullable}
        return values

    @property
    def answer_limit(self) -> int | None:
        """The client's limit of answer tokens, None if it sent none."""
        limit = self.max_completion_tokens
        return self.max_tokens if limit is None else limit

    @property
    def num_top_logprobs(self) -> int | None:
        """Alternatives to report beside every token; None if no log-probabilities are wanted."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to report beside every prompt token; None if none are wanted."""
        return None

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """Sampling parameters of all ``n`` choices, which differ only in their seed.

        The first choice uses the client's seed itself; without one, the first seed is random.
        """
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                seed=(seed + choice * _SEED_STRIDE) % _SEED_MODULUS,
                stop=tuple(filter(None, self.stop)),
                min_tokens=self.min_tokens,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=self.logit_bias,
                ignore_eos=self.ignore_eos,
                logprobs=self.num_top_logprobs,
                prompt_logprobs=self.num_prompt_logprobs,
            )
            for choice in range(self.n)
        ]


class CompletionRequest(AnswerRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[
        str | Prompts | TokenIds | TokenPrompts,
        WrapValidator(_readable_union),
        AfterValidator(encodable),
    ]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = Field(default=False, description="repeat the prompt before its answer")

    _nullable: ClassVar[frozenset[str]] = AnswerRequest._nullable | {"echo"}
    _honoured: ClassVar[frozenset[str]] = frozenset({"echo"})

    @model_validator(mode="after")
    def _bounded(self) -> CompletionRequest:
        num_answers = len(self.prompts) * self.n
        if num_answers > MAX_ANSWERS:
            raise ValueError(
                f"{len(self.prompts)} prompts with n={self.n} are {num_answers} answers, more "
                f"than {MAX_ANSWERS}; send several requests"
            )
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Return all prompts, whether they are texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def num_top_logprobs(self) -> int | None:
        """Alternatives to report beside every token; None if no log-probabilities are wanted."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives to report beside every prompt token; None if none are wanted."""
        return self.logprobs if self.echo else None


class ChatRequest(AnswerRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    visual_tokens: VisualTokens | None = Field(
        default=None, description="our own: replaces the plan's rule for this request's images"
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    _nullable: ClassVar[frozenset[str]] = AnswerRequest._nullable | {"logprobs"}

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """Alternatives to report beside every token; None if no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Body):
    """Body of ``POST /tokenize``: a text, or messages for the chat template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self


class DetokenizeRequest(Body):
    """Body of ``POST /detokenize``: token ids."""

    model: Name | None = None
    tokens: Annotated[list[StrictInt], Field(max_length=MAX_BODY_BYTES // 2)]
