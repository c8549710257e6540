"""The tokenizer: a word is a token, and a scene's picture is one placeholder.

The tokenizer is an ordinary Hugging Face one of some forty words. Words are split at white space,
and question marks count as white space: ``colour of the square?`` ends with the word that it asks
about, as ``colour of the square`` does. The tokenizer puts no token before a prompt.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayapp.testbed.vision.questions.questions import MOST_COUNTED, PLACES
from rayapp.testbed.vision.scenes.scenes import COLOURS, NUM_THINGS, SHAPES

IMAGE_TOKEN = "<image>"
SPECIAL = ("<|end|>", "<|pad|>", "<|unknown|>", IMAGE_TOKEN)

NOTHING = "nothing"
"""The word of a patch that shows no thing; no question has it."""

CENTRE = "centre"
"""The word of a patch with the middle of a thing, beside colour and shape; no question has it."""

COUNTS = tuple(str(count) for count in range(max(MOST_COUNTED, NUM_THINGS[1]) + 1))

WORDS = (
    *COLOURS,
    *SHAPES,
    *(place for row in PLACES for place in row),
    *COUNTS,
    *("colour", "shape", "of", "the", "where", "is", "how", "many"),
    *("largest", "smallest", "things", NOTHING, CENTRE),
)
VOCABULARY = (*SPECIAL, *WORDS)
"""Every token; its index is its id."""

IDS = {token: index for index, token in enumerate(VOCABULARY)}
END_ID, PAD_ID, UNKNOWN_ID, IMAGE_ID = range(len(SPECIAL))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- else -%}{{ '<image>\\n' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- else -%}{{ '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
)
"""The template of a chat: a user's picture and question end with white space, which is no token."""


def word_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        max_positions: Longest sequence of the model, in tokens.

    Returns:
        A fast tokenizer with the ids of ``IDS`` and the chat template set.
    """
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(IDS), unk_token=SPECIAL[UNKNOWN_ID]))
    tokenizer.normalizer = normalizers.Replace("?", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[END_ID],
        pad_token=SPECIAL[PAD_ID],
        unk_token=SPECIAL[UNKNOWN_ID],
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
