"""Lower bounds of a device's work: operations at its best rate, or bytes at its best bandwidth.

A stage's bound is the longer of the two. Formulas are in :data:`FORMULAS`, and counts come from the
model's own weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from hardware.rates import Rates
from shapes.llava import IMAGE_TOKENS
from torch import nn
from transformers import PreTrainedModel

from rayapp.models.blocks import find_decoder
from rayapp.models.stack import BlockStack

FORMULAS = """\
Bounds, with P weights of the products in L blocks of width E, T tokens run per prompt, B prompts, \
N answer tokens: prefill does 2 T P + 2 T^2 E L operations per prompt (causal attention: half of \
4 T^2 E L) and the head's on one position; the tower, with its 577 tokens, 2 x 577 P' + 4 x 577^2 \
E' L' and the projector's; selection of K of N' tokens 2 N' E (K + 3). A decode step reads every \
weight of blocks and head once, and the KV of B (T + N / 2) entries in every block; it does 2 P + \
4 (T + N / 2) E L operations per sequence. Each stage takes at least the longer of operations / \
rate and bytes / bandwidth, both rates measured here; a speed-up's bound is the ratio of the sums.\
"""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one batch, by stage; those of decode are per step."""

    tower: tuple[float, float]
    selection: tuple[float, float]
    prefill: tuple[float, float]
    decode_step: tuple[float, float]

    def ttft_s(self, rates: Rates) -> float:
        return sum(rates.seconds(*stage) for stage in (self.tower, self.selection, self.prefill))

    def tpot_s(self, rates: Rates) -> float:
        return rates.seconds(*self.decode_step)

    def answer_s(self, rates: Rates, num_answer: int) -> float:
        return self.ttft_s(rates) + (num_answer - 1) * self.tpot_s(rates)


def work_of(
    model: PreTrainedModel,
    stack: BlockStack,
    *,
    batch: int,
    num_run: int,
    num_answer: int,
    num_keep: int | None,
) -> Work:
    """The work of ``batch`` prompts that run ``num_run`` tokens each; ``num_keep`` None selects
    nothing.
    """
    inner, width = model.model, stack.num_query_heads * stack.head_dim
    blocks = _weights(find_decoder(model).layers)
    head = model.get_output_embeddings().weight.numel()
    attended = width * stack.num_blocks
    size, entries = stack.dtype.itemsize, num_run + num_answer / 2
    entry_bytes = 2 * stack.num_kv_heads * stack.head_dim * size * stack.num_blocks
    tower = _weights(inner.vision_tower) + _weights(inner.multi_modal_projector)
    selection = 0 if num_keep is None else 2 * IMAGE_TOKENS * width * (num_keep + 3)
    return Work(
        tower=(batch * _tower_flops(inner), tower * size),
        selection=(batch * selection, 0),
        prefill=(
            batch * (2 * num_run * blocks + 2 * num_run**2 * attended + 2 * head),
            (blocks + head) * size,
        ),
        decode_step=(
            batch * (2 * (blocks + head) + 4 * entries * attended),
            (blocks + head) * size + batch * entries * entry_bytes,
        ),
    )


def _tower_flops(inner: nn.Module) -> float:
    config, tokens = inner.vision_tower.config, IMAGE_TOKENS + 1
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers
    products = 2 * tokens * _weights(inner.vision_tower)
    return products + attention + 2 * IMAGE_TOKENS * _weights(inner.multi_modal_projector)


def _weights(module: nn.Module) -> int:
    """Number of weights of all products, including the patch embedding's."""
    kinds = (nn.Linear, nn.Conv2d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, kinds))
