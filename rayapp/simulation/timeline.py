"""The time line of a simulation as a drawing: replicas over time, and the work that they had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from rayapp.simulation.outcome import Moment, Outcome

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 860, 150, 60, 46, 40
_PREFILL, _DECODE, _QUIET = "#2f6fbd", "#d98a1f", "#5c6675"
_NUM_TICKS = 6

Value = Callable[[Moment], float]


def timeline_svg(outcome: Outcome, title: str) -> str:
    """Draw an outcome as SVG that loads nothing from elsewhere.

    The upper part shows replicas that work, the lower one prompts before their first token and
    sequences that decode holds. Between them stand the nodes of either stage, if there are any.

    Args:
        outcome: The outcome of a simulation.
        title: A description of the picture, for readers who cannot see it.
    """
    replicas: list[tuple[str, str, Value]] = [
        ("prefill replicas", _PREFILL, lambda one: one.num_prefill),
        ("decode replicas", _DECODE, lambda one: one.num_decode),
    ]
    work: list[tuple[str, str, Value]] = [
        ("prompts before their first token", _PREFILL, lambda one: one.num_prompts),
        ("sequences in decode", _DECODE, lambda one: one.num_sequences),
    ]
    nodes: list[tuple[str, str, Value]] = [
        ("prefill nodes", _PREFILL, lambda one: one.num_prefill_nodes),
        ("decode nodes", _DECODE, lambda one: one.num_decode_nodes),
    ]
    has_nodes = any(value(one) for one in outcome.moments for _, _, value in nodes)
    panels = [replicas, *[nodes] * has_nodes, work]
    tops = [_TOP + number * (_HEIGHT + _GAP) for number in range(len(panels))]
    end = tops[-1] + _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {end + 30}" '
        f'role="img" font-family="sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="100%" height="100%" style="fill: #ffffff"/>'
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for top, lines in zip(tops, panels, strict=True):
        parts += _panel(outcome, top, lines)
    parts += [*_ticks(outcome.span_s, end), "</svg>\n"]
    return "\n".join(parts)


def _panel(outcome: Outcome, top: int, lines: Sequence[tuple[str, str, Value]]) -> list[str]:
    moments = outcome.moments
    most = max([1.0, *(value(one) for one in moments for _, _, value in lines)])
    parts = [
        f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}" stroke="#d5dae1"/>'
        f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{_QUIET}">{label:g}</text>'
        for label, y in ((0, top + _HEIGHT), (round(most), top))
    ]
    for number, (name, colour, value) in enumerate(lines):
        points = _steps(moments, value, most, top, outcome.span_s)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<text x="{_LEFT + 8 + 230 * number}" y="{top - 6}" fill="{colour}">{name}</text>'
        )
    return parts


def _steps(moments: Sequence[Moment], value: Value, most: float, top: int, span_s: float) -> str:
    """The points of a line that stays until it changes."""
    places = [
        (
            _LEFT + _WIDTH * one.at_s / max(span_s, 1e-9),
            top + _HEIGHT * (1 - value(one) / most),
        )
        for one in moments
    ]
    points = [f"{x:.1f},{y:.1f}" for x, y in places[:1]]
    for (_, before), (x, y) in pairwise(places):
        if y != before:
            points += [f"{x:.1f},{before:.1f}", f"{x:.1f},{y:.1f}"]
    points += [f"{x:.1f},{y:.1f}" for x, y in places[-1:]]
    return " ".join(points)


def _ticks(span_s: float, y: int) -> list[str]:
    unit_s, name = (60.0, "min") if span_s > 300 else (1.0, "s")
    parts = []
    for number in range(_NUM_TICKS):
        share = number / (_NUM_TICKS - 1)
        label = f"{share * span_s / unit_s:.0f} {name}"
        parts.append(
            f'<text x="{_LEFT + _WIDTH * share:.1f}" y="{y + 18}" text-anchor="middle" '
            f'fill="{_QUIET}">{label}</text>'
        )
    return parts
