"""Replies of OpenAI's interface, whole or in chunks: one format per kind of request."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic_core import to_json
from transformers import PreTrainedTokenizerBase

from rayapp.api.openai.answers import AnswerText, Delta
from rayapp.api.openai.token_text import best_alternatives, finite, token_text
from rayapp.api.refusals import error_body_of
from rayapp.engine.request import PromptLogprobs, Timeline, TokenLogprobs

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def usage(num_prompt_tokens: int, num_answer_tokens: int) -> Json:
    """OpenAI's ``usage`` entry; a prompt counts once, however many answers it gets."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


class ReplyFormat(Protocol):
    """Writes the choices of one reply."""

    whole: str
    chunk: str

    def choice(self, index: int, answer: AnswerText) -> Json:
        """Return one complete choice."""
        ...

    def pieces(self, delta: Delta) -> list[Json]:
        """Turn a delta into the choices that a stream sends for it, possibly none."""
        ...


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt that is repeated before its answers, as text and as tokens."""

    text: str
    token_ids: tuple[int, ...]


class CompletionFormat:
    """Writes the choices of one ``/v1/completions`` reply; keeps the text offsets of its stream.

    Args:
        tokenizer: The served model's tokenizer.
        logprobs: Whether log-probabilities are wanted.
        echoed: The prompt of every choice, if prompts are wanted before their answers.
    """

    whole = chunk = "text_completion"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        logprobs: bool,
        echoed: Sequence[EchoedPrompt] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echoed = dict(enumerate(echoed))
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, answer: AnswerText) -> Json:
        """Return one complete choice."""
        (choice,) = self.pieces(
            Delta(
                index,
                answer.text,
                tuple(answer.token_ids),
                tuple(answer.logprobs),
                answer.finish_reason,
                answer.prompt_logprobs,
            )
        )
        return choice

    def pieces(self, delta: Delta) -> list[Json]:
        """Return at most one choice per delta; the first of an answer begins with its prompt."""
        prompt = self._echoed.pop(delta.index, EchoedPrompt("", ()))
        text = prompt.text + delta.text
        if not (text or delta.finish_reason or self._logprobs):
            return []
        logprobs = None
        if self._logprobs:
            of_prompt = delta.prompt_logprobs if prompt.token_ids else ()
            logprobs = self._write_logprobs(
                delta.index, prompt.token_ids + delta.token_ids, of_prompt + delta.logprobs
            )
        return [
            {
                "index": delta.index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": delta.finish_reason,
            }
        ]

    def _write_logprobs(
        self, index: int, token_ids: Sequence[int], entries: PromptLogprobs
    ) -> Json:
        """Write tokens with their log-probabilities; those of a first prompt token are null."""
        tokens = [token_text(self._tokenizer, token_id).text for token_id in token_ids]
        offsets, offset = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry and finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                entry and best_alternatives(self._tokenizer, token_id, entry)
                for token_id, entry in zip(token_ids, entries, strict=True)
            ],
            "text_offset": offsets,
        }


class ChatFormat:
    """Writes the choices of one ``/v1/chat/completions`` reply; remembers which have begun."""

    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, answer: AnswerText) -> Json:
        """Return one complete choice."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._write_logprobs(answer.token_ids, answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def pieces(self, delta: Delta) -> list[Json]:
        """Return the role before the first text of a choice, then its text."""
        pieces = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            pieces.append(self._piece(delta.index, {"role": "assistant", "content": ""}))
        if delta.text or delta.finish_reason or self._logprobs:
            content = {"content": delta.text} if delta.text else {}
            piece = self._piece(delta.index, content)
            piece["logprobs"] = self._write_logprobs(delta.token_ids, delta.logprobs)
            piece["finish_reason"] = delta.finish_reason
            pieces.append(piece)
        return pieces

    def _piece(self, index: int, delta: Json) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _write_logprobs(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs]
    ) -> Json | None:
        if not self._logprobs:
            return None
        content = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            top = [self._token(token, logprob) for token, logprob in entry.top]
            content.append({**self._token(token_id, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        token = token_text(self._tokenizer, token_id)
        return {"token": token.text, "bytes": list(token.raw), "logprob": finite(logprob)}


class Reply:
    """One reply: its id, model, format and counts.

    Args:
        reply_id: The reply's id, made by the server.
        model_name: The model's name as the client wrote it.
        format: The format in which choices are written.
        num_prompt_tokens: Prompt tokens, summed over all prompts.
        with_timelines: Whether every answer ends with its timeline, an extension of OpenAI's form.
    """

    def __init__(
        self,
        reply_id: str,
        model_name: str,
        format: ReplyFormat,
        num_prompt_tokens: int,
        *,
        with_timelines: bool = False,
    ) -> None:
        self._frame = {"id": reply_id, "created": int(time.time()), "model": model_name}
        self._format = format
        self._num_prompt_tokens = num_prompt_tokens
        self._with_timelines = with_timelines

    def whole(self, answers: Sequence[AnswerText]) -> Json:
        """Return the complete reply, for a client that does not stream."""
        num_tokens = sum(len(answer.token_ids) for answer in answers)
        choices = [
            {**self._format.choice(index, answer), **self._told(answer.timeline)}
            for index, answer in enumerate(answers)
        ]
        return {
            **self._frame,
            "object": self._format.whole,
            "choices": choices,
            "usage": usage(self._num_prompt_tokens, num_tokens),
        }

    async def events(
        self, first: Delta, rest: AsyncGenerator[Delta, None], *, with_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Generate the reply as server-sent events; an error becomes the last event."""
        num_tokens = 0
        frame = self._chunk([]) | ({"usage": None} if with_usage else {})
        try:
            async for delta in _chained(first, rest):
                num_tokens += len(delta.token_ids)
                told = self._told(delta.timeline)
                for piece in self._format.pieces(delta):
                    yield _event(frame | {"choices": [piece | told]})
        except Exception as error:  # noqa: BLE001 - the status is sent: only an event can tell
            yield _event(error_body_of(error))
            return
        if with_usage:
            yield _event({**self._chunk([]), "usage": usage(self._num_prompt_tokens, num_tokens)})
        yield DONE

    def _told(self, timeline: Timeline | None) -> Json:
        """The seconds of an answer's phases, and of the way of its KV, if they are wanted."""
        if timeline is None or not self._with_timelines:
            return {}
        return {"timeline": {**timeline.intervals(), "transfer": timeline.transfer}}

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._frame, "object": self._format.chunk, "choices": choices}


async def _chained(first: Delta, rest: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    yield first
    async for delta in rest:
        yield delta


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"
