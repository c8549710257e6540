"""The choice of entries that travel: a plan's transfer rules applied to the KV of a prefill.

Shapes: B = prompts, H = KV heads, N = entries a block holds, K = entries kept, T = tokens run,
D = head dimension. Positions are given, never assumed to be 0..T-1: pruned visual tokens leave
gaps.
"""

from __future__ import annotations

import torch

from rayapp.errors import IntegrityError
from rayapp.kv.cache import CaptureCache, Prefix, PrefixCache, held_entries
from rayapp.kv.quantize import round_trip
from rayapp.kv.segment import BlockKV, KVSegment
from rayapp.plan import KVTransfer, PruningPlan


def kept_entries(rule: KVTransfer, num_entries: int) -> torch.Tensor:
    """Indices ``(K,)`` of the entries that travel, ascending, int64."""
    first, last = rule.counts(num_entries)
    return torch.cat([torch.arange(first), torch.arange(num_entries - last, num_entries)])


def num_prefilled(plan: PruningPlan, num_prompt_tokens: int) -> int:
    """Number of prompt tokens that prefill runs: T, or T - 1 if decode runs the last one."""
    return num_prompt_tokens - (plan.first_token == "decode")


def sent_blocks(plan: PruningPlan, num_blocks: int) -> tuple[int, ...]:
    """Blocks whose KV travels, ascending: the blocks where decode attends."""
    return tuple(block for block in range(num_blocks) if plan.mode("decode", block).attends)


def select_segment(
    plan: PruningPlan,
    cache: CaptureCache,
    positions_T: torch.Tensor,
    num_prompt_tokens: int,
    *,
    num_visual_tokens_removed: int = 0,
    is_compact: bool = False,
) -> KVSegment:
    """Select the segment that decode needs of one prompt.

    Tensors may be views of the cache; :func:`rayapp.kv.wire.pack` copies them. An empty cache (a
    prompt of one token under ``first_token: decode``) gives a segment whose blocks have no entries.

    Args:
        plan: The plan, which says where decode attends, what travels and how it is encoded.
        cache: The KV that the prefill of this one prompt wrote.
        positions_T: Positions of the tokens that prefill ran, ascending.
        num_prompt_tokens: Length of the unpruned prompt.
        num_visual_tokens_removed: Number of its tokens that were not run.
        is_compact: True if positions leave no gaps where tokens were removed.

    Raises:
        IntegrityError: A block has another number of entries than its window and the positions
            imply.
    """
    blocks = []
    for block in sent_blocks(plan, len(cache.windows)):
        keys_BHKD, values_BHKD, positions_K = _kept(plan, cache, positions_T, block)
        if keys_BHKD.shape[0] != 1:
            raise IntegrityError(
                f"the cache holds {keys_BHKD.shape[0]} prompts, a segment is of one; "
                f"use select_prefix for batches"
            )
        encoding = plan.transfer(block).encoding
        blocks.append(BlockKV(block, keys_BHKD[0], values_BHKD[0], positions_K, encoding))
    return KVSegment(
        tuple(blocks),
        num_prompt_tokens,
        num_prefilled(plan, num_prompt_tokens - num_visual_tokens_removed),
        num_visual_tokens_removed,
        is_compact,
    )


def select_prefix(plan: PruningPlan, cache: CaptureCache, positions_T: torch.Tensor) -> PrefixCache:
    """The KV that decode would have after the handoff of a batch: selected, encoded and decoded.

    The result equals :func:`select_segment`, packing and unpacking for every prompt, without the
    bytes in between.

    Args:
        plan: The plan, which says where decode attends, what travels and how it is encoded.
        cache: The KV that the prefill of B prompts of equal length wrote.
        positions_T: Positions of the tokens that prefill ran, equal for all prompts.
    """
    prefixes = {}
    for block in sent_blocks(plan, len(cache.windows)):
        keys_BHKD, values_BHKD, positions_K = _kept(plan, cache, positions_T, block)
        encoding = plan.transfer(block).encoding
        prefixes[block] = Prefix(*round_trip(keys_BHKD, values_BHKD, encoding), positions_K)
    return PrefixCache(prefixes, cache.windows)


def _kept(
    plan: PruningPlan, cache: CaptureCache, positions_T: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys_BHND, values_BHND = cache.entries(block)
    num_entries = keys_BHND.shape[2]
    num_tokens, window = int(positions_T.shape[0]), cache.windows[block]
    if num_entries != held_entries(num_tokens, window):
        raise IntegrityError(
            f"block {block} holds {num_entries} entries, but {num_tokens} tokens under window "
            f"{window} leave {held_entries(num_tokens, window)}; pass the positions that were run"
        )
    positions_N = positions_T[num_tokens - num_entries :].to(torch.int64)
    rule = plan.transfer(block)
    first, last = rule.counts(num_entries)
    if last == 0:
        return keys_BHND[:, :, :first], values_BHND[:, :, :first], positions_N[:first].cpu()
    kept_K = kept_entries(rule, num_entries).to(keys_BHND.device)
    return (
        keys_BHND.index_select(2, kept_K),
        values_BHND.index_select(2, kept_K),
        positions_N.cpu().index_select(0, kept_K.cpu()),
    )
