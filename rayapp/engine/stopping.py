"""Text of a growing answer: incremental detokenisation that ends before a stop string.

Pushing tokens one by one or many at once gives the same text, so the decode engine (which ends a
sequence at a stop string) and the HTTP layer (which streams its text) always agree.

``tokenizers`` has a stream too, ``DecodeStream``. It holds invalid bytes back without limit, and
nothing gives out what is left at the end: an answer that is cut off within a character would come
out short. So it is not used here.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
# An incomplete character is at most three bytes, and a token has at least one: a text that still
# ends in a replacement character after this many tokens is broken, not incomplete.
_MAX_PENDING_TOKENS = 8
_NUM_CONTEXT_TOKENS = 4


class TextStream:
    """The text of one answer, released once it can neither change nor be part of a stop string.

    Args:
        tokenizer: The model's tokenizer; special tokens are left out of the text.
        stop: Strings before which the text ends; empty strings are ignored.
        context: The tokens before the answer (its prompt): some tokenizers spell the leading space
            of a word only if a token stands before it.
        min_tokens: Tokens in which no stop string ends; one that ends later may begin there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        context: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._pieces = _pieces_of(tokenizer, context)
        self._num_unstoppable = min_tokens
        self._stop = tuple(s for s in stop if s)
        self._unreleased = ""
        self.stopped = False

    def push(self, token_ids: Iterable[int]) -> str:
        """Add the next tokens and return the text that they release; nothing once ``stopped``."""
        released = []
        for token_id in token_ids:
            if self.stopped:
                break
            may_stop = self._num_unstoppable <= 0
            self._num_unstoppable -= 1
            released.append(self._take(self._pieces.push(token_id), may_stop))
        return "".join(released)

    def flush(self) -> str:
        """Return the text not yet released at the end of an answer; empty after a stop string."""
        if self.stopped:
            return ""
        released = self._take(self._pieces.flush(), self._num_unstoppable < 0)
        if not self.stopped:
            released, self._unreleased = released + self._unreleased, ""
        return released

    def _take(self, piece: str, may_stop: bool) -> str:
        if not self._stop:
            return piece
        text = self._unreleased + piece
        matches = [at for at in map(text.find, self._stop) if at >= 0]
        if matches and may_stop:
            self.stopped, self._unreleased = True, ""
            return text[: min(matches)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._unreleased = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Pieces(Protocol):
    """Turns tokens into pieces of text that no later token changes."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def _pieces_of(tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> _Pieces:
    if _is_byte_level(tokenizer):
        return _BytePieces(tokenizer)
    return _WindowPieces(tokenizer, context)


@lru_cache(maxsize=8)
def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if every token stands for bytes in GPT-2's table (Llama 3, Qwen, the test-bed)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str())["decoder"]
    return bool(decoder) and decoder["type"] == "ByteLevel"


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added if token.special}


@lru_cache(maxsize=8)
def _known_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes of tokens that were met before; one table for all answers of a tokenizer."""
    del tokenizer  # It is the key.
    return {}


@lru_cache(maxsize=1)
def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's table from printable characters to the bytes that they stand for."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + rank): byte for rank, byte in enumerate(others)}


class _BytePieces:
    """Pieces of byte-level tokenizers: an incremental UTF-8 decoder, constant work per token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known = _known_bytes(tokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        raw = self._known.get(token_id)
        if raw is None:
            raw = self._known[token_id] = self._bytes_of(token_id)
        return self._utf8.decode(raw)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in _special_ids(self._tokenizer):
            return b""
        symbols = self._tokenizer.convert_ids_to_tokens(token_id)
        if symbols is None:  # This id is a row of the head beyond the vocabulary.
            return b""
        table = _byte_of_symbol()
        try:
            return bytes(table[symbol] for symbol in symbols)
        except KeyError:  # An added token is spelt as text.
            return symbols.encode("utf-8")

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowPieces:
    """Pieces of any other tokenizer: a window decoded with the new tokens, minus without them.

    The window begins at tokens already released, because pieces depend on what stands before them
    (leading spaces, byte fallback).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-_NUM_CONTEXT_TOKENS:])
        self._num_released = len(self._window)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        num_pending = len(self._window) - self._num_released
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and num_pending < _MAX_PENDING_TOKENS:
            return ""
        return self._release(text)

    def flush(self) -> str:
        return self._release(self._decode(self._window))

    def _release(self, text: str) -> str:
        piece = text[len(self._decode(self._window[: self._num_released])) :]
        self._window = self._window[self._num_released :]
        self._num_released = len(self._window)
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
