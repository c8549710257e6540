"""Pools and newlines: every token of an image is in one place, and newlines follow their row."""

from __future__ import annotations

import pytest
import torch

from rayapp.vision.layout import ImageLayout, PoolLayout

# A base view of 2 x 2, then a grid of 3 x 4 whose rows end with newlines: 4 + 15 tokens.
NEXT = ImageLayout((PoolLayout(0, 2, 2), PoolLayout(4, 3, 4, has_newlines=True)))
NEWLINES = {8, 13, 18}


def test_counts() -> None:
    assert NEXT.num_tokens == 19
    assert NEXT.num_visual == 16
    assert ImageLayout((PoolLayout(0, 24, 24),)).num_tokens == 576


def test_tokens_leave_newlines_out_in_reading_order() -> None:
    everything = torch.arange(19)
    tokens = torch.cat([pool.tokens(everything) for pool in NEXT.pools]).tolist()
    assert tokens == [i for i in range(19) if i not in NEWLINES]


def test_keeping_all_tokens_keeps_all_places() -> None:
    kept = NEXT.keep([torch.arange(4), torch.arange(12)])
    assert kept.tolist() == list(range(19))


@pytest.mark.parametrize(
    ("base", "grid", "expected"),
    [
        ([], [0], [4, 8]),
        ([1, 3], [], [1, 3]),
        ([0], [3, 4], [0, 7, 8, 9, 13]),
        ([], [8, 11], [14, 17, 18]),
        ([], [], []),
    ],
)
def test_a_newline_is_kept_exactly_where_its_row_keeps_a_token(
    base: list[int], grid: list[int], expected: list[int]
) -> None:
    chosen = [torch.tensor(part, dtype=torch.int64) for part in (base, grid)]
    assert NEXT.keep(chosen).tolist() == expected
