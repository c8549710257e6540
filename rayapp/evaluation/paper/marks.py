"""The plans of a paper's record as marks in the picture of quality against speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rayapp.data.published_sets import IN_DOMAIN
from rayapp.evaluation.paper.numbers import MARGIN, PERPLEXITY, TTFT, Number
from rayapp.evaluation.paper.pictures import Mark, QualitySpeed
from rayapp.evaluation.paper.rows import DENSE
from rayapp.evaluation.result import MEAN

BATCH = "batch 1"


def quality_speed(rows: Sequence[Mapping[str, Any]]) -> QualitySpeed:
    """The picture of all rows of a record that were timed, except the dense model."""
    title = "What every plan keeps, against how much faster its first token comes"
    marks = [_mark(row) for row in rows if row["name"] != DENSE.name]
    return QualitySpeed(title, [mark for mark in marks if mark is not None])


def _mark(row: Mapping[str, Any]) -> Mark | None:
    numbers = [Number(**number) for number in row["numbers"]]
    named = {(number.data, number.metric): number for number in numbers}
    timed, kept = named.get((BATCH, TTFT)), named.get((MEAN, MARGIN))
    if timed is None:
        return None
    losses = [
        number.difference
        for number in numbers
        if number.metric == PERPLEXITY and not number.data.endswith(IN_DOMAIN)
    ]
    return Mark(
        method=row["title"].removesuffix(", healed"),
        missed=(row["prefill_removed"], row["decode_removed"]),
        healed=row["healed"],
        speedup=timed.difference,
        kept=kept.plan if kept else None,
        perplexity=100 * math.expm1(sum(losses) / len(losses)) if losses else None,
    )
