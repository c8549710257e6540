"""A model as numbered blocks with parts, and the realisation of one stage of a plan.

Shapes: B = batch, T = tokens, E = hidden size, H = KV heads, D = head dimension.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rayapp.errors import PlanError
from rayapp.models.architecture import (
    check_supported,
    fingerprint_names,
    signature,
    signature_from,
    text_config,
)
from rayapp.models.fingerprints.fingerprint import canonical_name, weights_digest
from rayapp.models.healed import BRIDGE, Bridge, healed_parameters
from rayapp.models.products.joined import put, unpack
from rayapp.models.products.packed import PackedLinear
from rayapp.plan import Mode, ModelSignature, PruningPlan, Stage

_ATTENTION_PARTS = ("input_layernorm", "self_attn")
_MLP_PARTS = ("post_attention_layernorm", "mlp")


def find_decoder(model: nn.Module) -> Any:
    """Return the module that has ``embed_tokens``, ``layers``, ``norm`` and ``rotary_emb``."""
    outer: Any = model
    decoder = outer.get_decoder() if hasattr(outer, "get_decoder") else outer
    # LLaVA returns the wrapper in some releases; the language model lies just below it.
    return getattr(decoder, "language_model", decoder)


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, in order; raises :class:`ModelError` for an unsupported architecture."""
    check_supported(model.config)
    return find_decoder(model).layers


def signature_of(model: PreTrainedModel) -> ModelSignature:
    """The signature of a model in memory; its fingerprint is computed once, then kept on the model.

    A loaded model carries its checkpoint's fingerprint, even if only one stage of it was read.
    """
    check_supported(model.config)
    known = getattr(model, "rayapp_fingerprint", None)
    if known is not None:
        return signature(model.config, known)
    state = model.state_dict()
    named = fingerprint_names(model.config, state)
    digest = weights_digest((name, state[key]) for key, name in named.items())
    result = signature_from(model.config, digest)
    model.rayapp_fingerprint = result.weights_fingerprint
    return result


def apply_stage(model: PreTrainedModel, plan: PruningPlan, stage: Stage) -> PreTrainedModel:
    """Build the model that one stage of a plan runs: same class, same parameters, fewer parts.

    The result has its own module structure and configuration, and shares every parameter with
    ``model``, which is left unchanged: both stages of a plan can live beside the dense model at no
    cost in memory. Only if the plan is healed do the stage's healed tensors replace parameters.
    Blocks keep their numbers. The result's ``forward`` works as usual with explicit
    ``position_ids``; the engines run it block by block (:class:`rayapp.models.stack.BlockStack`).

    Raises:
        ModelError: The architecture is not supported.
        PlanError: The plan was made for another model, or its healed tensors cannot be used.
    """
    staged = apply_modes(model, plan, stage)
    healed = healed_parameters(model, plan, stage)
    _add_bridges(staged, healed, stage)
    replaced = {name.rpartition(".")[0] for name in healed}
    unpack(staged, [n for n, _ in staged.named_modules() if canonical_name(n) in replaced])
    owners = {
        canonical_name(f"{prefix}.{name}"): (prefix, module, name)
        for prefix, module in staged.named_modules()
        for name in module._parameters
    }
    # Packed tensors come last: they take the place of layers that have their healed bias by then.
    for name, tensor in sorted(healed.items(), key=lambda item: item[1].is_mkldnn):
        if name not in owners:
            raise PlanError(
                f"healed tensor {name!r} is of a part that {stage} does not run under this plan; "
                "use the weights that were written with it"
            )
        path, module, attribute = owners[name]
        module._parameters[attribute] = tensor
        if tensor.is_mkldnn:
            put(staged, path, PackedLinear(module))
    return staged


def _add_bridges(staged: PreTrainedModel, healed: Iterable[str], stage: Stage) -> None:
    """Give every block whose healed tensors are a bridge an empty one."""
    text, blocks = text_config(staged.config), decoder_blocks(staged)
    for number in sorted({int(n.split(".")[1]) for n in healed if n.split(".")[2] == BRIDGE}):
        block = blocks[number]
        if not isinstance(block, PartialBlock) or block.mode.attends or block.mode.has_mlp:
            raise PlanError(
                f"block {number} has a bridge, which stands for blocks that do not run, but "
                f"{stage} runs it; use the weights that were written with the plan"
            )
        block.add_module(BRIDGE, Bridge(text.hidden_size, text.rms_norm_eps))


