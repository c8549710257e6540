"""Pages: sheets that never overlap, moves that lose nothing, and books that add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.engine.pages import Arena, PagePool
from rayapp.errors import IntegrityError

BLOCK_SIZE = 4


def arena_of(num_pages: int) -> Arena:
    arena = Arena(num_pages, BLOCK_SIZE, (2, 3), torch.float32, torch.device("cpu"))
    for memory in (arena.keys_HED, arena.values_HED):
        memory.fill_(torch.nan)
    return arena


def filled(arena: Arena, num_runs: int, pages: int, used: int, mark: float):
    """A sheet whose entries say which sheet, run and entry they are."""
    sheet = arena.pool.take(num_runs, pages)
    if sheet is not None:
        sheet.used = sheet.clean = used
        keys, values = arena.runs(sheet, 0, used)
        keys.copy_(content(num_runs, used, mark))
        values.copy_(-content(num_runs, used, mark))
    return sheet


def content(num_runs: int, used: int, mark: float) -> torch.Tensor:
    numbers = torch.arange(num_runs * used).view(num_runs, used, 1) + 1000 * mark
    return numbers.expand(2, num_runs, used, 3).float()


def check_content(arena: Arena, sheet, mark: float) -> None:
    keys, values = arena.runs(sheet, 0, sheet.used)
    expected = content(sheet.num_runs, sheet.used, mark)
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)


def test_a_sheet_takes_the_first_hole_that_is_large_enough():
    pool = PagePool(20)
    first, second, third = pool.take(2, 3), pool.take(1, 4), pool.take(5, 1)
    assert [sheet.first for sheet in (first, second, third)] == [0, 6, 10]
    assert pool.take(6, 1) is None
    pool.drop(second)
    assert pool.num_free == 9
    assert pool.take(2, 2).first == 6
    assert pool.take(1, 5).first == 15
    pool.check([*pool.sheets])


def test_a_shared_sheet_lasts_until_its_last_holder_leaves():
    pool = PagePool(8)
    sheet = pool.take(1, 8)
    pool.share(sheet)
    pool.drop(sheet)
    assert pool.take(1, 1) is None
    pool.drop(sheet)
    assert pool.take(1, 8) is not None


def test_books_that_do_not_add_up_are_found():
    pool = PagePool(8)
    sheet = pool.take(2, 2)
    with pytest.raises(IntegrityError, match="1 sheets with 1 references, page tables hold 0"):
        pool.check([])
    other = pool.take(1, 2)
    other.first = 3
    with pytest.raises(IntegrityError, match="pages 3 to 5 of 8 are taken"):
        pool.check([sheet, other])


@pytest.mark.parametrize(("first", "pages"), [(0, 2), (1, 3), (2, 4), (20, 3), (2, 3)])
def test_moving_within_and_beside_itself_loses_nothing(first, pages):
    arena = arena_of(40)
    arena.pool.take(1, 2)
    sheet = filled(arena, 3, 3, 7, mark=1)
    arena.move(sheet, first, pages)
    assert (sheet.first, sheet.pages) == (first, pages)
    check_content(arena, sheet, mark=1)


def test_cleaning_zeroes_free_entries_and_nothing_else():
    arena = arena_of(12)
    sheet = filled(arena, 2, 3, 5, mark=1)
    arena.clean(sheet, 6)
    assert sheet.clean == 8  # to the end of the page
    keys, _ = arena.runs(sheet, 5, 12)
    assert (keys[:, :, :3] == 0).all()
    assert keys[:, :, 3:].isnan().all()
    check_content(arena, sheet, mark=1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_takes_drops_and_moves_keep_every_entry(data):
    arena = arena_of(24)
    pool, sheets = arena.pool, {}
    for mark in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["take", "drop", "compact", "widen"]))
        if action == "take":
            pages = data.draw(st.integers(1, 4))
            used = data.draw(st.integers(0, pages * BLOCK_SIZE))
            sheet = filled(arena, data.draw(st.integers(1, 3)), pages, used, mark)
            if sheet is not None:
                sheet.is_pinned = data.draw(st.integers(0, 5)) == 0
                sheets[sheet] = mark
        elif action == "compact":
            pool.compact(lambda s: -(-s.used // BLOCK_SIZE) or 1, arena.move)
            if not any(sheet.is_pinned for sheet in sheets):
                assert pool.room_behind(pool.sheets[-1]) == pool.num_free if sheets else True
        elif sheets:
            sheet = data.draw(st.sampled_from(list(sheets)))
            if action == "drop":
                pool.drop(sheet)
                del sheets[sheet]
            elif pool.open_behind(sheet, sheet.num_runs, arena.move):
                arena.move(sheet, sheet.first, sheet.pages + 1)
        pool.check(sheets)
        for sheet, its_mark in sheets.items():
            check_content(arena, sheet, its_mark)
