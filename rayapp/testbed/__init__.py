"""Small trained models, the questions that they answer, and the recipes that made them.

``text/`` is a Llama of 12 blocks over bytes, an ordinary Hugging Face directory of under 5 MB.
Dense, it answers nearly every held-out question of :mod:`rayapp.testbed.tasks`, so a point lost
under a plan is the plan's. ``vision/weights/`` is a LLaVA for pictures (:mod:`.vision`).

Invariant: training knows nothing of pruning (no layer dropout, no spare blocks), and no question of
one split appears in another. The alternative, random weights of a real model's shape, was rejected
for quality: without trained weights every plan scores alike.
"""

from __future__ import annotations

from pathlib import Path


def text_model_path() -> Path:
    """The directory of the shipped text model, for ``from_pretrained`` or ``--model``."""
    return Path(__file__).parent / "text"


def vision_model_path() -> Path:
    """The directory of the shipped vision model, for ``from_pretrained`` or ``--model``."""
    return Path(__file__).parent / "vision" / "weights"
