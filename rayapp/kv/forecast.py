"""What the KV message of a prompt will weigh, to the byte, before anything is computed."""

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
    """A prompt as prefill runs it.

    ``num_tokens`` are those of the unpruned prompt, ``num_removed`` the visual tokens of it that
    are not run; ``positions`` are those of the tokens run where gaps were left, None: 0, 1, ...
    """

    num_tokens: int
    num_removed: int = 0
    positions: tuple[int, ...] | None = None


def forecast_envelope(plan: PruningPlan) -> Envelope:
    """The envelope of a request that the service has not got yet; its id is as long as they are."""
    weights = plan.model.weights_fingerprint if plan.model else ""
    return Envelope("0" * 32, 0, plan.fingerprint, weights)


def forecast_sizes(
    shape: KVShape,
    dtype: torch.dtype,
    plan: PruningPlan,
    envelope: Envelope,
    prompt: RunPrompt,
) -> MessageSizes:
    """What :func:`rayapp.kv.wire.message_sizes` will say of a prompt.

    Only the lengths of the envelope's names matter, and only by the 64 bytes that headers are
    padded to.

    Args:
        shape: Of the model whose KV is sent.
        dtype: Its element type.
        plan: Says what travels.
        envelope: Whose KV it is.
        prompt: What prefill runs.
    """
    tokens = num_prefilled(plan, prompt.num_tokens - prompt.num_removed)
    blocks = sent_blocks(plan, shape.num_blocks)
    runs = [_runs(plan.transfer(b), tokens, shape.windows[b], prompt.positions) for b in blocks]
    counts = [sum(length for _, length in each) for each in runs]
    encodings = [plan.transfer(block).encoding for block in blocks]
    sizes = [
        buffer_sizes(encoding, shape.num_kv_heads, count, shape.head_dim, shape.element_bytes)
        for encoding, count in zip(encodings, counts, strict=True)
    ]
    offsets, body_bytes = layout(sizes)
    # Not validated: a rule that a header could break is noticed where the message is packed.
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
    """The runs of positions that a rule keeps of a block, as the header writes them."""
    held = held_entries(num_tokens, window)
    first, last = rule.counts(held)
    if positions is not None:
        entries_N = torch.tensor(positions[:num_tokens])[num_tokens - held :]
        return runs_of(entries_N[kept_entries(rule, held)])
    runs = ((num_tokens - held, first), (num_tokens - last, last))
    return tuple(run for run in runs if run[1])
