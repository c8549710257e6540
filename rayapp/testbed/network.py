"""The text test-bed as a plain training network: a Llama whose weights lie in one stack per kind.

Stacked weights make the optimiser's Newton-Schulz steps, the averaging of gradients between ranks
and the checkpoints one operation per kind instead of one per block. ``rayapp.testbed.export``
writes the same numbers as an ordinary ``LlamaForCausalLM``; a test checks that the two forwards are
equal.

Shape legend: B rows, T tokens, D hidden width, H query heads, G KV heads, d head dim, F MLP width,
L blocks, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the weights that Muon trains, each stacked over the blocks as ``(L, out, in)``."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; the defaults are the shipped model's (2.1 million parameters)."""

    num_blocks: int = 12
    hidden: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 320
    vocabulary: int = 258
    max_positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name, matrices stacked over the blocks."""
        blocks, hidden, mlp = self.num_blocks, self.hidden, self.mlp
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (blocks, query, hidden),
            "k_proj": (blocks, key, hidden),
            "v_proj": (blocks, key, hidden),
            "o_proj": (blocks, hidden, query),
            "gate_proj": (blocks, mlp, hidden),
            "up_proj": (blocks, mlp, hidden),
            "down_proj": (blocks, hidden, mlp),
            "embed_tokens": (self.vocabulary, hidden),
            "input_layernorm": (blocks, hidden),
            "post_attention_layernorm": (blocks, hidden),
            "norm": (hidden,),
        }


Weights = dict[str, torch.Tensor]
"""One fp32 tensor per name of ``Shape.sizes``."""


def initial_weights(shape: Shape, seed: int) -> Weights:
    """Draw a run's first weights: fan-in scaled, output projections zero, norms one.

    Args:
        shape: Sizes of the network.
        seed: Seed of the draw; equal seeds give equal weights.

    Returns:
        fp32 leaves that require gradients, named as in ``Shape.sizes``.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, size in shape.sizes().items():
        if name in ("o_proj", "down_proj"):
            weights[name] = torch.zeros(size)
        elif name in MATRICES:
            weights[name] = torch.randn(size, generator=generator) * (0.5 / size[-1] ** 0.5)
        elif name == "embed_tokens":
            weights[name] = torch.randn(size, generator=generator) * 0.05
        else:
            weights[name] = torch.ones(size)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def rotary_tables(shape: Shape, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0 to ``num_tokens - 1``, each ``(T, d)``, fp32."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(
        torch.arange(num_tokens, dtype=torch.float32), shape.rope_theta**-exponents
    )
    angles_Td = torch.cat((angles, angles), dim=-1)
    return angles_Td.cos(), angles_Td.sin()


def _rotate(x_BHTd: torch.Tensor, cos_Td: torch.Tensor, sin_Td: torch.Tensor) -> torch.Tensor:
    first, second = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos_Td + torch.cat((-second, first), dim=-1) * sin_Td


def _attention(
    x_BTD: torch.Tensor, block: Weights, shape: Shape, tables: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    rows, tokens, _ = x_BTD.shape

    def heads(name: str, count: int) -> torch.Tensor:
        projected = functional.linear(x_BTD, block[name])
        return projected.view(rows, tokens, count, shape.head_dim).transpose(1, 2)

    query = _rotate(heads("q_proj", shape.num_heads), *tables)
    key = _rotate(heads("k_proj", shape.num_kv_heads), *tables)
    value = heads("v_proj", shape.num_kv_heads)
    repeats = shape.num_heads // shape.num_kv_heads
    mixed = functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(repeats, dim=1),
        value.repeat_interleave(repeats, dim=1),
        is_causal=True,
    )
    return functional.linear(mixed.transpose(1, 2).reshape(rows, tokens, -1), block["o_proj"])


def _mlp(x_BTD: torch.Tensor, block: Weights) -> torch.Tensor:
    gated = functional.silu(functional.linear(x_BTD, block["gate_proj"]))
    return functional.linear(gated * functional.linear(x_BTD, block["up_proj"]), block["down_proj"])


def hidden_states(
    weights: Weights, ids_BT: torch.Tensor, shape: Shape, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Run all blocks and the final norm, causally.

    Every row is a document that starts at position 0.

    Args:
        weights: Weights as ``initial_weights`` names them.
        ids_BT: Token ids, ``(B, T)``, int64.
        shape: Sizes of the network.
        dtype: Dtype of the computation.

    Returns:
        Hidden states after the final norm, ``(B, T, D)``, in ``dtype``.
    """
    stacks = {
        name: weights[name].to(dtype).unbind(0)
        for name in (*MATRICES, "input_layernorm", "post_attention_layernorm")
    }
    cos, sin = rotary_tables(shape, ids_BT.shape[1])
    tables = cos.to(dtype), sin.to(dtype)
    x_BTD = functional.embedding(ids_BT, weights["embed_tokens"]).to(dtype)
    for index in range(shape.num_blocks):
        block = {name: stack[index] for name, stack in stacks.items()}
        normed = functional.rms_norm(
            x_BTD, (shape.hidden,), block["input_layernorm"], shape.norm_eps
        )
        x_BTD = x_BTD + _attention(normed, block, shape, tables)
        normed = functional.rms_norm(
            x_BTD, (shape.hidden,), block["post_attention_layernorm"], shape.norm_eps
        )
        x_BTD = x_BTD + _mlp(normed, block)
    return functional.rms_norm(x_BTD, (shape.hidden,), weights["norm"].to(dtype), shape.norm_eps)


def logits_at(
    weights: Weights, ids_BT: torch.Tensor, mask_BT: torch.Tensor, shape: Shape, dtype: torch.dtype
) -> torch.Tensor:
    """Next-token logits at the masked positions, ``(N, V)``, fp32; the embedding is the head."""
    hidden_ND = hidden_states(weights, ids_BT, shape, dtype)[mask_BT].float()
    return functional.linear(hidden_ND, weights["embed_tokens"])
