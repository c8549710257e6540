"""The fate of the dense cache's bytes under a plan: for one prompt, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from rayapp.kv.forecast import RunPrompt, forecast_envelope, forecast_sizes
from rayapp.kv.ledger import KVShape, Route, account
from rayapp.plan import PruningPlan


def forecast_transfer(
    plan: PruningPlan,
    num_prompt_tokens: int,
    dtype: torch.dtype,
    *,
    num_visual_tokens_removed: int = 0,
) -> Mapping[str, Any]:
    """Forecast the ledger's record of a prompt under the plan.

    The forecast assumes that blocks cache the whole prompt (no sliding windows, which a plan does
    not know). Its header is that of a prompt without gaps; with visual tokens removed, the real one
    is a little longer.

    Args:
        plan: The plan, which must name its model.
        num_prompt_tokens: Length of the unpruned prompt.
        dtype: Element type of the engine.
        num_visual_tokens_removed: Number of prompt tokens that are removed visual tokens.
    """
    model = plan.model
    assert model is not None, "only plans that name their model are asked about"
    shape = KVShape(
        num_blocks=model.num_blocks,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        element_bytes=dtype.itemsize,
        windows=(None,) * model.num_blocks,
    )
    envelope = forecast_envelope(plan)
    num_left = num_prompt_tokens - num_visual_tokens_removed
    record = account(
        shape,
        plan,
        forecast_sizes(shape, dtype, plan, envelope, RunPrompt(num_left)),
        Route(envelope.request_id, envelope.attempt, "", ""),
        num_prompt_tokens=num_prompt_tokens,
        num_visual_tokens_removed=num_visual_tokens_removed,
    )
    return asdict(record)
