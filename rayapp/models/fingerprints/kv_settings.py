"""The settings of a model's configuration that change its KV, in one spelling.

Numbers are taken from the parsed configuration, so neither the release of transformers that wrote
it nor the spelling out of defaults matters. Settings are listed by name: if a later release adds
one whose default computes what was computed before, the model is still the same. The tests list the
settings that are known not to change KV; a setting that stands in neither list fails them.

The settings of tokenizer and image processor are left out, because a model in memory has neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

_DECODER = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps",
)  # fmt: skip
_BIASES = ("attention_bias", "mlp_bias")
_PROJECTOR = (
    "model_type", "image_token_index", "projector_hidden_act", "multimodal_projector_bias",
    "vision_feature_select_strategy", "image_grid_pinpoints",
)  # fmt: skip
_TOWER = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip
_KNOWN_TOWERS = ("clip_vision_model", "siglip_vision_model")

_ROPE = {"rope_type": "default", "rope_theta": None, "partial_rotary_factor": 1.0}
"""Parameters of every kind of RoPE, with their defaults."""

_SCALED_ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "attention_factor": None,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}
"""Further parameters by kind of RoPE, with their defaults. For a kind that is not listed, all
parameters of the configuration count, and also if every kind of block has a RoPE of its own."""


def kv_settings(
    config: PreTrainedConfig, text: PreTrainedConfig, windows: Sequence[int | None]
) -> dict[str, Any]:
    """Settings that change KV beside the weights, as plain JSON.

    Args:
        config: The configuration of the whole model.
        text: The configuration of its decoder; the same object for a text-only model.
        windows: The sliding window of every block.
    """
    decoder = {name: getattr(text, name) for name in _DECODER}
    decoder |= {name: bool(getattr(text, name, False)) for name in _BIASES}
    decoder["head_dim"] = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    decoder["windows"] = list(windows)
    decoder["rope"] = _rope(text)
    settings = {"decoder": decoder, "tied": bool(config.tie_word_embeddings)}
    if text is not config:
        settings["projector"] = _projector(config)
        settings["tower"] = _tower(config.vision_config)
    plain: dict[str, Any] = _plain(settings)
    return plain


def _rope(text: PreTrainedConfig) -> dict[str, Any]:
    """Parameters from which the rotary embedding is computed."""
    given = {k: v for k, v in (text.rope_parameters or {}).items() if v is not None}
    kind = given.get("rope_type", "default")
    if kind not in _SCALED_ROPE or any(
        isinstance(parameter, Mapping) for parameter in given.values()
    ):
        return given | {"max_position_embeddings": text.max_position_embeddings}
    read = _ROPE | _SCALED_ROPE[kind]
    rope = {name: given.get(name, default) for name, default in read.items()}
    if "factor" in rope and rope["factor"] is None:  # Yarn then derives it from the lengths.
        rope["max_position_embeddings"] = text.max_position_embeddings
    if rope.get("attention_factor") is not None:  # Its ingredients are then not read.
        rope |= {"mscale": None, "mscale_all_dim": None}
    return rope


def _projector(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of the projector, and the outputs of the tower that it projects."""
    projector = {name: getattr(config, name, None) for name in _PROJECTOR}
    layers = config.vision_feature_layer
    outputs = config.vision_config.num_hidden_layers + 1
    listed = [layers] if isinstance(layers, int) else layers
    projector["vision_feature_layers"] = [n if n >= 0 else outputs + n for n in listed]
    return projector


def _tower(vision: PreTrainedConfig) -> dict[str, Any]:
    """Settings of the vision tower; for an unknown tower, its whole configuration."""
    if vision.model_type in _KNOWN_TOWERS:
        return {name: getattr(vision, name) for name in _TOWER}
    unread = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"}
    return {name: value for name, value in vision.to_dict().items() if name not in unread}


def _plain(value: Any) -> Any:
    """Convert to JSON that writes equal numbers alike: 10000 and 10000.0 are one RoPE base."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, str | bool | float) else str(value)
