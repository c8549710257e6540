"""Attention over pages with torch's own kernels, on every device.

A span is one call of ``scaled_dot_product_attention`` on a view of the pages. Rows that share a
prompt read it once, all their queries together, and their own entries in the spans as other rows
do. The two results are merged by the logarithms of their sums of weights, which is exact but for
rounding (the split softmax of FlashDecoding).
Shapes: B = rows, S = rows that share a prompt, H = KV heads, G = query heads per KV head,
K = entries attended to, D = head dimension, E = entries of the arena.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from rayapp.engine.attention.step import GroupStep, SharedPrompt, SpanKV

_FEW_GROUPS = 4
"""Queries per KV head from which torch's kernel for CPUs takes them together in bf16. Fewer are
faster one by one: two took 0.6 and three 0.8 of the time, four as long (a trial on a CPU with AMX,
8 and 32 rows of 200 entries; no benchmark of ours measures it)."""

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attend(query_BHGD: torch.Tensor, step: GroupStep, index: int, scale: float) -> torch.Tensor:
    """Attention outputs ``(B, H, G, D)`` of block ``index`` of the step's group."""
    if step.order is not None:
        query_BHGD = query_BHGD[step.order]
    if step.shared:
        attended_BHGD = _with_shared(query_BHGD, step, index, scale)
    elif len(step.spans) == 1:
        attended_BHGD = _over_span(query_BHGD, step.spans[0], index, scale)
    else:
        parts = [
            _over_span(query_BHGD[span.first : span.stop], span, index, scale)
            for span in step.spans
        ]
        attended_BHGD = torch.cat(parts)
    return attended_BHGD if step.back is None else attended_BHGD[step.back]


def _over_span(query_BHGD: torch.Tensor, span: SpanKV, index: int, scale: float) -> torch.Tensor:
    keys, values = span.keys[index], span.values[index]
    groups = query_BHGD.shape[2]
    if groups < _FEW_GROUPS and query_BHGD.dtype == torch.bfloat16 and not query_BHGD.is_cuda:
        return functional.scaled_dot_product_attention(
            query_BHGD.flatten(1, 2)[:, :, None],
            keys,
            values,
            attn_mask=span.mask,
            scale=scale,
            enable_gqa=True,
        ).view_as(query_BHGD)
    return functional.scaled_dot_product_attention(
        query_BHGD, keys, values, attn_mask=span.mask, scale=scale
    )


def _with_shared(
    query_BHGD: torch.Tensor, step: GroupStep, index: int, scale: float
) -> torch.Tensor:
    """Attend to the entries in the spans, then merge what rows see of a prompt that they share."""
    outputs, sums = [], []
    for span in step.spans:
        output, log_sum = attended_with_sums(
            query_BHGD[span.first : span.stop],
            span.keys[index],
            span.values[index],
            span.mask,
            scale,
        )
        outputs.append(output)
        sums.append(log_sum)
    attended_BHGD, sums_BHG = torch.cat(outputs), torch.cat(sums)
    for prompt in step.shared:
        rows = prompt.rows
        output_SHGD, sums_SHG = _over_prompt(query_BHGD[rows], step, prompt, index, scale)
        share_SHG1 = torch.sigmoid(sums_SHG - sums_BHG[rows])[..., None]
        merged_SHGD = torch.lerp(attended_BHGD[rows].float(), output_SHGD.float(), share_SHG1)
        attended_BHGD[rows] = merged_SHGD.to(attended_BHGD.dtype)
    return attended_BHGD


def _over_prompt(
    query_SHGD: torch.Tensor, step: GroupStep, prompt: SharedPrompt, index: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries of all rows to a prompt's entries, which are read once."""
    start = step.arena.start(prompt.sheet, index)
    stop = start + prompt.sheet.used
    num_rows, heads, groups, dim = query_SHGD.shape
    together_1HQD = query_SHGD.transpose(0, 1).reshape(1, heads, num_rows * groups, dim)
    output_1HQD, sums_1HQ = attended_with_sums(
        together_1HQD,
        step.arena.keys_HED[None, :, start:stop],
        step.arena.values_HED[None, :, start:stop],
        None,
        scale,
    )
    output_SHGD = output_1HQD.view(heads, num_rows, groups, dim).transpose(0, 1)
    return output_SHGD, sums_1HQ.view(heads, num_rows, groups).transpose(0, 1)


def attended_with_sums(
    query_BHQD: torch.Tensor,
    keys_BHKD: torch.Tensor,
    values_BHKD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention outputs ``(B, H, Q, D)`` and the logarithms ``(B, H, Q)`` of their sums, float32.

    Where torch's kernel for CPUs is missing or does not apply, plain products in float32 are used.
    """
    if _FLASH is not None and query_BHQD.device.type == "cpu":
        output, sums = _FLASH(
            query_BHQD, keys_BHKD, values_BHKD, 0.0, False, attn_mask=mask, scale=scale
        )
        return output, sums
    return plain_with_sums(query_BHQD, keys_BHKD, values_BHKD, mask, scale)


def plain_with_sums(
    query_BHQD: torch.Tensor,
    keys_BHKD: torch.Tensor,
    values_BHKD: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as :func:`attended_with_sums` from plain products in float32."""
    products_BHQK = query_BHQD.float() @ keys_BHKD.float().transpose(2, 3) * scale
    if mask is not None:
        products_BHQK = products_BHQK + mask
    sums_BHQ = products_BHQK.logsumexp(-1)
    weights_BHQK = (products_BHQK - sums_BHQ[..., None]).exp()
    return (weights_BHQK @ values_BHKD.float()).to(query_BHQD.dtype), sums_BHQ
