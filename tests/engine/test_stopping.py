"""Text as it grows: equal to decoding everything at once, and never beyond a stop string."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from rayapp.engine.stopping import TextStream

TEXT = "Grüße, 世界 🎉! naïve café"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words with a leading-space mark, and byte tokens for everything else."""
    words = ["▁the", "▁cat", "▁sat", "s", "▁"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)} | {"<unk>": 256 + len(words)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>")


def streamed(tokenizer, token_ids, stop=(), **kwargs) -> list[str]:
    stream = TextStream(tokenizer, stop, **kwargs)
    pieces = [stream.push([token_id]) for token_id in token_ids]
    return [*pieces, stream.flush()]


def test_characters_appear_when_their_last_byte_does(byte_tokenizer):
    pieces = streamed(byte_tokenizer, list("a世b".encode()))
    assert pieces == ["a", "", "", "世", "b", ""]


def test_what_is_cut_off_becomes_a_replacement_character(byte_tokenizer):
    token_ids = list("a世".encode())[:-1]
    assert streamed(byte_tokenizer, token_ids) == ["a", "", "", "\ufffd"]


def test_a_stream_of_tokenizers_would_lose_what_is_cut_off(byte_tokenizer):
    """The reason for streams of our own."""
    stream = DecodeStream(skip_special_tokens=True)
    backend = byte_tokenizer.backend_tokenizer
    pieces = [stream.step(backend, token_id) for token_id in list("a世".encode())[:-1]]
    assert pieces == ["a", None, None]
    assert not hasattr(stream, "flush")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=40))
def test_any_bytes_stream_to_what_decoding_gives(byte_tokenizer, token_ids):
    expected = byte_tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(streamed(byte_tokenizer, token_ids)) == expected


def test_ids_beyond_the_tokenizer_have_no_text(byte_tokenizer):
    assert streamed(byte_tokenizer, [65, 290, 66]) == ["A", "", "B", ""]


def test_byte_fallback_streams_whole_characters():
    tokenizer = fallback_tokenizer()
    token_ids = [256, 257, *"é🎉".encode(), 258, 259]
    pieces = streamed(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids) == "the caté🎉 sats"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_leading_space_survives_after_a_prompt():
    tokenizer = fallback_tokenizer()
    assert streamed(tokenizer, [257, 258], context=[256])[:2] == [" cat", " sat"]


def test_broken_bytes_do_not_hold_the_text_back_for_ever():
    tokenizer = fallback_tokenizer()
    stream = TextStream(tokenizer)
    assert stream.push([0xFF] * 30).count("\ufffd") >= 20
    assert stream.push([257]).endswith(" cat")


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=20),
    stop=st.lists(st.text(alphabet="ab", max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=5),
)
def test_text_ends_before_the_first_stop_string(byte_tokenizer, text, stop, cuts):
    token_ids = list(text.encode())
    whole = "".join(streamed(byte_tokenizer, token_ids, stop))
    ends = [end for end in range(len(text) + 1) if any(s and text[:end].endswith(s) for s in stop)]
    expected = text
    if ends:  # the first to be complete; of those that end there, the longest
        expected = min(text[: ends[0]].removesuffix(s) for s in stop if text[: ends[0]].endswith(s))
    assert whole == expected
    stream = TextStream(byte_tokenizer, stop)
    edges = sorted({0, len(token_ids), *(c for c in cuts if c < len(token_ids))})
    parts = [stream.push(token_ids[a:b]) for a, b in itertools.pairwise(edges)]
    assert "".join(parts) + stream.flush() == expected
    assert stream.stopped == bool(ends)


def test_only_a_possible_beginning_is_held_back(byte_tokenizer):
    stream = TextStream(byte_tokenizer, ["END"])
    assert [stream.push([ord(c)]) for c in "aENbEND!"] == ["a", "", "", "ENb", "", "", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_an_unfinished_stop_string_is_text_after_all(byte_tokenizer):
    stream = TextStream(byte_tokenizer, ["END"])
    assert stream.push(b"xEN") == "x"
    assert stream.flush() == "EN"


def test_stop_strings_may_span_characters_of_many_bytes(byte_tokenizer):
    token_ids = list(TEXT.encode())
    assert "".join(streamed(byte_tokenizer, token_ids, ["界 🎉"])) == "Grüße, 世"


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_everything_else_passes_unchanged(byte_tokenizer, stop):
    assert "".join(streamed(byte_tokenizer, list(TEXT.encode()), stop)) == TEXT


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "a"), (2, "a"), (3, "aXXb"), (5, "aXXb"), (6, "aXXbXXc")]
)
def test_stop_strings_end_no_answer_within_its_least_length(byte_tokenizer, min_tokens, text):
    """A stop string counts where it ends, token by token or all at once."""
    token_ids = list(b"aXXbXXc")
    pieces = streamed(byte_tokenizer, token_ids, ["XX"], min_tokens=min_tokens)
    assert "".join(pieces) == text
    at_once = TextStream(byte_tokenizer, ["XX"], min_tokens=min_tokens)
    assert at_once.push(token_ids) + at_once.flush() == text
