"""The plans to compare: the dense model, the peers' methods, PDTrim's, and ours.

Peers know one removal set for both stages, so theirs is shared, and as large as the mean of the two
stages' sizes. All searches score the same calibration lines by the same objective, so they differ
in how they search, not in what they search for. That is more than some of the papers give their
methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayapp.errors import InputError
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.pruning.settings.search import SearchSettings

_SHARED = {"shared": True, "kv_modes": False}
_SUBSET = {"kv_modes": False, "method": "annealing"}
_OURS = {"kv_modes": True}


@dataclass(frozen=True)
class Row:
    """One row of the tables.

    Attributes:
        name: The name of the row's directory, and of the row on the command line.
        title: The row's title in tables.
        source: The paper, or ``ours``.
        search: The settings of its search that differ; None if it is not searched.
        healed: Whether the search heals.
        after: Names of rows; the last of them that exists gives this row's plan.
    """

    name: str
    title: str
    source: str
    search: Mapping[str, Any] | None = None
    healed: bool = False
    after: tuple[str, ...] = field(default=())


_PLANS = ("shared", "pdtrim", "kv_modes", "pdtrim_healed", "healed")

DENSE = Row("dense", "dense", "")
ROWS = (
    DENSE,
    Row("random", "random", "", {**_SHARED, "method": "random"}),
    Row("similarity", "ShortGPT", "arXiv:2403.03853", {**_SHARED, "method": "similarity"}),
    Row("window", "cosine window (Gromov)", "arXiv:2403.17887", {**_SHARED, "method": "window"}),
    Row("one_shot", "Shortened-LLaMA", "arXiv:2402.02834", {**_SHARED, "method": "one_shot"}),
    Row("greedy", "SLEB", "arXiv:2402.09025", {**_SHARED, "method": "greedy"}),
    Row("evolution", "EvoPress", "arXiv:2410.14649", {**_SHARED, "method": "evolution"}),
    Row("shared", "ours, one shared set", "ours", _SHARED),
    Row("pdtrim", "PDTrim, subset rule", "arXiv:2509.04467", _SUBSET),
    Row("kv_modes", "ours, kv modes", "ours", _OURS),
    Row("pdtrim_healed", "PDTrim, subset rule, healed", "arXiv:2509.04467", _SUBSET, healed=True),
    Row("healed", "ours, kv modes, healed", "ours", _OURS, healed=True),
    Row("kv_selected", "ours, with KV selection", "ours", after=_PLANS),
    Row("unified", "the same, unified", "ours", after=(*_PLANS, "kv_selected")),
)
"""All rows, in the order of the tables."""

PEERS = ("random", "similarity", "window", "one_shot", "greedy", "evolution")
OURS = "kv_modes"
"""The name of our row under the peers' conditions: no training, all KV sent."""


def chosen_rows(settings: ReproduceSettings) -> tuple[Row, ...]:
    """The rows of the settings, dense first; raises :class:`InputError` for unknown names."""
    known = [row.name for row in ROWS]
    wanted = known if settings.rows is None else list(settings.rows)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise InputError(f"row {unknown[0]!r} is not known; use some of {', '.join(known)}")
    return tuple(row for row in ROWS if row is DENSE or row.name in wanted)


def left_out(row: Row, settings: ReproduceSettings, sizes: tuple[int, int]) -> str | None:
    """The reason why a row cannot be made with these settings; None if it can."""
    if row.healed and settings.heal_data is None:
        return "no --heal-data was given"
    if row.healed and settings.heal == "none":
        return "--heal none was given"
    if row.name == "kv_selected" and settings.target_reduction is None:
        return "no --target-reduction was given"
    if row.name.startswith("pdtrim") and sizes[0] > sizes[1]:
        return f"prefill removes more blocks ({sizes[0]}) than decode ({sizes[1]})"
    return None


def search_settings(
    row: Row, settings: ReproduceSettings, sizes: tuple[int, int], out: Path, *, resume: bool
) -> SearchSettings:
    """The settings of a row's search."""
    assert row.search is not None, "only searched rows ask"
    shared = sum(sizes) // 2
    prefill, decode = (shared, shared) if row.search.get("shared") else sizes
    healing = {"heal": settings.heal, "heal_data": settings.heal_data} if row.healed else {}
    values = {
        "out": str(out),
        "prefill_remove": prefill,
        "decode_remove": decode,
        "method": settings.method,
        "evaluations": settings.evaluations,
        "seed": settings.seed,
        "resume": resume,
    }
    return SearchSettings.checked(**{**values, **row.search, **healing})
