"""What a search needs before its first score: checked data and model, and an evaluator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from rayapp.errors import DataError
from rayapp.models.blocks import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.loading import load_model, load_tokenizer
from rayapp.plan import ModelSignature
from rayapp.pruning.calibration import Calibration, load_calibration, read_lines
from rayapp.pruning.distill import BATCH_TOKENS, HELD_BACK_EVERY, Healer
from rayapp.pruning.evaluator import Evaluator
from rayapp.pruning.settings import PruneSettings


@dataclass(frozen=True)
class Prepared:
    """The calibration set and the heal data (None without healing), tokenised, and the model."""

    calibration: Calibration
    signature: ModelSignature
    heal_data: Calibration | None = None


def prepare(settings: PruneSettings) -> Prepared:
    """Read and check everything but the weights.

    Raises:
        ModelError: The model cannot be used.
        DataError: The calibration file cannot be used; file and line are named.
        InputError: Sizes contradict each other or the model.
    """
    settings.check(text_config(Checkpoint(settings.model).config).num_hidden_layers)
    return prepare_scoring(settings)


def prepare_scoring(settings: PruneSettings) -> Prepared:
    """As :func:`prepare`, for whoever brings candidates of their own: sizes are not checked."""
    checkpoint = Checkpoint(settings.model)
    signature = checkpoint.signature()
    calibration = load_calibration(
        settings.calibration,
        load_tokenizer(settings.model),
        max_positions=text_config(checkpoint.config).max_position_embeddings,
        chunk_tokens=settings.chunk_tokens,
    )
    return Prepared(calibration, signature, _heal_data(settings, checkpoint))


def _heal_data(settings: PruneSettings, checkpoint: Checkpoint) -> Calibration | None:
    """Lines to train on, none of whose prompts is scored on."""
    if settings.heal_data is None:
        return None
    data = load_calibration(
        settings.heal_data,
        load_tokenizer(settings.model),
        max_positions=text_config(checkpoint.config).max_position_embeddings,
        chunk_tokens=settings.chunk_tokens,
    )
    scored = {line.prompt: number for number, line in reversed(read_lines(settings.calibration))}
    for number, line in read_lines(settings.heal_data):
        if line.prompt in scored:
            raise DataError(
                f"{settings.heal_data} line {number}: its prompt is also in "
                f"{settings.calibration} line {scored[line.prompt]}; what is trained on cannot "
                "judge: drop it from one of them"
            )
    if len(data.lines) < HELD_BACK_EVERY:
        raise DataError(
            f"{settings.heal_data}: holds {len(data.lines)} lines; give {HELD_BACK_EVERY} or more, "
            "since every eighth is held back to judge the training"
        )
    return data


def open_evaluator(settings: PruneSettings, calibration: Calibration) -> Evaluator:
    """Load the model into this process, with this process's torch threads set for it.

    Raises:
        ModelError: The model cannot be read from here.
    """
    torch.set_num_threads(settings.threads)
    loaded = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    return Evaluator(
        loaded.model, calibration, settings.scoring(), cache_bytes=settings.cache_bytes
    )


def open_healer(
    settings: PruneSettings, evaluator: Evaluator, heal_data: Calibration | None
) -> Healer | None:
    """What trains pairs on an evaluator's model; None without data."""
    if heal_data is None:
        return None
    return Healer(
        evaluator.runner.model,
        heal_data.lines,
        first_token=settings.first_token,
        training=settings.training(),
        batch_tokens=min(settings.chunk_tokens, BATCH_TOKENS),
        cache_bytes=settings.cache_bytes,
    )


def heal_context(settings: PruneSettings, prepared: Prepared) -> dict[str, Any]:
    """All that trained tensors depend on, but the pair."""
    assert prepared.heal_data is not None, "only searches that heal ask"
    return {
        "weights": prepared.signature.weights_fingerprint,
        "data": prepared.heal_data.fingerprint,
        "first_token": settings.first_token,
        "dtype": settings.dtype,
        "training": asdict(settings.training()),
    }
