"""The check whether decode replicas of a service may prefill short prompts themselves."""

from __future__ import annotations

from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.models.architecture import MULTIMODAL_TYPES, text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.hub import locate
from rayapp.models.shared_weights import lack_in_decode
from rayapp.plan import PruningPlan


def short_way_obstacle(settings: ServiceSettings) -> str | None:
    """Say why all prompts are prefilled apart; None if short ones need not be.

    Args:
        settings: The settings of the service.

    Raises:
        ModelError: The model cannot be read.
        PlanError: The plan cannot be read.
    """
    if settings.mode == "unified":
        return "unified replicas run both stages"
    if not settings.short_prompt_tokens:
        return "short_prompt_tokens is 0"
    config = Checkpoint(locate(settings.model, settings.revision).directory).config
    if config.model_type in MULTIMODAL_TYPES:
        return "the model takes images, which decode replicas cannot read"
    plan = PruningPlan.load(settings.plan) if settings.plan else PruningPlan()
    lack = lack_in_decode(plan, text_config(config).num_hidden_layers)
    return None if lack is None else f"it would need weights that decode lacks: {lack}"
