"""Requests as they arrive: times and lengths, from a published trace or drawn like one."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rayapp.errors import InputError

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes, in seconds from the first, and its lengths in tokens."""

    at_s: float
    num_prompt: int
    num_answer: int


def read_trace(path: Path, count: int) -> list[Arrival]:
    """The first ``count`` arrivals of an Azure LLM inference trace (CSV).

    Raises:
        InputError: The file is no such trace, or has fewer arrivals.
    """
    arrivals: list[Arrival] = []
    try:
        with path.open(newline="", encoding="utf-8") as opened:
            for row in csv.DictReader(opened):
                moment, prompt, answer = (row[column] for column in _COLUMNS)
                # Python reads six digits of a second; the trace has seven.
                seconds = datetime.fromisoformat(moment[:26]).timestamp()
                arrivals.append(Arrival(seconds, int(prompt), int(answer)))
                if len(arrivals) == count:
                    break
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: is no trace with the columns {', '.join(_COLUMNS)} ({error!r}); "
            "give one of AzurePublicDataset's"
        ) from None
    if len(arrivals) < count:
        raise InputError(f"{path}: has {len(arrivals)} arrivals, {count} are wanted; ask for fewer")
    began_s = arrivals[0].at_s
    return [replace(arrival, at_s=arrival.at_s - began_s) for arrival in arrivals]


def drawn(count: int, seed: int) -> list[Arrival]:
    """Poisson arrivals, one a second, with skewed lengths; a stand-in where no trace is given."""
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        lengths = (int(rng.lognormvariate(mean, 0.9)) for mean in (6.5, 5.0))
        arrivals.append(Arrival(at_s, *lengths))
        at_s += rng.expovariate(1.0)
    return arrivals


def scaled(arrivals: Sequence[Arrival], divisor: int, max_model_len: int) -> list[Arrival]:
    """The arrivals with lengths divided, and cut to what the servers take."""
    result = []
    for arrival in arrivals:
        answer = min(max(2, arrival.num_answer // divisor), max_model_len // 2)
        prompt = min(max(1, arrival.num_prompt // divisor), max_model_len - answer)
        result.append(Arrival(arrival.at_s, prompt, answer))
    return result


def at_rate(arrivals: Sequence[Arrival], per_s: float) -> list[Arrival]:
    """The arrivals with their times stretched, so that ``per_s`` come on average."""
    span_s = arrivals[-1].at_s or 1.0
    stretch = (len(arrivals) - 1) / per_s / span_s
    return [replace(arrival, at_s=arrival.at_s * stretch) for arrival in arrivals]
