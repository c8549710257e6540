"""The model that a benchmark's options choose: a checkpoint, or random weights of a shape."""

from __future__ import annotations

from argparse import Namespace

import torch
from transformers import PreTrainedModel

from rayapp.models.architecture import DTYPES
from rayapp.models.loading import load_model
from shapes.llama import random_llama


def model_of(asked: Namespace) -> PreTrainedModel:
    """The model of ``--model`` or ``--shape``, in memory of its own; calls give equal weights."""
    if asked.shape:
        torch.manual_seed(0)
        return random_llama(asked.shape, DTYPES[asked.dtype], asked.device)
    return load_model(asked.model, dtype=asked.dtype, device=asked.device).model
