"""Requests as they arrive: times and lengths, from a published trace or drawn like one."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rayapp.errors import InputError

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_KEYS = ("timestamp", "input_length", "output_length")
_LONGER = 6
_PROMPT, _ANSWER, _SPREAD = 6.5, 5.0, 0.9


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, in seconds from the first, and its lengths in tokens."""

    at_s: float
    num_prompt: int
    num_answer: int


def read_trace(path: Path, count: int | None = None) -> list[Arrival]:
    """The first ``count`` arrivals of a trace: Azure's (CSV) or Mooncake's (JSON lines).

    Raises:
        InputError: The file is no such trace, or has fewer arrivals.
    """
    read = _json_lines if path.suffix == ".jsonl" else _csv_rows
    arrivals: list[Arrival] = []
    try:
        for arrival in read(path):
            arrivals.append(arrival)
            if len(arrivals) == count:
                break
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: is no trace with the columns {', '.join(_COLUMNS)}, nor JSON lines with "
            f"{', '.join(_KEYS)} ({error!r}); give one of AzurePublicDataset's or Mooncake's"
        ) from None
    if not arrivals or (count is not None and len(arrivals) < count):
        raise InputError(
            f"{path}: has {len(arrivals)} arrivals, {count or 1} are wanted; ask for fewer"
        )
    arrivals.sort(key=lambda arrival: arrival.at_s)
    began_s = arrivals[0].at_s
    return [replace(arrival, at_s=arrival.at_s - began_s) for arrival in arrivals]


def _csv_rows(path: Path) -> Iterator[Arrival]:
    with path.open(newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            moment, prompt, answer = (row[column] for column in _COLUMNS)
            # Python reads six digits of a second; the trace has seven.
            seconds = datetime.fromisoformat(moment[:26]).timestamp()
            yield Arrival(seconds, int(prompt), int(answer))


def _json_lines(path: Path) -> Iterator[Arrival]:
    with path.open(encoding="utf-8") as opened:
        for line in filter(str.strip, opened):
            moment_ms, prompt, answer = (json.loads(line)[key] for key in _KEYS)
            yield Arrival(float(moment_ms) / 1000.0, int(prompt), int(answer))


def scaled(arrivals: Sequence[Arrival], divisor: float, max_model_len: int) -> list[Arrival]:
    """The arrivals with lengths divided, and cut to what the servers take."""
    result = []
    for arrival in arrivals:
        answer = min(max(2, int(arrival.num_answer / divisor)), max_model_len // 2)
        prompt = min(max(1, int(arrival.num_prompt / divisor)), max_model_len - answer)
        result.append(Arrival(arrival.at_s, prompt, answer))
    return result


def at_rate(arrivals: Sequence[Arrival], per_s: float) -> list[Arrival]:
    """The arrivals with their times stretched, so that ``per_s`` come on average."""
    span_s = arrivals[-1].at_s or 1.0
    stretch = (len(arrivals) - 1) / per_s / span_s
    return [replace(arrival, at_s=arrival.at_s * stretch) for arrival in arrivals]


def in_bursts(arrivals: Sequence[Arrival], size: int) -> list[Arrival]:
    """The arrivals in groups of ``size`` that come at once, at the time of their first."""
    return [
        replace(arrival, at_s=arrivals[number - number % size].at_s)
        for number, arrival in enumerate(arrivals)
    ]


@dataclass(frozen=True)
class Shape:
    """How a drawn load changes: factors of its rate, its prompts and its answers over time.

    Args:
        rate: Factor of the rate at a share of the whole time, 0 to 1.
        prompt: Factor of prompt lengths.
        answer: Factor of answer lengths.
        num_changes: Times that the load turns up or down.
    """

    rate: Callable[[float], float] = lambda _share: 1.0
    prompt: Callable[[float], float] = lambda _share: 1.0
    answer: Callable[[float], float] = lambda _share: 1.0
    num_changes: int = 0


def _during(factor: float, begin: float, end: float) -> Callable[[float], float]:
    return lambda share: factor if begin <= share < end else 1.0


SHAPES = {
    "poisson": Shape(),
    "burst": Shape(rate=_during(3.0, 0.4, 0.6), num_changes=2),
    "ramp": Shape(rate=lambda share: 0.5 + 2.0 * share, num_changes=1),
    "diurnal": Shape(rate=lambda share: 1.2 - math.cos(4 * math.pi * share), num_changes=4),
    "long-prompts": Shape(prompt=_during(_LONGER, 0.4, 0.7), num_changes=2),
    "long-answers": Shape(answer=_during(_LONGER, 0.4, 0.7), num_changes=2),
}
"""Loads that are drawn, by name; a factor of 1 is the usual rate."""


def drawn(
    shape: str, *, per_s: float, span_s: float, seed: int, most_tokens: int = 8192
) -> list[Arrival]:
    """Arrivals of a drawn load: a Poisson process whose rate changes, with skewed lengths.

    Lengths are lognormal with medians of 665 prompt and 148 answer tokens (project default, near
    the medians of conversations in Azure's trace).

    Args:
        shape: A name in :data:`SHAPES`.
        per_s: Requests per second where the factor is 1.
        span_s: Seconds from first to last.
        seed: Seed of times and lengths.
        most_tokens: Longest prompt and longest answer.

    Raises:
        InputError: There is no load of that name, or nothing would arrive.
    """
    if shape not in SHAPES:
        raise InputError(f"load {shape!r}: there is none; take one of {', '.join(SHAPES)}")
    form, rng = SHAPES[shape], random.Random(seed)
    highest = per_s * max(form.rate(step / 1000) for step in range(1001))
    arrivals: list[Arrival] = []
    at_s = rng.expovariate(highest)
    while at_s < span_s:
        share = at_s / span_s
        if rng.random() * highest < per_s * form.rate(share):
            prompt = rng.lognormvariate(_PROMPT, _SPREAD) * form.prompt(share)
            answer = rng.lognormvariate(_ANSWER, _SPREAD) * form.answer(share)
            lengths = (min(most_tokens, max(2, int(length))) for length in (prompt, answer))
            arrivals.append(Arrival(at_s, *lengths))
        at_s += rng.expovariate(highest)
    if not arrivals:
        raise InputError(
            f"{per_s:g} requests per second for {span_s:g} s: nothing arrives; ask for more"
        )
    return arrivals
