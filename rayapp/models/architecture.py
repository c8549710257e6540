"""What a configuration says about a model: its family, its shapes, and its signature.

Nothing here needs the model itself, so a process that only counts bytes or names plans, as the
ingress does, stays without the machinery that models are made of.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from rayapp.errors import ModelError
from rayapp.models.fingerprints.fingerprint import canonical_name, model_fingerprint
from rayapp.models.fingerprints.kv_settings import kv_settings
from rayapp.plan import ModelSignature

SUPPORTED_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MULTIMODAL_TYPES = ("llava", "llava_next")
# These kinds of RoPE recompute their frequencies from the longest sequence seen: keys of one prompt
# would depend on its neighbours, and an entry could not travel without its context.
_STATEFUL_ROPE = ("dynamic", "longrope")

# Earlier releases of transformers wrote these into checkpoints.
_BUFFERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Configuration of the decoder: the model's own, or that of the language model inside it."""
    return config.get_text_config(decoder=True)


def check_supported(config: PreTrainedConfig) -> None:
    """Raise :class:`ModelError` if stages cannot be applied to the architecture, and name it."""
    text = text_config(config)
    kind = config.model_type if text is config else f"{config.model_type} over {text.model_type}"
    outer_known = text is config or config.model_type in MULTIMODAL_TYPES
    if not outer_known or text.model_type not in SUPPORTED_TYPES:
        experts = " (a mixture of experts)" if _num_experts(text) > 1 else ""
        raise ModelError(
            f"architecture {kind!r}{experts} is not supported; use one of "
            f"{', '.join(SUPPORTED_TYPES)}, alone or inside {' or '.join(MULTIMODAL_TYPES)}"
        )
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _STATEFUL_ROPE:
        raise ModelError(
            f"architecture {kind!r} with rope_type {rope!r} is not supported: its keys depend on "
            "the longest prompt seen; use default, linear, llama3 or yarn"
        )


def _num_experts(text: PreTrainedConfig) -> int:
    """Number of MLPs that a router chooses from in a block; 0 for ordinary blocks."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return max((getattr(text, name, None) or 0 for name in names), default=0)


def sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Sliding window of every block in tokens, its own token included; None for full attention."""
    text = text_config(config)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (window,) * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def head_dim(config: PreTrainedConfig) -> int:
    """Size of one attention head."""
    text = text_config(config)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def signature(config: PreTrainedConfig, fingerprint: str) -> ModelSignature:
    """Make the signature that a plan must agree with, from a configuration and a fingerprint."""
    text = text_config(config)
    return ModelSignature(
        model_type=config.model_type,
        num_blocks=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim(config),
        vocab_size=text.vocab_size,
        weights_fingerprint=fingerprint,
    )


def signature_from(config: PreTrainedConfig, digest: str) -> ModelSignature:
    """The signature of a configuration with weights of this digest."""
    settings = kv_settings(config, text_config(config), sliding_windows(config))
    return signature(config, model_fingerprint(settings, digest))


def fingerprint_names(config: PreTrainedConfig, names: Iterable[str]) -> dict[str, str]:
    """Map tensor names to their names in the fingerprint, the same in a checkpoint and in memory.

    A tied head is left out, and so are buffers that follow from the configuration: some checkpoints
    have them and some do not.
    """
    left_out = (*_BUFFERS, *(["lm_head.weight"] if config.tie_word_embeddings else []))
    return {name: canonical_name(name) for name in names if not name.endswith(left_out)}


def compute_dtype(config: PreTrainedConfig, dtype: str = "auto") -> torch.dtype:
    """Element type in which a model is loaded; ``auto`` takes the checkpoint's own."""
    own = config.dtype or torch.float32
    return DTYPES.get(dtype) or (DTYPES[own] if isinstance(own, str) else own)
