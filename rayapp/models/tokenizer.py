"""The tokenizer of a model directory, which must fit the model's embeddings."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayapp.errors import ModelError
from rayapp.models.architecture import text_config
from rayapp.models.checkpoint import CONFIG_FILE, read_config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    It also gets the chat template that some models keep beside it for their processor.

    Raises:
        ModelError: There is no tokenizer, or it has ids for which the model has no embedding.
    """
    tokenizer = _read_tokenizer(path)
    if (Path(path) / CONFIG_FILE).is_file():
        _check_vocabulary(path, text_config(read_config(Path(path))).vocab_size, tokenizer)
    return tokenizer


def _check_vocabulary(
    path: str | Path, num_embeddings: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer with ids beyond the embeddings; spare embeddings do no harm."""
    vocabulary = tokenizer.get_vocab()
    beyond = [token for token, number in vocabulary.items() if number >= num_embeddings]
    if beyond:
        first = min(beyond, key=vocabulary.__getitem__)
        raise ModelError(
            f"{path}: the tokenizer has ids up to {max(vocabulary.values())}, and the model only "
            f"{num_embeddings} embeddings (first without: {first!r}, id {vocabulary[first]}); give "
            "the tokenizer that the model was trained with, or resize_token_embeddings"
        )


def _read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        beside = Path(path) / "chat_template.json"
        if not tokenizer.chat_template and beside.is_file():
            tokenizer.chat_template = json.loads(beside.read_text("utf-8"))["chat_template"]
        return tokenizer
    except Exception as error:  # noqa: BLE001 - whatever a foreign parser raises is the user's file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path}: no usable tokenizer ({reason}); save one beside the model"
        ) from None
