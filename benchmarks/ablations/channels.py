"""Structured pruning of MLP channels, the non-block method to compare with.

The score of a channel is the mean magnitude of its activation times the norm of its column of the
down projection (Wanda's criterion, arXiv:2306.11695, per channel), measured at the stage's own
positions: prompt tokens for prefill, continuation tokens for decode. The channels with the lowest
scores leave, the same share in every block. Shapes: T = tokens, F = channels, E = hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ablations.bench import Bench
from rayapp.evaluation.measures.likelihood import TwoStages
from rayapp.models.blocks import decoder_blocks
from rayapp.plan import STAGES, PruningPlan
from rayapp.pruning.evaluator.calibration import load_calibration


def without_channels(bench: Bench, blocks: int, *, per_stage: bool) -> tuple[TwoStages, float]:
    """Stages without as many parameters as ``blocks`` blocks have, and the share of channels."""
    model = bench.loaded.model
    layers = decoder_blocks(model)
    in_block = sum(p.numel() for p in layers[0].parameters())
    in_mlp = sum(p.numel() for p in layers[0].mlp.parameters())
    share = blocks * in_block / (len(layers) * in_mlp)
    activity = _activity(bench)
    stages = {}
    for stage in STAGES:
        used = activity[stage] if per_stage else activity["prefill"] + activity["decode"]
        sliced = copy.deepcopy(model)
        for layer, mean_F in zip(decoder_blocks(sliced), used, strict=True):
            _slice(layer.mlp, mean_F, share)
        stages[stage] = TwoStages(sliced, PruningPlan())
    side = stages["prefill"]
    side.decode = stages["decode"].decode
    return side, share


@torch.no_grad()
def _activity(bench: Bench) -> dict[str, torch.Tensor]:
    """Mean magnitude of every channel, ``(blocks, F)``, by stage."""
    model: Any = bench.loaded.model
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, given, number=number: seen.__setitem__(number, given[0][0].abs())
        )
        for number, layer in enumerate(decoder_blocks(model))
    ]
    totals = {stage: torch.zeros(1) for stage in STAGES}
    counts = dict.fromkeys(STAGES, 0)
    for line in load_calibration(bench.calibration(), bench.loaded.tokenizer).lines:
        model(input_ids=torch.tensor([[*line.prompt, *line.continuation[:-1]]]), use_cache=False)
        found_LTF = torch.stack([seen[number] for number in sorted(seen)])
        cut = len(line.prompt)
        for stage, part_LTF in (("prefill", found_LTF[:, :cut]), ("decode", found_LTF[:, cut:])):
            totals[stage] = totals[stage] + part_LTF.sum(dim=1)
            counts[stage] += part_LTF.shape[1]
    for hook in hooks:
        hook.remove()
    return {stage: totals[stage] / counts[stage] for stage in STAGES}


@torch.no_grad()
def _slice(mlp: Any, mean_F: torch.Tensor, share: float) -> None:
    """Drop the share of channels that matters least."""
    score_F = mean_F * mlp.down_proj.weight.norm(dim=0)
    keep = score_F.argsort(descending=True)[: round(len(score_F) * (1 - share))].sort().values
    for name in ("gate_proj", "up_proj"):
        _replace(mlp, name, getattr(mlp, name).weight[keep])
    _replace(mlp, "down_proj", mlp.down_proj.weight[:, keep])


def _replace(mlp: Any, name: str, weight: torch.Tensor) -> None:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    setattr(mlp, name, linear)
