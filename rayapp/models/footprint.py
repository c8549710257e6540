"""What one replica of a stage will hold in memory, from a configuration alone.

The model is built on the meta device, so neither weights nor memory are needed. Weights are exact:
the parameters that the stage runs, tied ones once, and the packed copy of tied embeddings. KV is
exact per token, before anything is cut by ``kv_transfer``. The memory of a step is an estimate from
above: the tensors that exist together, as :mod:`rayapp.models.passes.many_tokens` makes them.
Symbols: N = tokens of a step, E = hidden size, Q = query heads, H = KV heads, D = head dimension,
M = width of the MLP, V = vocabulary, L = limit of prompt and answer tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from rayapp.models.architecture import (
    check_supported,
    compute_dtype,
    head_dim,
    sliding_windows,
    text_config,
)
from rayapp.models.loading import Part, empty_model, needed_names, stages_of
from rayapp.models.passes.many_tokens import TOKENS_AT_ONCE
from rayapp.models.products.packed import PACKED_TYPES
from rayapp.plan import PruningPlan, Stage
from rayapp.settings import DType


@dataclass(frozen=True)
class Limits:
    """The limits that a service runs under, as vLLM names them."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True)
class Footprint:
    """The bytes of one replica.

    ``sequence_bytes`` is the KV of one sequence of ``limits.max_model_len`` tokens, and
    ``step_bytes`` what exists for the time of a step beside weights and KV.
    """

    part: Part
    limits: Limits
    weight_bytes: int
    sequence_bytes: int
    step_bytes: int

    @property
    def least_bytes(self) -> int:
        """The bytes with which a replica can run at all: with one sequence of full length."""
        return self.weight_bytes + self.step_bytes + self.sequence_bytes

    def kv_bytes(self, memory_bytes: int) -> int:
        """Bytes of a device that are left for KV; negative if weights and a step do not fit."""
        return memory_bytes - self.weight_bytes - self.step_bytes

    def kv_tokens(self, memory_bytes: int) -> int:
        """Number of tokens whose KV fits into a device of this size, in sequences of full length.

        Shorter sequences of a model with sliding windows need more bytes a token than long ones.
        """
        if not self.sequence_bytes:
            return self.limits.max_model_len * self.limits.max_num_seqs
        left = max(0, self.kv_bytes(memory_bytes))
        return left * self.limits.max_model_len // self.sequence_bytes


def footprint(
    config: PreTrainedConfig,
    plan: PruningPlan,
    part: Part,
    limits: Limits,
    *,
    dtype: DType = "auto",
    on_cpu: bool = True,
) -> Footprint:
    """The footprint of a replica of one stage of a plan, or of both stages (``unified``).

    Args:
        config: The model's configuration.
        plan: The plan, which is taken as one of this model's weights.
        part: The stage.
        limits: The limits that the replica runs under.
        dtype: Element type that the model computes in.
        on_cpu: Whether the replica computes on a CPU, where products are packed.

    Raises:
        ModelError: The architecture is not supported.
        PlanError: The plan is one of a model of another shape.
    """
    check_supported(config)
    config = copy.deepcopy(config)  # Building a model writes its element type into it.
    element = compute_dtype(config, dtype)
    kv_by_part = {
        stage: _sequence_bytes(config, plan, stage, limits.max_model_len, element)
        for stage in stages_of(part)
    }
    kept = kv_by_part.get("decode", kv_by_part.get("prefill", 0))
    step_bytes = _step_bytes(config, part, limits, element, on_cpu=on_cpu)
    if part == "unified":  # A prompt's KV stands beside that of the running sequences.
        step_bytes += kv_by_part["prefill"]
    return Footprint(
        part=part,
        limits=limits,
        weight_bytes=_weight_bytes(config, plan, part, dtype, on_cpu=on_cpu),
        sequence_bytes=kept,
        step_bytes=step_bytes,
    )


def _weight_bytes(
    config: PreTrainedConfig, plan: PruningPlan, part: Part, dtype: DType, *, on_cpu: bool
) -> int:
    """Bytes of the parameters that a stage runs; healed ones weigh what they replace."""
    model: Any = empty_model(config, dtype)
    model.tie_weights()
    model.rayapp_fingerprint = plan.model.weights_fingerprint if plan.model else "of no weights"
    needed = needed_names(model, plan, part, None)
    kept = {id(p): p.nbytes for name, p in model.named_parameters() if name in needed}
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    is_copied = head is table and on_cpu and head.dtype in PACKED_TYPES
    return sum(kept.values()) + (head.nbytes if is_copied else 0)


def _sequence_bytes(
    config: PreTrainedConfig, plan: PruningPlan, stage: Stage, length: int, element: torch.dtype
) -> int:
    """Bytes of KV of one sequence; windowed blocks keep no more than their window."""
    entry_bytes = 2 * text_config(config).num_key_value_heads * head_dim(config) * element.itemsize
    entries = 0
    for block, window in enumerate(sliding_windows(config)):
        mode = plan.mode(stage, block)
        if mode.writes_kv if stage == "prefill" else mode.attends:
            entries += min(length, window or length)
    return entries * entry_bytes


def _step_bytes(
    config: PreTrainedConfig, part: Part, limits: Limits, element: torch.dtype, *, on_cpu: bool
) -> int:
    """Bytes of the largest step: states, queries, keys and values, one share of an MLP, logits."""
    text, size = text_config(config), element.itemsize
    chunk = 0 if part == "decode" else limits.max_num_batched_tokens
    num_tokens = chunk + (0 if part == "prefill" else limits.max_num_seqs)
    num_rows = min(num_tokens, limits.max_num_seqs)
    share = min(num_tokens, TOKENS_AT_ONCE) if on_cpu else num_tokens
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * head_dim(config)
    states = num_tokens * (3 * text.hidden_size + heads) * size
    parts = share * (3 * text.intermediate_size * size + 2 * text.hidden_size * (size + 4))
    masks = chunk * limits.max_model_len * (1 + size)
    logits = num_rows * text.vocab_size * (size + 2 * torch.float64.itemsize)
    return states + parts + masks + logits


def parts_of(mode: str) -> Sequence[Part]:
    """The kinds of replica of a service's mode."""
    return cast("Sequence[Part]", ("unified",) if mode == "unified" else ("prefill", "decode"))
