"""Attention over spans and shared prompts against plain attention, with poison all around."""

from __future__ import annotations

import pytest
import torch

from rayapp.engine.attention.sdpa import attend, attended_with_sums, plain_with_sums
from rayapp.engine.pages import Arena
from rayapp.engine.sequences.entries import Entries
from rayapp.engine.sequences.rows import StepRows

HEADS, DIM, BLOCKS = 2, 8, 2


def sheet_of(arena: Arena, pages: int, used: int):
    sheet = arena.pool.take(BLOCKS, pages)
    sheet.used = sheet.clean = used
    for view in arena.runs(sheet, 0, used):
        view.normal_()
    return sheet


def plain(query_HGD, held: Entries, arena: Arena, index: int, scale: float):
    parts = [arena.runs(held.sheet, held.low, held.sheet.used)]
    if held.prompt is not None:
        parts.insert(0, arena.runs(held.prompt, 0, held.prompt.used))
    keys, values = (
        torch.cat([t[:, index] for t in ts], dim=1).float() for ts in zip(*parts, strict=True)
    )
    query_HGD = query_HGD.float()
    return torch.softmax(query_HGD @ keys.transpose(1, 2) * scale, -1) @ values


@pytest.mark.parametrize("groups", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["even", "ragged", "shuffled", "shared"])
def test_rows_see_their_own_entries_and_no_others(shape, dtype, groups):
    """In bf16 few queries per KV head attend in another way than more of them."""
    torch.manual_seed(0)
    arena = Arena(400, 4, (HEADS, DIM), dtype, torch.device("cpu"))
    arena.keys_HED.fill_(torch.nan)
    arena.values_HED.fill_(torch.inf)
    lengths = [9, 9, 9, 9, 9, 9] if shape == "even" else [9, 2, 16, 1, 30, 8]
    prompt = sheet_of(arena, 5, 19) if shape == "shared" else None
    rows = [Entries(sheet_of(arena, 8, length), 99) for length in lengths]
    rows[2].low = 0 if shape == "even" else 5
    if shape == "shuffled":
        rows = [rows[i] for i in (3, 0, 5, 1, 4, 2)]
    for held in rows[1:4] if prompt else ():
        held.prompt = prompt
    step = StepRows(arena, rows, BLOCKS).step
    query_BHGD = torch.randn(len(rows), HEADS, groups, DIM).to(dtype)
    near = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for index in range(BLOCKS):
        found = attend(query_BHGD, step, index, 0.3)
        expected = torch.stack(
            [plain(q, held, arena, index, 0.3) for q, held in zip(query_BHGD, rows, strict=True)]
        )
        torch.testing.assert_close(found.float(), expected, **near)


def test_both_ways_to_sums_agree():
    query, keys, values = (torch.randn(2, 3, n, 16) for n in (5, 40, 40))
    mask = torch.zeros(2, 1, 1, 40)
    mask[1, ..., 30:] = -torch.inf
    for found, expected in zip(
        attended_with_sums(query, keys, values, mask, 0.25),
        plain_with_sums(query, keys, values, mask, 0.25),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
