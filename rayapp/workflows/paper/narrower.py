"""A plan of fewer channels in place of fewer blocks: the baseline of width beside depth."""

from __future__ import annotations

from pathlib import Path

from rayapp.data.seen import Seen
from rayapp.models.hub import from_directory
from rayapp.models.loading import load_model
from rayapp.plan import PruningPlan
from rayapp.pruning.measures.channels import without_channels
from rayapp.pruning.preparation import prepare_scoring
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings


def narrower(
    score: ScoreSettings, compute: ComputeSettings, out: Path, num_blocks: int
) -> PruningPlan:
    """Write a plan whose prefill lacks as many parameters as some blocks have, in its MLPs.

    Args:
        score: The score, whose prompts judge channels, and whose first token the plan keeps.
        compute: The device.
        out: Directory of the plan and its tensors.
        num_blocks: Number of blocks that have as many parameters.

    Raises:
        InputError: Model or data cannot be used, or there are too few channels.
    """
    prepared = prepare_scoring(score, compute)
    model = load_model(score.model, dtype=score.dtype, device=compute.device).model
    prompts = [line.prompt for line in prepared.calibration.lines]
    weights = without_channels(model, prompts, num_blocks)
    provenance = {
        **from_directory(score.model).provenance,
        "seen": Seen.of([score.calibration]).model_dump(mode="json"),
        "settings": score.identity,
        "channels_of_blocks": num_blocks,
    }
    plan = PruningPlan(
        model=prepared.signature, first_token=score.first_token, healed=weights.digest,
        provenance=provenance,
    )  # fmt: skip
    weights.save(out)
    plan.save(out)
    return PruningPlan.load(out)
