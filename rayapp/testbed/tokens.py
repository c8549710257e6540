"""The byte tokenizer: ids 0 to 255 are the bytes, 256 ends an answer, 257 pads.

The tokenizer is an ordinary Hugging Face one (byte-level BPE without merges), so that nothing in
rayapp or in a user's own script needs to know that it reads bytes. It puts no token before a
prompt: ``tokenizer(prompt)`` gives its UTF-8 bytes.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_ID = 256
"""Id of the end marker, which follows every answer."""

PAD_ID = 257
"""Id of the padding token."""

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}"
    "{%- else -%}{{ message['content'] + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""The template of a chat: a user's message and a newline, then an answer and the end marker, like
the rows of training."""


def _byte_symbols() -> list[str]:
    """The printable symbol that byte-level BPE writes for every byte, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def byte_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        max_positions: Longest sequence of the model, in tokens.

    Returns:
        A fast tokenizer whose ids equal bytes, with the chat template set.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (END_TOKEN, PAD_TOKEN)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
