"""What a search needs before its first score: checked data and model, and an evaluator."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.models.blocks import text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.loading import load_model, load_tokenizer
from rayapp.plan import ModelSignature
from rayapp.pruning.calibration import Calibration, load_calibration
from rayapp.pruning.evaluator import Evaluator
from rayapp.pruning.settings import PruneSettings


@dataclass(frozen=True)
class Prepared:
    """The calibration set, tokenised, and the model's signature."""

    calibration: Calibration
    signature: ModelSignature


def prepare(settings: PruneSettings) -> Prepared:
    """Read and check everything but the weights.

    Raises:
        ModelError: The model cannot be used.
        DataError: The calibration file cannot be used; file and line are named.
        InputError: Sizes contradict each other or the model.
    """
    checkpoint = Checkpoint(settings.model)
    signature = checkpoint.signature()
    settings.check(signature.num_blocks)
    calibration = load_calibration(
        settings.calibration,
        load_tokenizer(settings.model),
        max_positions=text_config(checkpoint.config).max_position_embeddings,
        chunk_tokens=settings.chunk_tokens,
    )
    return Prepared(calibration, signature)


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
