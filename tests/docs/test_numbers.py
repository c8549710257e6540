"""Numbers in the guides are those of the result files."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

from tests.docs.guides import GUIDES, ROOT, named, prose, text_of
from tests.docs.numbers import (
    DERIVED,
    FRONT,
    FRONT_ROWS,
    HEADLINE,
    NUM_BLOCKS,
    NUM_PICTURED,
    NUMBERS,
    PICTURED,
    value_at,
)

LINES = sorted({(number.page, number.line) for number in NUMBERS})


def line_of(page: str, begin: str) -> str:
    """The only line of a page that begins so."""
    (line,) = [each for each in text_of(ROOT / page).splitlines() if each.startswith(begin)]
    return line


def texts(page: str, begin: str) -> list[str]:
    """The numbers that a line must show, in their order."""
    return [number.text() for number in NUMBERS if (number.page, number.line) == (page, begin)]


@pytest.mark.parametrize(("page", "begin"), LINES)
def test_numbers_are_those_of_the_record(page, begin):
    line, position = line_of(page, begin), 0
    for text in texts(page, begin):
        found = re.compile(rf"(?<![\d.,]){re.escape(text)}").search(line, position)
        assert found, f"{text!r} is not where it belongs in: {line}"
        position = found.end() - 1  # two cells share the bar between them


def test_every_number_of_the_front_table_is_listed():
    table = re.search(r"^(?:\|.*\n)+", text_of(ROOT / FRONT), re.MULTILINE)
    head, _, dense, *rows = table[0].splitlines()
    assert head.startswith("| plan |")
    assert dense.startswith(f"| dense | {NUM_BLOCKS} / {NUM_BLOCKS} | 1x | 1x | 1x | 100 % |")
    assert len(rows) < 6
    assert len(rows) == len(FRONT_ROWS)
    for row, begin in zip(rows, FRONT_ROWS, strict=True):
        assert row.startswith(begin)
        shown = re.findall(r"[\d.]+", row[len(begin) :])
        listed = [digits for text in texts(FRONT, begin) for digits in re.findall(r"[\d.]+", text)]
        assert shown == listed, "list every number of the table in tests/docs/numbers.py"


DECIMAL = re.compile(r"(?<![\w.-])\d+\.\d+(?![.\d])")
NOT_PROSE = re.compile(r"\]\([^)]*\)|`[^`]*`|arXiv:\S+")


def sections(guide: Path) -> list[str]:
    """The parts of a guide between its headings of the second level."""
    return re.split(r"^## ", prose(guide), flags=re.MULTILINE)


def shown_in(pages: set[str], guide: Path) -> set[str]:
    """The decimal numbers of pages of results, also rounded to fewer places.

    A page has rounded already, so the last 5 may have been a little less.
    """
    shown = set()
    for page in pages:
        for number in DECIMAL.findall((guide.parent / page).read_text(encoding="utf-8")):
            for places in range(1, len(number.partition(".")[2]) + 1):
                for rounding in (ROUND_HALF_DOWN, ROUND_HALF_UP):
                    shown.add(str(Decimal(number).quantize(Decimal(1).scaleb(-places), rounding)))
    return shown


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_decimal_numbers_beside_a_result_stand_in_it(guide):
    """What else stands in such sections is listed with where it comes from."""
    for section in sections(guide):
        pages = set(re.findall(r"\]\(([\w./-]*results/[\w.-]+\.md)\)", section))
        if pages:
            numbers = set(DECIMAL.findall(NOT_PROSE.sub("", section)))
            unknown = numbers - shown_in(pages, guide) - DERIVED.keys()
            assert not unknown, f"{section.splitlines()[0]}: not in {sorted(pages)}"


def test_the_picture_is_a_plan_that_was_measured():
    picture = text_of(ROOT / "rayapp" / "flow.svg")
    removed = [
        value_at(HEADLINE, f"validation/plan_name={PICTURED}/{stage}_remove")
        for stage in ("prefill", "decode")
    ]
    assert picture.count('class="skip"') == sum(removed)
    for count in removed:
        assert f"runs {NUM_PICTURED - count:g} of {NUM_PICTURED} blocks" in picture
