from __future__ import annotations

import pytest

from rayapp.evaluation.paper.pictures import GREY, BlockMap, Mark, QualitySpeed

MAP = BlockMap("blocks", [[1.0, 0.1, 0.01], [2.0, 0.1, 0.02]], [[3.0, 1.0, 0.5], [3.0, 2.0, 0.4]])
MARKS = [
    Mark("ours", (2, 0), False, 1.2, kept=99.0, perplexity=1.0),
    Mark("ours", (2, 0), True, 1.2, kept=99.5),
    Mark("POP's rule", (4, 0.5), False, 1.3, perplexity=6.0),
]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("picture", [MAP, QualitySpeed("speed", MARKS), QualitySpeed("none", [])])
def test_a_drawing_is_the_same_for_the_same_numbers_and_has_no_ground(picture):
    first, again = (picture.svg(salt="x") for _ in range(2))
    assert first == again
    assert "<svg" in first
    assert "fill: #ffffff" not in first, "a white ground hides letters on a dark page"
    assert "#000000" not in first, "black letters cannot be read on a dark page"


def test_letters_can_be_read_on_white_and_on_dark():
    for ground in ("#ffffff", "#0d1117"):
        high, low = sorted((luminance(GREY), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) > 3.5


def test_marks_name_their_sizes():
    assert [mark.label for mark in MARKS] == ["p2", "p2", "p4 d0.5"]
