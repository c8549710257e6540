"""Prompts that are both in the data a plan was chosen or trained on, and in its evaluation data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from rayapp.data.json_lines import read_objects
from rayapp.data.lines import ChoiceLine, Line, read_lines
from rayapp.data.seen import plain_text
from rayapp.errors import DataError
from rayapp.evaluation.data import parse_any
from rayapp.evaluation.measures.perplexity import TextLine
from rayapp.evaluation.paper.settings import ReproduceSettings

MIN_CHARACTERS = 32
"""Smallest length of a prompt that is searched for inside texts (project default)."""


def checked_overlaps(settings: ReproduceSettings) -> dict[str, int]:
    """Data sets that share prompts with calibration or heal data; refused unless allowed.

    Raises:
        DataError: A file is refused as in :func:`count_overlaps`, or prompts are shared and
            ``allow_overlap`` is not set.
    """
    chosen_on = [path for path in (settings.calibration, settings.heal_data) if path]
    counts = {n: c for n, c in count_overlaps(chosen_on, settings.data).items() if c}
    if counts and not settings.allow_overlap:
        listed = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise DataError(
            f"prompts of {' and '.join(chosen_on)} stand in the evaluation data ({listed}): a plan "
            "would be judged by what it was chosen on; take them out of one of the files, or give "
            "--allow-overlap, and the tables say so"
        )
    return counts


def count_overlaps(chosen_on: Iterable[str], data: Mapping[str, str]) -> dict[str, int]:
    """Numbers of calibration (or heal) prompts in the data sets, by name.

    Prompts that differ only in case and white space count as equal. A text contains a prompt if the
    whole prompt stands in it. Lines about images are not compared, since they may ask the same
    question about other images.

    Args:
        chosen_on: Calibration and heal files.
        data: Evaluation files by name.

    Raises:
        DataError: A file cannot be read, or a line (named) is malformed.
    """
    lines = [line for path in chosen_on for _, line in read_lines(path)]
    prompts = {plain_text(line.prompt) for line in lines if isinstance(line, Line)}
    return {name: _count(prompts, Path(path)) for name, path in data.items()}


def _count(prompts: set[str], path: Path) -> int:
    lines = [parse_any(fields, f"{path} line {n}") for n, fields in read_objects(path)]
    questions = {plain_text(line.prompt) for line in lines if isinstance(line, Line | ChoiceLine)}
    text = plain_text("\n\n".join(line.text for line in lines if isinstance(line, TextLine)))
    inside = {p for p in prompts if len(p) >= MIN_CHARACTERS and p in text} if text else set()
    return len((prompts & questions) | inside)
