"""A record: everything known of one benchmark's result, in its JSON form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayapp.errors import InputError
from recorder.old_layouts import brought_up_to_date

Record = dict[str, Any]
"""A record has ``benchmark``, an origin (see :mod:`recorder.origin`), and the script's results by
name.

A record of parts has ``parts`` instead, each with an origin of its own."""


def read_record(path: Path, benchmark: str) -> Record:
    """Read a record of ``benchmark``, of today's layout or an older one.

    Raises:
        InputError: If the file is no record of this benchmark.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no record can be read ({error}); give a JSON file") from None
    record = stored if "benchmark" in stored else brought_up_to_date(stored, path.stem)
    if record["benchmark"] != benchmark:
        raise InputError(
            f"{path}: is a record of {record['benchmark']}, and {benchmark} was asked to render "
            f"it; run benchmarks/{record['benchmark']}.py"
        )
    return record
