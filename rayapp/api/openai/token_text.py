"""Single tokens as text, for log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rayapp.engine.request import TokenLogprobs

# JSON knows no infinity; OpenAI writes this for a token of probability zero.
_LOWEST_LOGPROB = -9999.0
_BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TokenText:
    """One token; ``text`` spells its bytes if it is only a part of a character."""

    text: str
    raw: bytes


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> TokenText:
    r"""Return a token's text as it is written where the token stands alone.

    A part of a character is written as OpenAI does, ``bytes:\xe2\x82``, so that different tokens
    never look the same.
    """
    text = tokenizer.decode(
        [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    if "\ufffd" not in text:
        return TokenText(text, text.encode())
    raw = _raw_bytes(tokenizer.convert_ids_to_tokens(token_id)) or text.encode()
    return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)


def _raw_bytes(symbols: str | None) -> bytes | None:
    """Return the bytes of a byte-level token, or of a fallback token such as ``<0xE2>``."""
    if not symbols:
        return None
    if len(symbols) == 6 and symbols.startswith("<0x") and symbols.endswith(">"):
        return bytes.fromhex(symbols[3:5])
    if all(symbol in _BYTE_OF_SYMBOL for symbol in symbols):
        return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in symbols)
    return None


def finite(logprob: float) -> float:
    """Replace an infinite log-probability by a finite number, which JSON can carry."""
    return max(logprob, _LOWEST_LOGPROB)


def best_alternatives(
    tokenizer: PreTrainedTokenizerBase, token_id: int, entry: TokenLogprobs
) -> dict[str, float]:
    """Map the best alternatives to log-probabilities; the token itself is always among them."""
    pairs = dict([*entry.top, (token_id, entry.logprob)])
    return {token_text(tokenizer, i).text: finite(value) for i, value in pairs.items()}
