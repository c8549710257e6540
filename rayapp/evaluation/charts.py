"""Geometry of the report's drawings: plain numbers in, coordinates and labels out, no markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayapp.plan import STAGES, Mode, PruningPlan, Stage

MODE_LABELS: dict[Mode, str] = {
    Mode.FULL: "full",
    Mode.ATTENTION_ONLY: "attn",
    Mode.MLP_ONLY: "mlp",
    Mode.MLP_AND_KV: "mlp+kv",
    Mode.KV_ONLY: "kv",
    Mode.REMOVED: "-",
}
_MAX_DOTS = 1_000
_LOG_FROM_RATIO = 30.0


@dataclass(frozen=True)
class BlockCell:
    """One block of one stage in the removal map; ``hands_over``: its KV goes to decode."""

    stage: Stage
    block: int
    mode: Mode
    hands_over: bool

    @property
    def label(self) -> str:
        """The mode in at most six letters."""
        return MODE_LABELS[self.mode]


def removal_map(plan: PruningPlan, num_blocks: int) -> dict[Stage, list[BlockCell]]:
    """Every block's mode, per stage."""
    attended = [plan.mode("decode", block).attends for block in range(num_blocks)]
    return {
        stage: [
            BlockCell(stage, b, plan.mode(stage, b), stage == "prefill" and attended[b])
            for b in range(num_blocks)
        ]
        for stage in STAGES
    }


@dataclass(frozen=True)
class TransferStrip:
    """Which part of a prompt's KV travels for one block.

    ``first`` and ``last`` are shares of the prompt's entries; both 0 where nothing travels.
    """

    block: int
    first: float
    last: float
    text: str


def transfer_strips(plan: PruningPlan, num_blocks: int, num_entries: int) -> list[TransferStrip]:
    """One strip per block, for a prompt of ``num_entries`` tokens."""
    return [_strip(plan, block, num_entries) for block in range(num_blocks)]


def _strip(plan: PruningPlan, block: int, num_entries: int) -> TransferStrip:
    if not plan.mode("decode", block).attends:
        return TransferStrip(block, 0.0, 0.0, "not sent: decode does not attend")
    rule = plan.transfer(block)
    encoding = "" if rule.encoding == "model" else f", {rule.encoding}"
    first, last = rule.counts(num_entries)
    if first >= num_entries:
        return TransferStrip(block, 1.0, 0.0, f"all {num_entries}{encoding}")
    text = f"first {first}, last {last} of {num_entries}{encoding}"
    return TransferStrip(block, first / num_entries, last / num_entries, text)


@dataclass(frozen=True)
class SearchTrace:
    """Scores over evaluations in a unit square: x to the right, y downwards (SVG).

    ``best`` are the corners of the staircase of the best score so far, ``dots`` the scores
    themselves (thinned). ``ticks`` are ``(y, label)``.
    """

    best: tuple[tuple[float, float], ...]
    dots: tuple[tuple[float, float], ...]
    ticks: tuple[tuple[float, str], ...]
    num_evaluations: int
    best_score: float
    is_log: bool


def search_trace(scores: Sequence[float]) -> SearchTrace | None:
    """The trace of ``scores`` (lower is better), in order; None where none is finite."""
    finite = [score for score in scores if math.isfinite(score)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    is_log = low > 0 and high / low > _LOG_FROM_RATIO

    def height(score: float) -> float:
        if high == low:
            return 0.5
        if is_log:
            return 1 - math.log(score / low) / math.log(high / low)
        return 1 - (score - low) / (high - low)

    def across(index: int) -> float:
        return index / max(len(scores) - 1, 1)

    stride = max(1, math.ceil(len(scores) / _MAX_DOTS))
    dots = tuple(
        (across(i), height(score))
        for i, score in enumerate(scores)
        if math.isfinite(score) and i % stride == 0
    )
    middle = math.sqrt(low * high) if is_log else (low + high) / 2
    ticks = tuple((height(s), f"{s:.3g}") for s in ([low] if high == low else [low, middle, high]))
    stairs = tuple((across(i), height(score)) for i, score in _staircase(scores))
    return SearchTrace(stairs, dots, ticks, len(scores), low, is_log)


def _staircase(scores: Sequence[float]) -> list[tuple[int, float]]:
    """Corners ``(index, best score so far)`` of a step line."""
    corners: list[tuple[int, float]] = []
    for index, score in enumerate(scores):
        if math.isfinite(score) and (not corners or score < corners[-1][1]):
            corners += [(index, corners[-1][1])] if corners else []
            corners.append((index, score))
    corners.append((len(scores) - 1, corners[-1][1]))
    return corners


@dataclass(frozen=True)
class Share:
    """One part of a stacked bar; ``start`` and ``width`` are shares of the whole."""

    name: str
    num_bytes: int
    start: float
    width: float


LEDGER_PARTS = {
    "bytes_sent": "sent",
    "saved_by_visual_tokens_bytes": "saved by visual tokens",
    "saved_by_blocks_bytes": "saved by blocks",
    "saved_by_tokens_bytes": "saved by tokens",
    "saved_by_encoding_bytes": "saved by encoding",
}


def byte_shares(totals: Mapping[str, float]) -> list[Share]:
    """Where the bytes of the dense cache went; parts without bytes are left out."""
    parts = [(name, int(totals.get(key, 0))) for key, name in LEDGER_PARTS.items()]
    whole = sum(max(count, 0) for _, count in parts)
    shares, start = [], 0.0
    for name, count in parts:
        if count > 0:
            shares.append(Share(name, count, start, count / whole))
            start += count / whole
    return shares
