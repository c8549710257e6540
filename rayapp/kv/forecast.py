"""Forecast of the size of a prompt's KV message, exact to the byte, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rayapp.kv.cache import held_entries
from rayapp.kv.header import DTYPE_NAMES, BlockHeader, Header, aligned, layout, runs_of
from rayapp.kv.ledger import KVShape
from rayapp.kv.quantize import buffer_sizes
from rayapp.kv.select import kept_entries, num_prefilled, sent_blocks
from rayapp.kv.wire import PREFIX_BYTES, Envelope, MessageSizes
from rayapp.plan import KVTransfer, PruningPlan


@dataclass(frozen=True)
class RunPrompt:
    """The lengths and positions of a prompt as prefill runs it.

    ``num_tokens`` counts the unpruned prompt, and ``num_removed`` its visual tokens that are not
    run. ``positions`` are those of the tokens that are run, if gaps were left; None is 0, 1, ...
    """

    num_tokens: int
    num_removed: int = 0
    positions: tuple[int, ...] | None = None


def forecast_envelope(plan: PruningPlan) -> Envelope:
    """The envelope of a request that does not exist yet; its id is as long as a real one."""
    weights = plan.model.weights_fingerprint if plan.model else ""
    return Envelope("0" * 32, 0, plan.fingerprint, weights)


def forecast_sizes(
    shape: KVShape,
    dtype: torch.dtype,
    plan: PruningPlan,
    envelope: Envelope,
    prompt: RunPrompt,
) -> MessageSizes:
    """Forecast the result of :func:`rayapp.kv.wire.message_sizes` for a prompt.

    Of the envelope only the lengths of its names matter, and only by the 64 bytes to which headers
    are padded.

    Args:
        shape: The shape of the cache whose KV is sent.
        dtype: The element type of the model.
        plan: The plan, which says what travels.
        envelope: The envelope of the message.
        prompt: The prompt as prefill runs it.
    """
    tokens = num_prefilled(plan, prompt.num_tokens - prompt.num_removed)
    blocks = sent_blocks(plan, shape.num_blocks)
    runs = [_runs(plan.transfer(b), tokens, shape.windows[b], prompt.positions) for b in blocks]
    counts = [sum(length for _, length in block_runs) for block_runs in runs]
    encodings = [plan.transfer(block).encoding for block in blocks]
    sizes = [
        buffer_sizes(encoding, shape.num_kv_heads, count, shape.head_dim, shape.element_bytes)
        for encoding, count in zip(encodings, counts, strict=True)
    ]
    offsets, body_bytes = layout(sizes)
    # This header is not validated: packing the message notices any broken rule.
    entries = tuple(
        BlockHeader.model_construct(
            block=block, encoding=encoding, num_entries=count, runs=run, offsets=offset
        )
        for block, encoding, count, run, offset in zip(
            blocks, encodings, counts, runs, offsets, strict=True
        )
    )
    header = Header.model_construct(
        request_id=envelope.request_id,
        attempt=envelope.attempt,
        plan_fingerprint=envelope.plan_fingerprint,
        weights_fingerprint=envelope.weights_fingerprint,
        num_prompt_tokens=prompt.num_tokens,
        num_prefilled=tokens,
        num_visual_tokens_removed=prompt.num_removed,
        is_compact=prompt.num_removed > 0 and prompt.positions is None,
        dtype=DTYPE_NAMES[dtype],
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        blocks=entries,
    )
    payload = sum(map(sum, sizes))
    total = PREFIX_BYTES + aligned(len(header.dump())) + body_bytes
    return MessageSizes(payload, total - payload)


def _runs(
    rule: KVTransfer, num_tokens: int, window: int | None, positions: tuple[int, ...] | None
) -> tuple[tuple[int, int], ...]:
    """The runs of positions that a rule keeps in one block, as the header writes them."""
    num_entries = held_entries(num_tokens, window)
    first, last = rule.counts(num_entries)
    if positions is not None:
        entries_N = torch.tensor(positions[:num_tokens])[num_tokens - num_entries :]
        return runs_of(entries_N[kept_entries(rule, num_entries)])
    runs = ((num_tokens - num_entries, first), (num_tokens - last, last))
    return tuple(run for run in runs if run[1])
