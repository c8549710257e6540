"""The weights that prefill would need on a decode replica, beside those that are there."""

from __future__ import annotations

from rayapp.models.healed import HealedWeights
from rayapp.plan import Mode, PruningPlan


def lack_in_decode(plan: PruningPlan, num_blocks: int) -> str | None:
    """Name a weight that prefill needs and decode lacks; None if there is none.

    Prefill may miss what decode runs, as in plans that skip blocks in prefill.

    Args:
        plan: The plan.
        num_blocks: Number of blocks of the model.

    Raises:
        PlanError: The healed tensors of the plan cannot be read.
    """
    run = [block for block in range(num_blocks) if plan.mode("prefill", block) is not Mode.REMOVED]
    for block in run:
        prefill, decode = plan.mode("prefill", block), plan.mode("decode", block)
        has_attention = decode.attends or not prefill.writes_kv
        if not has_attention or (prefill.has_mlp and not decode.has_mlp):
            return f"block {block} is {prefill} in prefill and {decode} in decode"
    if not plan.healed:
        return None
    healed = HealedWeights.load(plan).stages
    if healed["prefill"]:
        return f"prefill has {len(healed['prefill'])} healed tensors of its own"
    prefixes = tuple(f"layers.{block}." for block in run)
    shared = next((name for name in healed["decode"] if name.startswith(prefixes)), None)
    return None if shared is None else f"{shared} is healed in decode, and prefill runs it too"
