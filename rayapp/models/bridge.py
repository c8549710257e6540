"""A linear map in place of a span of blocks that a stage does not run.

The map reads the state that entered the span and gives an estimate of the state that the dense
model hands over behind it. ReplaceMe (arXiv:2505.02819) maps the residual itself; here the map
reads the normalised residual and adds to it, as every block does, so that a few tokens with huge
states do not decide it (project default). Shapes: B = batch, T = tokens, E = hidden size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

BRIDGE = "bridge"
"""Name of the map in its block, which is the last one of the span."""


def normalised(hidden_BTE: torch.Tensor, epsilon: float) -> torch.Tensor:
    """States of root mean square 1, in float32: what all norms of a span's blocks rescale."""
    wide = hidden_BTE.to(torch.float32)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


class Bridge(nn.Module):
    """Adds a linear map of the normalised state, and a bias, to the state.

    Args:
        size: Hidden size.
        epsilon: The epsilon of the model's norms.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size, size, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)

    def forward(self, hidden_BTE: torch.Tensor) -> torch.Tensor:
        """The states behind the span, ``(B, T, E)``."""
        normed_BTE = normalised(hidden_BTE, self.epsilon).to(hidden_BTE.dtype)
        return hidden_BTE + functional.linear(normed_BTE, self.weight, self.bias)
