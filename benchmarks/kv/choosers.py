"""Other ways to choose the KV that travels, for comparisons with a plan's rules at equal bytes.

A way that looks at the prompt cannot be written into a plan. Its bytes are counted in the same wire
format, with the extra data that it needs (stated in its docstring).
Shapes: B = prompts of equal length, H = KV heads (or 1 where all share), N = entries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from kv.attention import WINDOW, PromptAttention
from rayapp.kv.select import kept_entries
from rayapp.plan import SEND_ALL, Encoding, KVTransfer
from rayapp.pruning.kv_choice.bytes import KVBytes


@dataclass(frozen=True)
class Choice:
    """The KV that the prompts of one batch send.

    Attributes:
        kept: Masks of the entries that travel, bool ``(B, H, N)``, by block where decode attends.
        encodings: Encoding of a block's entries, by block.
        bytes_sent: Bytes that every prompt sends; header, scales and indices count.
    """

    kept: Mapping[int, torch.Tensor]
    encodings: Mapping[int, Encoding]
    bytes_sent: tuple[int, ...]


class KVChooser(Protocol):
    """A way to choose the KV that travels."""

    def choose(self, attention: PromptAttention, num_bytes: KVBytes) -> Choice:
        """Choose for the prompts of one batch."""
        ...


@dataclass(frozen=True)
class FixedRules:
    """Transfer rules by block as a plan has them, the same for every prompt."""

    rules: Mapping[int, KVTransfer]

    def choose(self, attention: PromptAttention, num_bytes: KVBytes) -> Choice:
        """Keep entries by their place in the prompt; attention does not count."""
        rules = {block: self.rules.get(block, SEND_ALL) for block in attention.held}
        sent = num_bytes.message(rules, attention.num_prompt_tokens)
        return Choice(
            kept={
                block: _entries(rules[block], held).expand(attention.num_prompts, 1, -1)
                for block, held in attention.held.items()
            },
            encodings={block: rule.encoding for block, rule in rules.items()},
            bytes_sent=(sent,) * attention.num_prompts,
        )


def in_all_blocks(rule: KVTransfer, blocks: range) -> FixedRules:
    """The same rule in every block.

    The rule keeps sinks and recent tokens (StreamingLLM, arXiv:2309.17453), or all entries in one
    encoding.
    """
    return FixedRules(dict.fromkeys(blocks, rule))


@dataclass(frozen=True)
class LazyBlocks:
    """SimLayerKV's rule (arXiv:2410.13846).

    A block is cut for the prompts whose last token puts at least ``threshold`` of its attention on
    the entries that the cut keeps. No index travels: the header's runs say what was cut. A block
    whose attention prefill does not run cannot be judged, and is not cut.
    """

    threshold: float
    cut: KVTransfer

    def choose(self, attention: PromptAttention, num_bytes: KVBytes) -> Choice:
        """Keep all entries of a block, or those of the cut, prompt by prompt."""
        uncut = KVTransfer(encoding=self.cut.encoding)
        lazy = {block: self._is_lazy(attention, block) for block in attention.held}
        rows = range(attention.num_prompts)
        sent = [
            num_bytes.message(
                {block: self.cut if lazy[block][row] else uncut for block in lazy},
                attention.num_prompt_tokens,
            )
            for row in rows
        ]
        kept = {
            block: (~lazy[block][:, None] | _entries(self.cut, held))[:, None]
            for block, held in attention.held.items()
        }
        return Choice(kept, dict.fromkeys(lazy, self.cut.encoding), tuple(sent))

    def _is_lazy(self, attention: PromptAttention, block: int) -> torch.Tensor:
        """Whether a block is lazy, bool ``(B,)``: one answer per prompt."""
        if block not in attention.last:
            return torch.zeros(attention.num_prompts, dtype=torch.bool)
        mass_BN = attention.last[block] * _entries(self.cut, attention.held[block])
        return mass_BN.sum(dim=1) >= self.threshold


@dataclass(frozen=True)
class ScoredTokens:
    """SnapKV's rule (arXiv:2404.14469), per KV head.

    A prompt sends the last ``WINDOW`` entries, and those before them that these tokens attend to
    most; votes are pooled by their maximum over ``pool`` neighbours. Every block and head keeps the
    same share. A head's entries are its own, so one bit per entry and KV head travels beside them.
    A block whose attention prefill does not run keeps its last entries.
    """

    keep_ratio: float
    encoding: Encoding = "model"
    pool: int = 7

    def choose(self, attention: PromptAttention, num_bytes: KVBytes) -> Choice:
        """Keep the best-scored entries of every block and head."""
        kept, rules, index_bytes = {}, {}, 0
        for block, held in attention.held.items():
            count = max(1, math.ceil(self.keep_ratio * held - 1e-9))
            kept[block] = self._best(attention, block, count)
            rules[block] = KVTransfer(last=count, encoding=self.encoding)
            if count < held:
                index_bytes += math.ceil(held / 8) * attention.num_kv_heads
        sent = index_bytes + num_bytes.message(rules, attention.num_prompt_tokens)
        encodings = dict.fromkeys(kept, self.encoding)
        return Choice(kept, encodings, (sent,) * attention.num_prompts)

    def _best(self, attention: PromptAttention, block: int, count: int) -> torch.Tensor:
        held = attention.held[block]
        scores_BHN = torch.arange(held).expand(attention.num_prompts, 1, -1).float()
        if block in attention.votes:
            scores_BHN = torch.nn.functional.max_pool1d(
                attention.votes[block], self.pool, stride=1, padding=self.pool // 2
            )
            recent = torch.arange(held) >= held - WINDOW
            # If even the window does not fit, its newest entries are kept.
            scores_BHN = scores_BHN + recent * (2.0 * WINDOW + torch.arange(held))
        best_BHK = scores_BHN.topk(min(count, held), dim=-1).indices
        return torch.zeros(scores_BHN.shape, dtype=torch.bool).scatter(-1, best_BHK, True)


def _entries(rule: KVTransfer, held: int) -> torch.Tensor:
    """Mask of the entries out of ``held`` that a rule keeps, bool ``(N,)``."""
    kept_N = torch.zeros(held, dtype=torch.bool)
    kept_N[kept_entries(rule, held)] = True
    return kept_N
