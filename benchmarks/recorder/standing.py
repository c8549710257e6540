"""Rows of a record that stands, beside those of a run that measured others of the same kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayapp.errors import InputError
from recorder.record import read_record

TOLERANCE = 1e-6
"""Numbers that differ by a smaller share are the same: sums round otherwise on another processor,
but an example that is answered otherwise changes an accuracy by far more."""


class Standing:
    """A record whose rows stay as they are, while a run measures others.

    A row rests on the dense model's answers, which every run measures anew: if those are the same,
    then model, data and draws are, and its rows may stand beside the new ones.

    Args:
        file: The record.
        benchmark: The benchmark that it must be of.
        configuration: The options of this run, as a record has them.
        same: Names of the options that must not differ.

    Attributes:
        record: The record.

    Raises:
        InputError: The record cannot be read, or is of other options.
    """

    def __init__(
        self, file: Path, benchmark: str, configuration: Mapping[str, Any], same: Collection[str]
    ) -> None:
        self._file = file
        self.record = read_record(file, benchmark)
        for name in same:
            ours, theirs = configuration[name], self.record["configuration"].get(name)
            if ours != theirs:
                raise InputError(
                    f"{file}: was measured with {name} {theirs!r}, and this run with {ours!r}; "
                    "give the same options, or write this run beside it with --name"
                )

    def rows(
        self, measured: Sequence[Mapping[str, Any]], metrics: Collection[str]
    ) -> list[dict[str, Any]]:
        """The record's rows that this run did not measure.

        Args:
            measured: The rows of this run, dense first.
            metrics: Names of the metrics that must not differ for the dense model.

        Raises:
            InputError: The dense model has other numbers.
        """
        ours, theirs = _numbers(measured[0], metrics), _numbers(self.record["rows"][0], metrics)
        for number in sorted(ours.keys() | theirs.keys()):
            now, then = ours.get(number), theirs.get(number)
            if now is None or then is None or abs(now - then) > TOLERANCE * abs(then):
                raise InputError(
                    f"{self._file}: the dense model has {' '.join(number)} {then}, and {now} in "
                    "this run; give the same model and data, or write this run beside it with "
                    "--name"
                )
        names = {row["name"] for row in measured}
        return [row for row in self.record["rows"] if row["name"] not in names]


def _numbers(row: Mapping[str, Any], metrics: Collection[str]) -> dict[tuple[str, str], float]:
    return {
        (number["data"], number["metric"]): number["plan"]
        for number in row["numbers"]
        if number["metric"] in metrics
    }
