"""The weights of a plan's stages in the form in which the engines multiply by them.

Queries, keys and values of a block become one product, and so do gate and up, unless bf16 products
on a CPU take the activation in; on a CPU all products are packed. This is done once, at load, to a
model that nobody else holds: no second copy stays, except of a head that is tied to the embeddings.
Healed tensors are packed too, one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rayapp.errors import IntegrityError
from rayapp.models.blocks import decoder_blocks
from rayapp.models.healed import Tensors, healed_parameters, keep_packed
from rayapp.models.products.joined import join, put
from rayapp.models.products.packed import PackedLinear, can_gate, can_pack, pack_head
from rayapp.plan import Mode, PruningPlan, Stage

_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_JOINED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), _GATE_UP)
_ALONE = ("self_attn.o_proj", "mlp.down_proj")


def pack_stages(model: PreTrainedModel, plan: PruningPlan, stages: Sequence[Stage]) -> int:
    """Join and pack the products that stages of a plan run, in a model that nobody else holds.

    Layers that one stage runs without the others, or that are healed, are packed one by one.
    Layers that were not loaded stay as they are.

    Returns:
        The bytes that the model has grown by: those of a tied head, otherwise 0.

    Raises:
        IntegrityError: The model's fingerprint, which needs plain weights, was not taken before.
        PlanError: Healed tensors are missing, or do not fit the plan or the model.
    """
    if getattr(model, "rayapp_fingerprint", None) is None:
        raise IntegrityError("products are packed after the fingerprint is taken; load the model")
    healed = {stage: healed_parameters(model, plan, stage) for stage in stages}
    for number, block in enumerate(decoder_blocks(model)):
        modes = [plan.mode(stage, number) for stage in stages]
        is_gated = can_gate(block.mlp)  # Its product takes the two layers one by one.
        for names in (*_JOINED, *((name,) for name in _ALONE)):
            may_join = _may_join(number, names, modes, healed)
            _pack_layers(block, names, may_join=may_join and not (is_gated and names == _GATE_UP))
    for stage in stages:
        keep_packed(model, plan, stage)
    return pack_head(model)


def _may_join(
    number: int, names: Sequence[str], modes: Sequence[Mode], healed: Mapping[Stage, Tensors]
) -> bool:
    """Whether every stage runs all of these layers, or none, with the model's own weights."""
    is_split = "self_attn.k_proj" in names and any(m.writes_kv and not m.attends for m in modes)
    prefixes = tuple(f"layers.{number}.{name}." for name in names)
    is_healed = any(name.startswith(prefixes) for tensors in healed.values() for name in tensors)
    return len(names) > 1 and not is_split and not is_healed


def _pack_layers(block: nn.Module, names: Sequence[str], *, may_join: bool) -> None:
    layers: list[Any] = [block.get_submodule(name) for name in names]
    are_plain = all(type(layer) is nn.Linear and not layer.weight.is_meta for layer in layers)
    if may_join and are_plain and len({layer.bias is None for layer in layers}) == 1:
        packed: Sequence[nn.Module] = join(layers)
    else:
        packed = [PackedLinear(layer) if can_pack(layer) else layer for layer in layers]
    for name, layer in zip(names, packed, strict=True):
        put(block, name, layer)
