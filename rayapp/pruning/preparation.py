"""The preparation of a search: checked data, a checked model, and an evaluator."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.data.lines import ImageLine, read_lines
from rayapp.errors import DataError, InputError
from rayapp.models.architecture import MULTIMODAL_TYPES, text_config
from rayapp.models.blocks import decoder_blocks
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import locate
from rayapp.models.loading import load_model
from rayapp.models.products.packed import pack_products
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import ModelSignature
from rayapp.pruning.evaluator.calibration import Calibration, load_calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.visual_words import ImageWordReader, teach
from rayapp.pruning.healing.healed_units import unit_context
from rayapp.pruning.healing.training import BATCH_TOKENS, HELD_BACK_EVERY, Healer
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.pruning.settings.training import Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The tokenised calibration set and heal data (None without healing), and the signature."""

    calibration: Calibration
    signature: ModelSignature
    heal_data: Calibration | None = None


def located(score: ScoreSettings) -> ScoreSettings:
    """The settings with the directory of their model in place of its Hub id.

    Raises:
        ModelError: There is no such directory, or no such model on the Hub or in its cache.
    """
    directory = locate(score.model, score.revision).directory
    return score.model_copy(update={"model": str(directory), "revision": None})


def prepare(score: ScoreSettings, compute: ComputeSettings, search: SearchSettings) -> Prepared:
    """Read and check everything that a search needs, except the weights.

    Raises:
        ModelError: The model cannot be used.
        DataError: The calibration file cannot be used; file and line are named.
        InputError: Sizes contradict each other or the model.
    """
    search.check(text_config(Checkpoint(score.model).config).num_hidden_layers)
    prepared = prepare_scoring(score, compute, search.heal_data)
    if score.visual_tokens and not any(line.image_keys for line in prepared.calibration.lines):
        raise DataError(
            f"{score.calibration}: holds no line about an image, but visual tokens shall be "
            "pruned; give lines with `image`, or leave --visual-tokens out"
        )
    return prepared


def prepare_scoring(
    score: ScoreSettings, compute: ComputeSettings, heal_data: str | None = None
) -> Prepared:
    """Prepare the scoring of given candidates, without sizes to check.

    The preparation is otherwise that of :func:`prepare`.

    ``heal_data`` is the file that pairs are trained on, if any are.
    """
    checkpoint = Checkpoint(score.model)
    signature = checkpoint.signature()
    tokenizer = load_tokenizer(score.model)
    images = _image_reader(score, compute.device, checkpoint, tokenizer)
    read = partial(
        load_calibration,
        tokenizer=tokenizer,
        max_positions=text_config(checkpoint.config).max_position_embeddings,
        chunk_tokens=score.chunk_tokens,
        images=images,
    )
    calibration = read(score.calibration)
    if heal_data is None:
        return Prepared(calibration, signature)
    healing_set = read(heal_data)
    _check_heal_data(heal_data, score.calibration, len(healing_set.lines))
    return Prepared(calibration, signature, healing_set)


def _image_reader(
    score: ScoreSettings, device: str, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase
) -> ImageWordReader | None:
    """A reader of lines about images, on this process's device; None for a text-only model."""
    if checkpoint.config.model_type not in MULTIMODAL_TYPES:
        if score.visual_tokens:
            raise InputError(
                f"visual tokens shall be pruned, but model type {checkpoint.config.model_type!r} "
                "takes no images; leave --visual-tokens out"
            )
        return None
    here = "cuda" not in device or torch.cuda.is_available()
    return ImageWordReader(
        score.model,
        tokenizer,
        score.visual_tokens,
        dtype=score.dtype,
        device=device if here else "cpu",
        ends_in_text=score.first_token == "decode",
    )


def _check_heal_data(heal_data: str, calibration: str, num_lines: int) -> None:
    """Raise :class:`DataError` if there are too few lines, or one of them is scored on too."""
    scored = {question: number for number, question in reversed(_asked(calibration))}
    for number, question in _asked(heal_data):
        if question in scored:
            raise DataError(
                f"{heal_data} line {number}: its prompt is also in {calibration} line "
                f"{scored[question]}; what is trained on cannot judge: drop it from one of them"
            )
    if num_lines < HELD_BACK_EVERY:
        raise DataError(
            f"{heal_data}: holds {num_lines} lines; give {HELD_BACK_EVERY} or more, "
            "since every eighth is held back to judge the training"
        )


def _asked(path: str) -> list[tuple[int, tuple[str, ...]]]:
    """The questions of all lines by number: the prompt and the contents of its images."""
    return [
        (number, (line.prompt, *(_digest(Path(path).parent / image) for image in line.paths)))
        if isinstance(line, ImageLine)
        else (number, (line.prompt,))
        for number, line in read_lines(path)
    ]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_evaluator(
    score: ScoreSettings, compute: ComputeSettings, calibration: Calibration
) -> Evaluator:
    """Load the model into this process, with this process's torch threads set for it.

    Raises:
        ModelError: The model cannot be read from here.
    """
    torch.set_num_threads(compute.threads)
    loaded = load_model(score.model, dtype=score.dtype, device=compute.device)
    teach(loaded.model, calibration.words)
    grown = pack_products(loaded.model, decoder_blocks(loaded.model))
    logger.info(
        "evaluator: %.0f MB of weights, at most %.0f MB of states kept for reuse",
        (loaded.parameter_bytes + grown) / 1e6,
        compute.cache_bytes / 1e6,
    )
    return Evaluator(loaded.model, calibration, score.scoring(), cache_bytes=compute.cache_bytes)


def open_healer(
    score: ScoreSettings,
    compute: ComputeSettings,
    training: Training,
    evaluator: Evaluator,
    heal_data: Calibration | None,
) -> Healer | None:
    """A trainer of pairs on an evaluator's model; None without heal data."""
    if heal_data is None:
        return None
    teach(evaluator.runner.model, heal_data.words)
    return Healer(
        evaluator.runner.model,
        heal_data.lines,
        first_token=score.first_token,
        training=training,
        batch_tokens=min(score.chunk_tokens, BATCH_TOKENS),
        cache_bytes=compute.cache_bytes,
    )


def heal_context(score: ScoreSettings, training: Training, prepared: Prepared) -> dict[str, Any]:
    """Everything that trained tensors depend on, except the pair."""
    assert prepared.heal_data is not None, "only searches that heal ask"
    return unit_context(
        weights=prepared.signature.weights_fingerprint,
        data=prepared.heal_data.fingerprint,
        first_token=score.first_token,
        dtype=score.dtype,
        training=training,
    )