def apply_modes(model: PreTrainedModel, plan: PruningPlan, stage: Stage) -> PreTrainedModel:
    """Apply only the modes of a stage: :func:`apply_stage` without healed tensors."""
    check_supported(model.config)
    plan.check_model(signature_of(model))
    staged = _share(model, {})
    blocks = decoder_blocks(staged)
    for number in range(len(blocks)):
        mode = plan.mode(stage, number)
        if mode != Mode.FULL:
            blocks[number] = PartialBlock(blocks[number], mode)
    return staged.eval()


def _share(module: Any, configs: dict[int, Any]) -> Any:
    """Copy a module tree; tensors are shared with the original, configurations are not."""
    clone = module.__class__.__new__(module.__class__)
    state = clone.__dict__
    # A hook on one copy must not run in another copy. Module.__setattr__ would look at every value.
    for name, value in module.__dict__.items():
        state[name] = value.copy() if "_hooks" in name and isinstance(value, dict) else value
    state["_parameters"] = dict(module._parameters)
    state["_buffers"] = dict(module._buffers)
    state["_modules"] = {
        name: None if child is None else _share(child, configs)
        for name, child in module._modules.items()
    }
    config = state.get("config")
    if isinstance(config, PreTrainedConfig):
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
        state["config"] = configs[id(config)]
    return clone


class PartialBlock(nn.Module):
    """A pre-norm decoder block that has only the parts that are computed.

    Parts keep the names that they have in the full block, so that a checkpoint's tensor names fit.
    A block without attention and MLP may end a span that a :class:`Bridge` stands for.
    """

    def __init__(self, block: Any, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.layer_idx: int = block.self_attn.layer_idx
        attention_type = getattr(block, "attention_type", None)
        if attention_type is not None:
            self.attention_type = attention_type
        kept = _ATTENTION_PARTS if mode.attends else ()
        if mode.has_mlp:
            kept = (*kept, *_MLP_PARTS)
        for name in kept:
            self.add_module(name, getattr(block, name))
        if mode.writes_kv and not mode.attends:
            self.add_module("input_layernorm", block.input_layernorm)
            self.add_module("self_attn", KVProjection(block.self_attn))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Compute the block's hidden states ``(B, T, E)``; ``past_key_values`` receives the KV."""
        parts: Any = self
        if self.mode.writes_kv:
            attended, _ = parts.self_attn(
                hidden_states=parts.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if self.mode.attends:
                hidden_states = hidden_states + attended
        if self.mode.has_mlp:
            hidden_states = hidden_states + parts.mlp(parts.post_attention_layernorm(hidden_states))
        bridge = self._modules.get(BRIDGE)
        return hidden_states if bridge is None else bridge(hidden_states)


class KVProjection(nn.Module):
    """The part of an attention that writes KV: projections, key norm, rotation, cache update.

    Keys and values are bit-equal to those of the full attention on the same input (POP's prefill,
    arXiv:2602.03295).
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.k_proj, self.v_proj = attention.k_proj, attention.v_proj
        self.k_norm = getattr(attention, "k_norm", None)
        # Each family rotates with the function of the module that defines its attention.
        self._rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[None, None]:
        """Write the KV of normalised hidden states ``(B, T, E)``; nothing is attended."""
        if past_key_values is None:
            return None, None
        shape_BTHD = (*hidden_states.shape[:-1], -1, self.head_dim)
        keys = self.k_proj(hidden_states).view(shape_BTHD)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        keys_BHTD = keys.transpose(1, 2)
        values_BHTD = self.v_proj(hidden_states).view(shape_BTHD).transpose(1, 2)
        cos, sin = position_embeddings or (None, None)
        keys_BHTD, _ = self._rotate(keys_BHTD, keys_BHTD, cos, sin)
        past_key_values.update(keys_BHTD, values_BHTD, self.layer_idx)
        return None, None
